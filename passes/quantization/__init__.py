"""Passes that store or compute numbers in fewer bits."""
