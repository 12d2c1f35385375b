"""Operators that move elements about without looking at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import onnx_ir as ir
import torch

from lwc.backends.fx.registry import Use, op
from lwc.core.errors import LwcError
from lwc.core.torch_types import held_as

__all__ = ["sliced"]

Tensor: TypeAlias = torch.Tensor


@op("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Return extents."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@op("Size")
def size(x: Tensor) -> Tensor:
    """Return the number of elements."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@op("Reshape", values=(1,))
def reshape(x: Tensor, dims: Sequence[int], *, allowzero: int = 0) -> Tensor:
    """Give other extents: -1 is what is left, 0 the extent as it was unless `allowzero`."""
    if not allowzero:
        dims = [
            x.shape[axis] if isinstance(dim, int) and dim == 0 else dim
            for axis, dim in enumerate(dims)
        ]
    return x.reshape(list(dims))


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Make a matrix: the axes before `axis`, and those from it on."""
    if axis < 0:
        axis += x.dim()
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permute axes; reverse them by default."""
    return x.permute(list(range(x.dim()))[::-1] if perm is None else list(perm))


@op("Squeeze", values=(1,))
def squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Drop axes of extent 1; all of them where none is named, as ONNX Runtime does."""
    return torch.squeeze(x, tuple(axes)) if axes else torch.squeeze(x)


@op("Unsqueeze", values=(1,))
def unsqueeze(x: Tensor, axes: Sequence[int] | int) -> Tensor:
    """Insert axes of extent 1."""
    places = [axes] if isinstance(axes, int) else axes
    rank = x.dim() + len(places)
    for axis in sorted(axis % rank for axis in places):
        x = x.unsqueeze(axis)
    return x


@op("Concat")
def concat(*values: Tensor, axis: int) -> Tensor:
    """Join along an axis."""
    return torch.cat(values, dim=axis)


@op("Split", values=(1,), many=True, extra=lambda use: {"parts": use.outputs})
def split(
    x: Tensor,
    split: Sequence[int] | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    parts: int,
) -> tuple[Tensor, ...]:
    """Cut along an axis, into even parts unless sizes are given."""
    if split is None:
        count = num_outputs or parts
        length = (x.shape[axis] + count - 1) // count
        split = [length] * (count - 1) + [x.shape[axis] - length * (count - 1)]
    return tuple(torch.split(x, list(split), dim=axis))


def sliced(x: Tensor, axis: int, start: int, stop: int, step: int) -> Tensor:
    """Cut one axis as ONNX does, backwards too."""
    if step > 0:
        return x[(slice(None),) * (axis % x.dim()) + (slice(start, stop, step),)]
    extent = x.shape[axis]
    last = extent - 1
    # Where Python takes nothing from a start before the first element, ONNX takes the first.
    start = _bounded(start + extent if start < 0 else start, torch.sym_min(last, 0), last)
    stop = _bounded(stop + extent if stop < 0 else stop, -1, start)
    places = torch.arange(start, stop, step, device=x.device)
    return x.index_select(axis, places)


def _bounded(value: Any, low: Any, high: Any) -> Any:
    """Bound an integer that may be a symbol.

    Python's own max and min of symbols go wrong inside of torch.cond (PyTorch 2.13).
    """
    return torch.sym_max(torch.sym_min(value, high), low)


@op("Slice", values=(1, 2, 3, 4), wide=True)
def slice_(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Cut axes."""
    for index, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        axis = index if axes is None else axes[index]
        x = sliced(x, axis, start, stop, 1 if steps is None else steps[index])
    return x


