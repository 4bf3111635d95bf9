"""Above rounds: what ways back cost, and which of them serves these specialists best."""
