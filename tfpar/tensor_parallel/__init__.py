"""The graph that each rank of a tensor axis runs."""
