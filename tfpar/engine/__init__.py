"""One batch through the stages: programs, their backward passes, and the update."""
