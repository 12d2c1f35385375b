"""Which operators run in which kernels, a file a family. Importing this registers them."""

from __future__ import annotations

from lwc.backends.triton.lowerings import activation, attention, norm, products, rotary

__all__ = ["activation", "attention", "norm", "products", "rotary"]
