"""Statistics cross: probe heads."""
