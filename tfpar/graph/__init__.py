"""A Keras model as a graph of operations, and what is known of each."""
