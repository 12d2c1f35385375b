"""Text from a language model, step by step, with a cache that may be cut to a budget."""
