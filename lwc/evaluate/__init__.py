"""Quality, latency and memory of a model, measured."""
