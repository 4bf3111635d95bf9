"""Ways back: one file a method, each with ``contribute`` at the owner and ``absorb`` at the centre."""
