"""The controllers of a run that has several shard groups."""
