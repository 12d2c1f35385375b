"""Runtimes that execute a module."""
