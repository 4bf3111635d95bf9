"""Weights cross: task vectors."""
