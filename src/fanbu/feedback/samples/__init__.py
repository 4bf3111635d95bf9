"""Samples cross: labelled or unlabelled rows."""
