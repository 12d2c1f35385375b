"""The lowest layer: the module that passes rewrite, and what every layer shares."""
