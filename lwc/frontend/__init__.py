"""Ways in: every file format and framework becomes a Module."""
