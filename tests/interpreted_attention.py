"""Attention as its definition has it, and inputs for it: what kernels are compared with."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["attention", "numbers"]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).clamp(-2, 2).to(dtype)


def attention(
    q: Any, k: Any, v: Any, *, left: int | None = None, right: int | None = None, offset: int = 0,
    mask: Any | None = None, cap: float = 0.0, scale: float | None = None,
) -> Any:  # fmt: skip
    """Attention as its definition has it, in float64."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - offset
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        allowed &= distance >= -left
    if right is not None:
        allowed &= distance <= right
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask.double()
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
    return weights.nan_to_num(0) @ v
