"""Private names of TensorFlow and Keras, each with the versions it was checked against."""
