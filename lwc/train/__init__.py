"""Training in PyTorch: losses, what a module's outputs are worth, and the loop."""
