"""Sampling of images between pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor
Mode: TypeAlias = Literal["nearest", "linear", "cubic"]
Rounding: TypeAlias = Literal["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
Coordinates: TypeAlias = Literal[
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_crop_and_resize",
    "tf_half_pixel_for_nn",
]


@op("Resize", values=(1, 2, 3), since=11)
def resize(
    x: Tensor,
    roi: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: Coordinates = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0,
    keep_aspect_ratio_policy: Literal["stretch", "not_larger", "not_smaller"] = "stretch",
    mode: Mode = "nearest",
    nearest_mode: Rounding = "round_prefer_floor",
) -> Tensor:
    """Sample at other extents, axis by axis."""
    places = [axis % x.dim() for axis in axes] if axes else list(range(x.dim()))
    if sizes:
        wanted = list(sizes)
        factors = [n / x.shape[axis] for n, axis in zip(wanted, places, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            one = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [one] * len(places)
            wanted = [math.floor(one * x.shape[axis] + 0.5) for axis in places]
    else:
        assert scales is not None
        factors = list(scales)
        wanted = [math.floor(f * x.shape[axis]) for f, axis in zip(factors, places, strict=True)]
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    beyond: Any = None
    for index, axis in enumerate(places):
        if not crop and wanted[index] == x.shape[axis] and factors[index] == 1:
            continue
        assert not crop or roi is not None
        bounds = (roi[index], roi[index + len(places)]) if crop and roi else (0.0, 1.0)
        at = _source(
            coordinate_transformation_mode, wanted[index], x.shape[axis], factors[index], bounds
        )
        if crop:
            view = [1] * x.dim()
            view[axis] = -1
            off = ((at < 0) | (at > x.shape[axis] - 1)).reshape(view)
            beyond = off if beyond is None else beyond | off
        weights = _weights(
            at,
            x.shape[axis],
            mode,
            nearest_mode,
            cubic_coeff_a,
            exclude_outside,
            min(factors[index], 1.0) if antialias else 1.0,
        )
        x = _along(x, weights, axis)
    if beyond is not None:
        x = torch.where(beyond, torch.full_like(x, extrapolation_value), x)
    return x


def _source(
    mode: Coordinates, count: int, extent: int, factor: float, bounds: tuple[float, float]
) -> Tensor:
    """Return where the new elements lie on the old axis, in float64."""
    at = torch.arange(count, dtype=torch.float64)
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * (extent - 1) / (count - 1) if count > 1 else at * 0
    if mode == "tf_crop_and_resize":
        start, end = bounds
        if count == 1:
            return at * 0 + 0.5 * (start + end) * (extent - 1)
        return start * (extent - 1) + at * (end - start) * (extent - 1) / (count - 1)
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5) / factor
    if mode == "pytorch_half_pixel" and count == 1:
        return at * 0
    if mode == "half_pixel_symmetric":
        adjusted = count / (factor * extent)
        return extent / 2 * (1 - adjusted) + (at + 0.5) / factor - 0.5
    return (at + 0.5) / factor - 0.5


def _weights(
    at: Tensor,
    extent: int,
    mode: Mode,
    nearest: Rounding,
    coefficient: float,
    exclude_outside: int,
    shrink: float,
) -> Tensor:
    """Return how much of each old element a new one has: float64 `[count, extent]`."""
    if mode == "nearest":
        # A scale of 0.7 is one of float32: only there 3.5 / 0.7 is 5, and half between two.
        places = _nearest(at.to(torch.float32), nearest).clamp(0, extent - 1)
        return (places.unsqueeze(-1) == torch.arange(extent)).to(torch.float64)
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    taps = torch.arange(-reach, reach + 1) + at.floor().to(torch.int64).unsqueeze(-1)
    distance = (taps - at.unsqueeze(-1)).abs() * shrink
    share = (1 - distance).clamp(min=0) if mode == "linear" else _cubic(distance, coefficient)
    if exclude_outside:
        share = share * ((taps >= 0) & (taps < extent))
    share = share / share.sum(-1, keepdim=True)
    table = torch.zeros((at.shape[0], extent), dtype=torch.float64)
    return table.scatter_add(1, taps.clamp(0, extent - 1), share)


def _nearest(at: Tensor, mode: Rounding) -> Tensor:
    if mode == "floor":
        return at.floor().to(torch.int64)
    if mode == "ceil":
        return at.ceil().to(torch.int64)
    if mode == "round_prefer_ceil":
        return (at + 0.5).floor().to(torch.int64)
    return (at - 0.5).ceil().to(torch.int64)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    zero = torch.zeros_like(distance)
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, zero))


def _along(x: Tensor, weights: Tensor, axis: int) -> Tensor:
    if not x.is_floating_point():
        return _along(x.to(torch.float64), weights, axis).round().to(x.dtype)
    return torch.matmul(x.movedim(axis, -1), weights.T.to(x.dtype)).movedim(-1, axis)


@op("GridSample", since=16)
def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    mode: Literal["linear", "bilinear", "nearest", "cubic", "bicubic"] = "linear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
    align_corners: int = 0,
) -> Tensor:
    """Sample at coordinates from -1 to 1, the last axis first."""
    if mode in ("bicubic", "cubic"):
        return torch.nn.functional.grid_sample(
            x, grid, "bicubic", padding_mode, align_corners=bool(align_corners)
        )
    smooth = "nearest" if mode == "nearest" else "bilinear"
    return torch.nn.functional.grid_sample(
        x, grid, smooth, padding_mode, align_corners=bool(align_corners)
    )


@op("AffineGrid", values=(1,))
def affine_grid(theta: Tensor, size: Sequence[int], *, align_corners: int = 0) -> Tensor:
    """Return the coordinates of an image moved by a matrix."""
    return torch.nn.functional.affine_grid(theta, list(size), align_corners=bool(align_corners))


@op("RoiAlign", since=10)
def roi_align(
    x: Tensor,
    rois: Tensor,
    batches: Tensor,
    *,
    coordinate_transformation_mode: Literal["half_pixel", "output_half_pixel"] = "half_pixel",
    mode: Literal["avg", "max"] = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1,
) -> Tensor:
    """Pool samples of each cell of each region."""
    shift = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    wide = torch.promote_types(rois.dtype, torch.float32)
    results = []
    for roi, batch in zip(rois * spatial_scale - shift, batches.tolist(), strict=True):
        left, top, right, bottom = roi.unbind()
        width, height = right - left, bottom - top
        if not shift:
            width, height = width.clamp(min=1), height.clamp(min=1)
        cell_height, cell_width = height / output_height, width / output_width
        down = sampling_ratio or max(math.ceil(float(cell_height)), 1)
        across = sampling_ratio or max(math.ceil(float(cell_width)), 1)
        down_cells = torch.arange(output_height * down, dtype=wide) + 0.5
        across_cells = torch.arange(output_width * across, dtype=wide) + 0.5
        rows = top + down_cells * cell_height / down
        columns = left + across_cells * cell_width / across
        results.append(_pooled(x[batch], rows, columns, down, across, mode))
    if not results:
        return x.new_zeros((0, x.shape[1], output_height, output_width))
    return torch.stack(results)


def _pooled(
    image: Tensor, rows: Tensor, columns: Tensor, down: int, across: int, mode: str
) -> Tensor:
    corners: Any = None
    for (row, row_share), (column, column_share) in itertools.product(
        _corners(rows, image.shape[1]), _corners(columns, image.shape[2])
    ):
        part = image[:, row][:, :, column] * row_share.unsqueeze(-1) * column_share
        if corners is None:
            corners = part
        else:
            corners = torch.maximum(corners, part) if mode == "max" else corners + part
    cells = corners.unflatten(1, (-1, down)).unflatten(3, (-1, across))
    return cells.amax((2, 4)) if mode == "max" else cells.mean((2, 4))


def _corners(at: Tensor, extent: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two neighbours of each place, and how much each counts; 0 far outside."""
    inside = ((at >= -1) & (at <= extent)).to(at.dtype)
    kept = at.clamp(min=0)
    low = kept.detach().floor().to(torch.int64).clamp(max=extent - 1)
    high = (low + 1).clamp(max=extent - 1)
    share = torch.where(low >= extent - 1, torch.zeros_like(kept), kept - low)
    return [(low, (1 - share) * inside), (high, share * inside)]
