"""What runs where and when, as plain data: no TensorFlow."""
