"""What Keras' fit, evaluate and predict call."""
