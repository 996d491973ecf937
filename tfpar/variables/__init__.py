"""One logical variable, wherever its values live."""
