"""Rounding, which may let gradients through."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

__all__ = ["clamped", "rounded"]

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


def clamped(x: Tensor, low: int, high: int) -> Tensor:
    """Bound x; where it is out of bounds it gets no gradient."""
    return x.clamp(low, high)
