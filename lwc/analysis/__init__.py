"""Facts about a module, computed on demand, cached, never mutating."""
