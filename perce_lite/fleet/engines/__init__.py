"""Ways to train the users of a fleet."""
