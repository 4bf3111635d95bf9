"""The report room: records and history, turned into pages that work offline: one a round, and one of all rounds."""
