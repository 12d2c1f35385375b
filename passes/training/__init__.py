"""Passes that train, and the adapters they train."""
