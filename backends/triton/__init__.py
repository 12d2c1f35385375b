"""Kernels for GPUs in Triton: what they are, how they are launched, and what they cost."""