@op("Expand", values=(1,))
def expand(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Repeat axes of extent 1, and put axes in front."""
    own = [1] * (len(dims) - x.dim()) + list(x.shape)
    wanted = [1] * (len(own) - len(dims)) + list(dims)
    return x.expand([
        have if isinstance(want, int) and want == 1 else want
        for have, want in zip(own, wanted, strict=True)
    ])  # fmt: skip


@op("Tile", values=(1,))
def tile(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeat each axis."""
    return x.repeat(list(repeats))


@op("Pad", values=(1, 3), since=11, wide=True)
def pad(
    x: Tensor,
    pads: Sequence[int],
    value: Tensor | None = None,
    axes: Sequence[int] | None = None,
    *,
    mode: Literal["constant", "edge", "reflect", "wrap"] = "constant",
) -> Tensor:
    """Add elements around; a negative number takes some away."""
    places = [axis % x.dim() for axis in axes] if axes is not None else list(range(x.dim()))
    for index, axis in enumerate(places):
        before, after = pads[index], pads[index + len(places)]
        if isinstance(before, int) and isinstance(after, int) and before == after == 0:
            continue
        if mode == "constant":
            fill = 0 if value is None else value
            x = _filled(x, axis, before, after, fill)
        else:
            x = _mirrored(x, axis, before, after, mode)
    return x


def _filled(x: Tensor, axis: int, before: int, after: int, value: Any) -> Tensor:
    pieces = []
    for count in (before, after):
        dims = list(x.shape)
        dims[axis] = torch.sym_max(count, 0)
        piece = torch.zeros(dims, dtype=x.dtype, device=x.device)
        pieces.append(piece if isinstance(value, int) else value.reshape(()).expand(dims))
    return torch.cat([pieces[0], _cropped(x, axis, before, after), pieces[1]], dim=axis)


def _cropped(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Take away what negative numbers ask for."""
    first, last = torch.sym_max(-before, 0), torch.sym_max(-after, 0)
    return x.narrow(axis, first, x.shape[axis] - first - last)


def _mirrored(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Repeat what is left after cropping."""
    x = _cropped(x, axis, before, after)
    extent = x.shape[axis]
    places = torch.arange(
        -torch.sym_max(before, 0), extent + torch.sym_max(after, 0), device=x.device
    )
    if isinstance(extent, int) and extent == 0 and places.numel():
        raise LwcError(f"Pad: axis {axis} has nothing left to repeat by mode '{mode}'")
    if mode == "edge":
        places = places.clamp(0, extent - 1)
    elif mode == "wrap":
        places = places.remainder(extent)
    else:
        period = torch.sym_max(2 * (extent - 1), 1)
        places = places.remainder(period)
        places = torch.minimum(places, period - places)
    return x.index_select(axis, places)


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    """Move blocks of channels into the plane."""
    batch, channels, height, width = x.shape
    size, inner = blocksize, channels // blocksize**2
    if mode == "DCR":
        x = x.reshape(batch, size, size, inner, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, inner, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, inner, height * size, width * size)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    """Move blocks of the plane into channels."""
    batch, channels, height, width = x.shape
    size = blocksize
    x = x.reshape(batch, channels, height // size, size, width // size, size)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.permute(order).reshape(batch, channels * size**2, height // size, width // size)


@op("Trilu com.microsoft::Trilu", values=(1,), wide=True)
def trilu(x: Tensor, k: int | Sequence[int] = 0, *, upper: int = 1) -> Tensor:
    """Keep a triangle."""
    diagonal = k if isinstance(k, int) else k[0]
    # Beyond the corners all diagonals are one.
    diagonal = _bounded(diagonal, -x.shape[-2], x.shape[-1])
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@op("CenterCropPad", values=(1,))
def center_crop_pad(x: Tensor, dims: Sequence[int], *, axes: Sequence[int] | None = None) -> Tensor:
    """Cut or pad to extents, evenly on both sides."""
    for axis, wanted in zip(axes or range(x.dim()), dims, strict=True):
        missing = wanted - x.shape[axis]
        before = missing // 2 if missing >= 0 else -(-missing // 2)
        x = _filled(x, axis % x.dim(), before, missing - before, 0)
    return x


@op("Col2Im", values=(1, 2))
def col2im(
    x: Tensor,
    image: Sequence[int],
    block: Sequence[int],
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Add up blocks where they lie in an image."""
    rank = len(image)
    gaps, steps = dilations or [1] * rank, strides or [1] * rank
    edges = pads or [0] * 2 * rank
    channels = x.shape[1] // math.prod(block)
    padded = [n + edges[i] + edges[i + rank] for i, n in enumerate(image)]
    places = torch.zeros([1] * (2 * rank), dtype=torch.int64)
    for axis in range(rank):
        positions = (padded[axis] - gaps[axis] * (block[axis] - 1) - 1) // steps[axis] + 1
        inner = torch.arange(block[axis]) * gaps[axis]
        outer = torch.arange(positions) * steps[axis]
        weight = math.prod(padded[axis + 1 :])
        view = [1] * (2 * rank)
        view[axis] = -1
        places = places + (inner * weight).reshape(view)
        view = [1] * (2 * rank)
        view[rank + axis] = -1
        places = places + (outer * weight).reshape(view)
    flat = torch.zeros((x.shape[0], channels, math.prod(padded)), dtype=x.dtype)
    whole = flat.index_add(2, places.reshape(-1), x.reshape(x.shape[0], channels, -1))
    whole = whole.reshape(x.shape[0], channels, *padded)
    for axis in range(rank):
        whole = whole.narrow(2 + axis, edges[axis], image[axis])
    return whole


# Making tensors


def _fill(use: Use) -> dict[str, Any]:
    tensor = use.attribute("value")
    if tensor is None:
        return {"dtype": torch.float32}
    return {"dtype": held_as(tensor.dtype)}


@op("ConstantOfShape", values=(0,), extra=_fill)
def constant_of_shape(dims: Sequence[int], *, value: Any = 0.0, dtype: torch.dtype) -> Tensor:
    """Repeat a number."""
    return torch.full(list(dims), value, dtype=dtype)


def _range_type(use: Use) -> dict[str, Any]:
    return {"dtype": held_as(use.dtype(0) or ir.DataType.FLOAT)}


@op("Range", values=(0, 1, 2), extra=_range_type, ignored="stash_type")
def range_(start: Any, limit: Any, delta: Any, *, dtype: torch.dtype) -> Tensor:
    """Count from `start` up to `limit`."""
    start, limit, delta = (v[0] if isinstance(v, list) else v for v in (start, limit, delta))
    if isinstance(start, float) or isinstance(delta, float):
        count = max(math.ceil((limit - start) / delta), 0)
        return (torch.arange(count, dtype=torch.float64) * delta + start).to(dtype)
    if all(isinstance(v, int) for v in (start, limit, delta)) and (limit - start) * delta <= 0:
        return torch.empty(0, dtype=dtype)
    return torch.arange(start, limit, delta, dtype=dtype)


@op("EyeLike", types="dtype")
def eye_like(x: Tensor, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    """Ones on a diagonal."""
    ones = torch.ones(x.shape[0], x.shape[1])
    return (torch.triu(ones, k) * torch.tril(ones, k)).to(dtype or x.dtype)


@op("OneHot", values=(1,))
def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    """Mark positions along a new axis."""
    depth = int(depth[0] if isinstance(depth, list) else depth)
    wide = indices.to(torch.int64)
    inside = (wide >= -depth) & (wide < depth)
    wide = torch.where(wide < 0, wide + depth, wide)
    marks = (wide.unsqueeze(-1) == torch.arange(depth)) & inside.unsqueeze(-1)
    place = axis if axis >= 0 else axis + indices.dim() + 1
    return torch.where(marks.movedim(-1, place), values[1], values[0])
