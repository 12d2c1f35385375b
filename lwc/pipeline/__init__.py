"""Passes, their textual spelling, and the manager that runs them."""
