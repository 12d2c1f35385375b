"""ONNX's rotary embeddings with the kernel."""

from __future__ import annotations

from typing import TypeAlias

import torch

from lwc.backends.fx.ops.rotary import check_fit, head_size, placed
from lwc.backends.triton import launch

__all__ = ["contrib_rotary_embedding", "rotary_embedding"]

Tensor: TypeAlias = torch.Tensor


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn heads by their positions."""
    return _turned(
        x, cos_cache, sin_cache, position_ids,
        size=head_size(x, num_heads, 0), width=rotary_embedding_dim, interleaved=interleaved,
    )  # fmt: skip


def contrib_rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn heads by their positions, or by one position and those after it."""
    return _turned(
        x, cos_cache, sin_cache, placed(x, position_ids),
        size=head_size(x, num_heads, 2 * cos_cache.shape[-1]),
        width=rotary_embedding_dim, interleaved=interleaved,
    )  # fmt: skip


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None,
    *, size: int, width: int, interleaved: int,
) -> Tensor:  # fmt: skip
    check_fit(x, cos, sin, places, size=size, width=width)
    heads = x.transpose(1, 2) if x.dim() == 4 else x.unflatten(-1, (-1, size))
    y: Tensor = launch.rotary(heads, cos, sin, places, interleaved=bool(interleaved))
    return y.transpose(1, 2) if x.dim() == 4 else y.flatten(2)
