"""A wave from the choice of its users to its publication."""
