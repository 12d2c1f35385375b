"""Pools, and sampling of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lwc.backends.fx.ops.rounding import in_single, rounded_to
from lwc.backends.fx.ops.windows import AutoPad, padded, pads_of
from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor

_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Windows:
    """The windows of a pool: how much lies around x, and how many fit."""

    def __init__(
        self,
        x: Tensor,
        kernel: Sequence[int],
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        auto_pad: AutoPad,
        ceil_mode: int,
    ) -> None:
        rank = x.dim() - 2
        self.kernel = list(kernel)
        self.strides = list(strides or [1] * rank)
        self.dilations = list(dilations or [1] * rank)
        extents = x.shape[2:]
        self.before, self.after = pads_of(
            extents, kernel, self.strides, self.dilations, pads, auto_pad
        )
        self.beyond = [0] * rank
        if ceil_mode:
            for axis, extent in enumerate(extents):
                span = (self.kernel[axis] - 1) * self.dilations[axis] + 1
                room = extent + self.before[axis] + self.after[axis] - span
                step = self.strides[axis]
                count = (room + step - 1) // step + 1
                if (count - 1) * step >= extent + self.before[axis]:
                    count -= 1  # no window starts in the pad at the end
                self.beyond[axis] = torch.sym_max((count - 1) * step - room, 0)

    def spread(self, x: Tensor, value: float, *, beyond: bool = True) -> Tensor:
        """Return x with the pads."""
        after = [a + b * beyond for a, b in zip(self.after, self.beyond, strict=True)]
        return padded(x, self.before, after, value)

    def cut(self, x: Tensor) -> Tensor:
        """Return the windows of a padded x: `[..., positions, taps]`."""
        rank = len(self.kernel)
        for axis in range(rank):
            span = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            x = x.unfold(2 + axis, span, self.strides[axis])
            x = x[..., :: self.dilations[axis]]
        return x.flatten(x.dim() - rank)


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    outputs: int = 1,
) -> Any:
    """Return the greatest of each window; the second output is where it lies in x."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if not x.is_floating_point():
        return _integer_max(x, windows)
    spread = windows.spread(x, -math.inf)
    rank = x.dim() - 2
    found = _MAX[rank](
        spread,
        windows.kernel,
        windows.strides,
        0,
        windows.dilations,
        return_indices=outputs > 1,
    )
    if outputs == 1:
        return found
    y, places = found
    return y, _unpadded(places, x, spread.shape[2:], windows.before, storage_order)


def _integer_max(x: Tensor, windows: _Windows) -> Tensor:
    return windows.cut(windows.spread(x, torch.iinfo(x.dtype).min)).amax(-1)


def _unpadded(
    places: Tensor, x: Tensor, extents: Sequence[int], before: Sequence[int], column_major: int
) -> Tensor:
    """Turn places in a padded plane into places in the whole of x."""
    coordinates: list[Any] = []
    for extent, pad in zip(extents[::-1], before[::-1], strict=True):
        coordinates.insert(0, places % extent - pad)
        places = places // extent
    order = list(range(len(extents)))
    flat: Any = 0
    for axis in order[::-1] if column_major else order:
        flat = flat * x.shape[2 + axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(extents))
    return flat + planes * math.prod(x.shape[2:])


@op("MaxUnpool", values=(2,))
def max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: Sequence[int] | None = None,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
) -> Tensor:
    """Put elements back where MaxPool found them."""
    rank = x.dim() - 2
    steps, edges = strides or [1] * rank, pads or [0] * 2 * rank
    plain = [
        (n - 1) * s + k - edges[i] - edges[i + rank]
        for i, (n, s, k) in enumerate(zip(x.shape[2:], steps, kernel_shape, strict=True))
    ]
    whole = [*x.shape[:2], *plain]
    flat = torch.zeros(math.prod(whole), dtype=x.dtype)
    y = flat.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(whole)
    if output_shape is None:
        return y
    return padded(y, [0] * rank, [n - h for n, h in zip(output_shape[2:], plain, strict=True)])


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    """Average each window; what a window has beyond x counts for nothing unless asked for."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    wide = in_single(x)
    total = windows.cut(windows.spread(wide, 0.0)).sum(-1)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=wide.dtype)
    if count_include_pad:
        ones = padded(ones, windows.before, windows.after, 1.0)
        ones = padded(ones, [0] * len(windows.kernel), windows.beyond)
    else:
        ones = windows.spread(ones, 0.0)
    return rounded_to(total / windows.cut(ones).sum(-1), x.dtype)


@op("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    p: int = 2,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
) -> Tensor:
    """Return the norm of each window."""
    windows = _Windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    powers = windows.cut(windows.spread(in_single(x), 0.0)).abs().pow(p)
    return rounded_to(powers.sum(-1).pow(1 / p), x.dtype)


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """Average each channel."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """Return the greatest of each channel."""
    return x.amax(list(range(2, x.dim())), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """Return the norm of each channel."""
    powers = in_single(x).abs().pow(p)
    total = powers.sum(list(range(2, x.dim())), keepdim=True)
    return rounded_to(total.pow(1 / p), x.dtype)
