"""Observers of a run, and what they leave for others to see."""
