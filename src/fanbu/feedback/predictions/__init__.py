"""Predictions cross: soft labels on a probe set."""
