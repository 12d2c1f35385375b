"""The smallest module, and the fewest passes, that still fail."""
