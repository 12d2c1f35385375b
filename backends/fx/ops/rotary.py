"""Rotary position embeddings."""

from __future__ import annotations

from typing import TypeAlias

import torch

from lwc.backends.fx.registry import op

__all__ = ["rotated"]

Tensor: TypeAlias = torch.Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: int, width: int = 0) -> Tensor:
    """Turn pairs of elements of heads (Su et al., 2021, RoFormer).

    Args:
        x: `[batch, heads, length, size]`.
        cos: `[batch, length, width / 2]`, or with a batch of 1.
        sin: The same.
        interleaved: 1 where neighbours are a pair, 0 where an element and that half a width on is.
        width: Elements of a head that are turned, the first ones; 0 for all.
    """
    width = width or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos[..., : width // 2].unsqueeze(1), sin[..., : width // 2].unsqueeze(1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        y = torch.stack([first, second], dim=-1).reshape(turned.shape)
    else:
        y = torch.cat([first, second], dim=-1)
    return torch.cat([y, rest], dim=-1) if rest.shape[-1] else y


def _as_heads(x: Tensor, heads: int, width: int) -> Tensor:
    """Bring `[batch, length, heads * size]` to `[batch, heads, length, size]`."""
    size = x.shape[-1] // heads if heads else width
    return x.reshape(x.shape[0], x.shape[1], -1, size).transpose(1, 2)


@op("RotaryEmbedding")
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
    heads = x if x.dim() == 4 else _as_heads(x, num_heads, 0)
    cos, sin = cos_cache, sin_cache
    if position_ids is not None:
        places = position_ids.to(torch.int64)
        cos, sin = cos[places], sin[places]
    y = rotated(heads, cos, sin, interleaved=interleaved, width=rotary_embedding_dim)
    return y if x.dim() == 4 else y.transpose(1, 2).reshape(x.shape)


@op("com.microsoft::RotaryEmbedding", zero="is_packed_batching", ignored="scale")
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
    """Turn heads by their positions, or by one position and those after it.

    ONNX Runtime's kernel for the CPU does not read the attribute `scale`, nor does this.
    """
    heads = x if x.dim() == 4 else _as_heads(x, num_heads, 2 * cos_cache.shape[-1])
    places = position_ids.to(torch.int64)
    if places.dim() < 2:
        places = places.reshape(1, 1) + torch.arange(heads.shape[2])
    y = rotated(
        heads,
        cos_cache[places],
        sin_cache[places],
        interleaved=interleaved,
        width=rotary_embedding_dim,
    )
    return y if x.dim() == 4 else y.transpose(1, 2).reshape(x.shape)
