"""Checks that a module is well formed and that a pass kept its meaning."""
