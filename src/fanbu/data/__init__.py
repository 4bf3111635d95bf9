"""Loading, checking and splitting of rows."""
