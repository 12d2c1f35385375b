"""Passes that compute by one operator what exporters spell with many."""
