"""What devices exchange, and the devices."""
