"""Tables: decision trees as plain arrays, and forests that decide which specialist to believe."""
