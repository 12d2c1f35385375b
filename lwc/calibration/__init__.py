"""Feeds that drive a model, and the statistics gathered from them."""
