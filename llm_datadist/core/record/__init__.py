"""What an engine records of itself, for whoever watches it."""
