"""Reductions, and what else works along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.ops.rounding import in_single, rounded_to
from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor
Axes: TypeAlias = "Sequence[int] | int | None"


def _axes(x: Tensor, axes: Axes) -> list[int]:
    if isinstance(axes, int):
        return [axes]
    return list(axes) if axes else list(range(x.dim()))


def _idle(axes: Axes, noop: int) -> bool:
    return bool(noop) and (axes is None or axes == [])


def _is_empty(x: Tensor, axes: list[int]) -> bool:
    """Tell whether nothing is reduced, as far as extents are numbers."""
    return any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes)


@op("ReduceSum", values=(1,), wide=True)
def reduce_sum(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Add."""
    if _idle(axes, noop_with_empty_axes):
        return x
    return torch.sum(x, _axes(x, axes), keepdim=bool(keepdims), dtype=x.dtype)


@op("ReduceMean", values=(1,))
def reduce_mean(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Average; integers toward zero. Of nothing it is 0."""
    if _idle(axes, noop_with_empty_axes):
        return x
    places = _axes(x, axes)
    if _is_empty(x, places):
        return torch.sum(x, places, keepdim=bool(keepdims), dtype=x.dtype)
    if x.is_floating_point():
        return torch.mean(x, places, keepdim=bool(keepdims))
    total = torch.sum(x, places, keepdim=bool(keepdims))
    count = math.prod(x.shape[axis] for axis in places)
    return torch.div(total, count, rounding_mode="trunc").to(x.dtype)


@op("ReduceMax", values=(1,), wide=True)
def reduce_max(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the greatest."""
    if _idle(axes, noop_with_empty_axes):
        return x
    return _extreme(torch.amax, x, _axes(x, axes), bool(keepdims), lowest=True)


@op("ReduceMin", values=(1,), wide=True)
def reduce_min(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the least."""
    if _idle(axes, noop_with_empty_axes):
        return x
    return _extreme(torch.amin, x, _axes(x, axes), bool(keepdims), lowest=False)


def _extreme(reduce: Any, x: Tensor, axes: list[int], keep: bool, *, lowest: bool) -> Tensor:
    if not _is_empty(x, axes):
        return reduce(x, axes, keepdim=keep)
    if x.is_floating_point():
        bound: Any = -math.inf if lowest else math.inf
    elif x.dtype == torch.bool:
        bound = not lowest
    else:
        limits = torch.iinfo(x.dtype)
        bound = limits.min if lowest else limits.max
    # The sum of nothing has the shape of the result.
    return torch.full_like(
        torch.sum(x.detach(), axes, keepdim=keep, dtype=torch.int64), bound, dtype=x.dtype
    )


@op("ReduceProd", values=(1,), wide=True)
def reduce_prod(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Multiply."""
    if _idle(axes, noop_with_empty_axes):
        return x
    y = in_single(x)
    for axis in sorted((a % max(x.dim(), 1) for a in _axes(x, axes)), reverse=True):
        y = torch.prod(y, axis, keepdim=bool(keepdims), dtype=y.dtype)
    return rounded_to(y, x.dtype)


@op("ReduceL1", values=(1,), wide=True)
def reduce_l1(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Add magnitudes."""
    if _idle(axes, noop_with_empty_axes):
        return x.abs()
    return torch.sum(x.abs(), _axes(x, axes), keepdim=bool(keepdims), dtype=x.dtype)


@op("ReduceL2", values=(1,), wide=True)
def reduce_l2(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the Euclidean norm."""
    if _idle(axes, noop_with_empty_axes):
        return x.abs()
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, _axes(x, axes), keepdim=bool(keepdims))
    wide = x.to(torch.float64)
    return torch.linalg.vector_norm(wide, 2, _axes(x, axes), keepdim=bool(keepdims)).to(x.dtype)


@op("ReduceSumSquare", values=(1,), wide=True)
def reduce_sum_square(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Add squares."""
    if _idle(axes, noop_with_empty_axes):
        return x * x
    return torch.sum(x * x, _axes(x, axes), keepdim=bool(keepdims), dtype=x.dtype)


@op("ReduceLogSum", values=(1,))
def reduce_log_sum(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the logarithm of the sum; that of integers is cut toward zero."""
    total = in_single(x) if x.is_floating_point() else x.to(torch.float64)
    if not _idle(axes, noop_with_empty_axes):
        total = torch.sum(total, _axes(x, axes), keepdim=bool(keepdims))
    return total.log().to(x.dtype)


@op("ReduceLogSumExp", values=(1,))
def reduce_log_sum_exp(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Return the logarithm of the sum of exponentials.

    ONNX Runtime takes exponentials of integers less the greatest as integers: 1 for that, else 0.
    """
    if _idle(axes, noop_with_empty_axes):
        return x
    places = _axes(x, axes)
    if x.is_floating_point():
        return torch.logsumexp(x, places, keepdim=bool(keepdims))
    top = _extreme(torch.amax, x, places, True, lowest=True)
    count = torch.sum(x == top, places, keepdim=True, dtype=torch.float64)
    y = (top + count.log()).to(x.dtype)
    return y if keepdims else torch.sum(y, places, dtype=y.dtype)


@op("ArgMax", wide=True)
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Return the place of the greatest, the first or the last of equal ones."""
    return _place(torch.argmax, x, axis, bool(keepdims), select_last_index)


@op("ArgMin", wide=True)
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Return the place of the least, the first or the last of equal ones."""
    return _place(torch.argmin, x, axis, bool(keepdims), select_last_index)


def _place(find: Any, x: Tensor, axis: int, keep: bool, last: int) -> Tensor:
    if not last:
        return find(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)


@op("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Exponentials that add up to 1."""
    return torch.softmax(x, axis)


@op("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return the logarithm of Softmax."""
    return torch.log_softmax(x, axis)


@op("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Mark the first greatest by 1, all else by 0."""
    place = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, place, 1.0)


@op("Hardmax")
def hardmax_of_rows(x: Tensor, *, axis: int = 1) -> Tensor:
    """Mark the first greatest of all axes from `axis` on by 1, all else by 0."""
    return _softmax_of_rows(x, axis, lambda rows, last: hardmax(rows, axis=last))


def _softmax_of_rows(x: Tensor, axis: int, function: Any) -> Tensor:
    rows = x.reshape(math.prod(x.shape[: axis % x.dim()]), -1)
    return function(rows, 1).reshape(x.shape)


@op("Softmax")
def softmax_of_rows(x: Tensor, *, axis: int = 1) -> Tensor:
    """Exponentials that add up to 1 over all axes from `axis` on."""
    return _softmax_of_rows(x, axis, torch.softmax)


@op("LogSoftmax")
def log_softmax_of_rows(x: Tensor, *, axis: int = 1) -> Tensor:
    """Return the logarithm of Softmax over all axes from `axis` on."""
    return _softmax_of_rows(x, axis, torch.log_softmax)


@op("CumSum", values=(1,), wide=True)
def cum_sum(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Add up along an axis."""
    return _scan(torch.cumsum, x, axis, exclusive, reverse, 0)


@op("CumProd", values=(1,), wide=True)
def cum_prod(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Multiply along an axis."""
    return _scan(torch.cumprod, x, axis, exclusive, reverse, 1)


def _scan(scan: Any, x: Tensor, axis: Any, exclusive: int, reverse: int, neutral: int) -> Tensor:
    axis = axis[0] if isinstance(axis, list) else axis
    if reverse:
        x = x.flip(axis)
    if exclusive:
        dims = list(x.shape)
        dims[axis] = 1
        x = torch.cat([x.new_full(dims, neutral), x], dim=axis).narrow(axis, 0, x.shape[axis])
    y = scan(x, axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y
