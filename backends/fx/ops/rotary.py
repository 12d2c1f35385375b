"""Rotary position embeddings."""

from __future__ import annotations

from typing import TypeAlias

import torch

from lwc.backends.fx.registry import op
from lwc.core.errors import LwcError

__all__ = ["check_fit", "check_places", "head_size", "placed", "rotated", "rows_at"]

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


def check_fit(
    x: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None, *, size: int, width: int
) -> None:
    """Check that tables and positions have the shapes that ONNX Runtime asks for.

    It also takes tables of `size / 2` columns where fewer are turned, but reads them as if they had
    fewer; here they are refused.

    Args:
        x: `[batch, heads, length, size]` or `[batch, length, heads * size]`.
        cos: `[rows, width / 2]`, or `[batch, length, width / 2]` without `places`.
        sin: The same.
        places: A row for each token, `[batch, length]`.
        size: Elements of a head.
        width: Elements of a head that are turned; 0 for all.

    Raises:
        LwcError: They have not.
    """
    tokens = [x.shape[0], x.shape[2 if x.dim() == 4 else 1]]
    rows = tokens if places is None else [cos.shape[0]]
    wanted = {"cos_cache": (cos, [*rows, (width or size) // 2])}
    wanted["sin_cache"] = (sin, wanted["cos_cache"][1])
    if places is not None:
        wanted["position_ids"] = (places, tokens)
    for name, (given, shape) in wanted.items():
        if list(given.shape) != shape:
            raise LwcError(f"{name} has shape {list(given.shape)}, not {shape}")


def check_places(places: Tensor, rows: int, what: str = "positions") -> None:
    """Check that positions are rows of tables, by their content.

    Args:
        places: The positions.
        rows: How many rows there are.
        what: What messages call the positions.

    Raises:
        LwcError: One is not.
    """
    if not places.numel():
        return
    low, high = (int(end) for end in places.aminmax())
    if low < 0 or high >= rows:
        raise LwcError(
            f"{what} are from {low} to {high}, and tables of {rows} rows have 0 to {rows - 1}"
        )


def rows_at(table: Tensor, places: Tensor, what: str = "positions") -> Tensor:
    """Return rows of a table. An index would take negative places as counted from the end.

    Args:
        table: `[rows, columns]`.
        places: Numbers of rows.
        what: What messages call them.

    Raises:
        LwcError: A place is no row, and the table lies on the CPU; a GPU stops the program.
    """
    places = places.to(torch.int64)
    try:
        return torch.nn.functional.embedding(places, table)
    except IndexError:
        check_places(places, table.shape[0], what)
        raise


def placed(x: Tensor, position_ids: Tensor) -> Tensor:
    """Return a position for each token, where one number is the first and stands for all."""
    if position_ids.dim() > 1 or position_ids.numel() != 1:
        return position_ids
    counted = torch.arange(x.shape[2 if x.dim() == 4 else 1])
    return (position_ids.reshape(1, 1) + counted).expand(x.shape[0], -1)


def head_size(x: Tensor, num_heads: int, otherwise: int) -> int:
    """Return the elements of a head: `otherwise` where neither x nor the number of heads tells."""
    width: int = x.shape[-1]
    if x.dim() == 4:
        return width
    return width // num_heads if num_heads else otherwise


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
    return _turned(
        x, cos_cache, sin_cache, position_ids,
        size=head_size(x, num_heads, 0), width=rotary_embedding_dim, interleaved=interleaved,
    )  # fmt: skip


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
    if places is not None:
        cos, sin = rows_at(cos, places), rows_at(sin, places)
    heads = x if x.dim() == 4 else x.unflatten(-1, (-1, size)).transpose(1, 2)
    y = rotated(heads, cos, sin, interleaved=interleaved, width=width)
    return y if x.dim() == 4 else y.transpose(1, 2).reshape(x.shape)
