"""Modules as torch.fx.GraphModules: differentiable, in plain PyTorch operators."""
