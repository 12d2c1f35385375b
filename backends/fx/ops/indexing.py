"""Operators that choose elements by index or by condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from lwc.backends.fx.registry import op

__all__ = ["gather"]

Tensor: TypeAlias = torch.Tensor
Reduction: TypeAlias = Literal["none", "add", "mul", "max", "min"]


@op("Gather", either=(1,))
def gather(x: Tensor, indices: Tensor | Sequence[int] | int, *, axis: int = 0) -> Tensor:
    """Take slices along an axis; negative indices count from the end."""
    if isinstance(indices, int):
        return x.select(axis, indices)
    axis = axis % x.dim()
    if not isinstance(indices, torch.Tensor):
        indices = torch.tensor(indices, dtype=torch.int64)
    wide = indices.to(torch.int64)
    if wide.dim() == 0:  # a tensor of rank 0 as an index would be read at once, as a number
        return x[(slice(None),) * axis + (wide.reshape(1),)].squeeze(axis)
    return x[(slice(None),) * axis + (wide,)]


def _positive(indices: Tensor, extent: int) -> Tensor:
    wide = indices.to(torch.int64)
    return torch.where(wide < 0, wide + extent, wide)


@op("GatherElements", wide=True)
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Take single elements along an axis."""
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


@op("GatherND com.microsoft::GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Take slices by rows of coordinates."""
    wide = indices.to(torch.int64)
    leading: list[Tensor] = []
    for axis in range(batch_dims):
        view = [1] * (indices.dim() - 1)
        view[axis] = -1
        leading.append(torch.arange(x.shape[axis]).reshape(view))
    return x[(*leading, *(wide[..., i] for i in range(indices.shape[-1])))]


_REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


@op("ScatterElements Scatter", wide=True)
def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: Reduction = "none"
) -> Tensor:
    """Put single elements along an axis, or combine them with what is there."""
    wide = _positive(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, wide, updates)
    return torch.scatter_reduce(x, axis, wide, updates, _REDUCTIONS[reduction])


@op("ScatterND", wide=True)
def scatter_nd(
    x: Tensor, indices: Tensor, updates: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    """Put slices by rows of coordinates, or combine them with what is there."""
    depth = indices.shape[-1]
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis in range(depth):
        place = place * x.shape[axis] + _positive(indices[..., axis], x.shape[axis])
    inner = list(x.shape[depth:])
    flat = x.reshape([-1, *inner])
    rows = updates.reshape([-1, *inner])
    if reduction == "none":
        return flat.index_put((place.reshape(-1),), rows).reshape(x.shape)
    view = place.reshape([-1] + [1] * len(inner)).expand(rows.shape)
    return torch.scatter_reduce(flat, 0, view, rows, _REDUCTIONS[reduction]).reshape(x.shape)


@op("TensorScatter", wide=True)
def tensor_scatter(
    past: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: Literal["linear", "circular"] = "linear",
) -> Tensor:
    """Write along an axis of a cache, from a place of each sequence on."""
    axis = axis % past.dim()
    batch, length = past.shape[0], update.shape[axis]
    begin = torch.zeros(batch, dtype=torch.int64) if write_indices is None else write_indices
    places = begin.to(torch.int64).reshape(-1, 1) + torch.arange(length)
    if mode == "circular":
        places = places.remainder(past.shape[axis])
    view = [1] * past.dim()
    view[0], view[axis] = batch, length
    return torch.scatter(past, axis, places.reshape(view).expand(update.shape), update)


@op("NonZero", wide=True)
def non_zero(x: Tensor) -> Tensor:
    """Return the coordinates of what is not 0, one row for each axis."""
    return torch.nonzero(x if x.dim() else x.reshape(1)).T


@op("Compress", wide=True)
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Keep what a condition holds for."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@op("Unique", many=True)
def unique(
    x: Tensor, *, axis: int | None = None, sorted: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what occurs, where first, which element is which, and how often."""
    dim = 0 if axis is None else axis
    rows = x.reshape(-1) if axis is None else x
    # PyTorch's own result has no gradient.
    _, inverse, counts = torch.unique(
        rows.detach(), return_inverse=True, return_counts=True, dim=dim
    )
    inverse = inverse.reshape(-1)
    order = torch.arange(inverse.shape[0])
    first = torch.full((counts.shape[0],), inverse.shape[0], dtype=torch.int64)
    first = first.scatter_reduce(0, inverse, order, "amin")
    if not sorted:
        by_place = torch.argsort(first)
        first, counts = first[by_place], counts[by_place]
        inverse = torch.argsort(by_place)[inverse]
    return rows.index_select(dim, first), first, inverse, counts


@op("ReverseSequence", wide=True)
def reverse_sequence(
    x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """Turn the first elements of each sequence around."""
    steps = torch.arange(x.shape[time_axis]).reshape(1, -1)
    ends = lengths.reshape(-1, 1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    view = [1] * x.dim()
    view[batch_axis], view[time_axis] = places.shape
    places = places if batch_axis < time_axis else places.T
    return torch.gather(x, time_axis, places.reshape(view).expand(x.shape))


@op("TopK", many=True, values=(1,))
def top_k(
    x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the greatest or least elements and their places; the first of equal ones first."""
    count = k[0] if isinstance(k, list) else k
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@op("NonMaxSuppression")
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Return (batch, class, box) of the boxes that no better one covers."""
    limit = 0 if most is None else int(most)
    bound = 0.0 if overlap is None else float(overlap)
    found = []
    for batch in range(boxes.shape[0]):
        low, high = _corners(boxes[batch], center_point_box)
        for kind in range(scores.shape[1]):
            row = scores[batch, kind]
            order = torch.argsort(row, descending=True, stable=True)
            if least is not None:
                order = order[row[order] > least.reshape(())]
            kept: list[int] = []
            for index in order.tolist():
                if len(kept) >= limit:
                    break
                if all(_overlap(low, high, index, other) <= bound for other in kept):
                    kept.append(index)
            found += [[batch, kind, index] for index in kept]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, center: int) -> tuple[Tensor, Tensor]:
    first, second = boxes[:, :2], boxes[:, 2:]
    if center:
        return first - second / 2, first + second / 2
    return torch.minimum(first, second), torch.maximum(first, second)


def _overlap(low: Tensor, high: Tensor, a: int, b: int) -> float:
    """Return the intersection over union of two boxes."""
    both = (torch.minimum(high[a], high[b]) - torch.maximum(low[a], low[b])).clamp(min=0).prod()
    areas = (high[a] - low[a]).prod() + (high[b] - low[b]).prod()
    return float(both / (areas - both)) if float(both) > 0 else 0.0
