"""Passes that leave the function as it is and the graph smaller."""
