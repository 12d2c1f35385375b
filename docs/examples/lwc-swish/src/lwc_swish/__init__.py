"""Passes of lwc that fuse activations; found through the entry points `lwc.passes`."""

__version__ = "0.1.0"
