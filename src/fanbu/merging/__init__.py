"""Merging weights out of core: what every method that reads checkpoints tensor by tensor shares."""
