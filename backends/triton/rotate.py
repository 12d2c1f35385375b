"""ONNX's rotary embeddings with the kernel."""

from __future__ import annotations

from typing import TypeAlias

import torch

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
    size = x.shape[-1] if x.dim() == 4 else x.shape[-1] // num_heads
    return _turned(
        x, cos_cache, sin_cache, position_ids,
        size=size, width=rotary_embedding_dim, interleaved=interleaved,
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
    size = 2 * cos_cache.shape[-1]
    if x.dim() == 4:
        size = x.shape[-1]
    elif num_heads:
        size = x.shape[-1] // num_heads
    places = position_ids
    if places.dim() < 2:
        batch, length = x.shape[0], x.shape[2 if x.dim() == 4 else 1]
        places = (places.reshape(1, 1) + torch.arange(length)).expand(batch, -1)
    return _turned(
        x, cos_cache, sin_cache, places,
        size=size, width=rotary_embedding_dim, interleaved=interleaved,
    )  # fmt: skip


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    *, size: int, width: int, interleaved: int,
) -> Tensor:  # fmt: skip
    heads = x.transpose(1, 2) if x.dim() == 4 else x.unflatten(-1, (-1, size))
    half = (width or size) // 2
    if positions is None:
        cos, sin = (table.expand(heads.shape[0], -1, -1) for table in (cos, sin))
    y: Tensor = launch.rotary(
        heads, cos[..., :half], sin[..., :half], positions, interleaved=bool(interleaved)
    )
    return y.transpose(1, 2) if x.dim() == 4 else y.flatten(2)
