"""The report room: one round's record, turned into one page that works offline."""
