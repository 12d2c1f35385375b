"""Random numbers, which are not those of any other runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor


@op("RandomNormal", types="dtype", ignored="seed")
def random_normal(
    *,
    shape: Sequence[int],
    mean: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(list(shape), dtype=dtype) * scale + mean


@op("RandomUniform", types="dtype", ignored="seed")
def random_uniform(
    *,
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw evenly distributed numbers."""
    return torch.rand(list(shape), dtype=dtype) * (high - low) + low


@op("RandomNormalLike", types="dtype", ignored="seed")
def random_normal_like(
    x: Tensor, *, mean: float = 0.0, scale: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw normal numbers in the shape of x."""
    return torch.randn(x.shape, dtype=dtype or x.dtype) * scale + mean


@op("RandomUniformLike", types="dtype", ignored="seed")
def random_uniform_like(
    x: Tensor, *, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw evenly distributed numbers in the shape of x."""
    return torch.rand(x.shape, dtype=dtype or x.dtype) * (high - low) + low


@op("Bernoulli", types="dtype", ignored="seed")
def bernoulli(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Draw 1 with the probability that x gives, else 0."""
    return (torch.rand(x.shape, dtype=torch.float64) < x).to(dtype or x.dtype)
