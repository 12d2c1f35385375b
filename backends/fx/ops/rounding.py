"""Rounding, which may let gradients through, and what is rounded once at the end."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

__all__ = ["clamped", "in_single", "rounded", "rounded_to"]

Tensor: TypeAlias = torch.Tensor


class _Round(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rounded(x: Tensor, straight_through: bool) -> Tensor:
    """Round half to even; `straight_through` gives x the gradient of the result.

    The estimator of Bengio, Léonard and Courville, 2013 (arXiv:1308.3432).
    """
    return _Round.apply(x) if straight_through else torch.round(x)


def in_single(x: Tensor) -> Tensor:
    """Return x in the type that sums are taken in: float32 in place of a shorter float."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def rounded_to(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a result in a type; in exports a conversion to its own would be a condition."""
    return y if y.dtype == dtype else y.to(dtype)


def clamped(x: Tensor, low: int, high: int) -> Tensor:
    """Bound x; where it is out of bounds it gets no gradient."""
    return x.clamp(low, high)
