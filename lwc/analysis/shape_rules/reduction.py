"""Reductions and the normalisations that return statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from lwc.analysis.shape_rules.elementwise import in_range, object_array
from lwc.analysis.shape_rules.registry import (
    Fact,
    Outcome,
    Site,
    SymbolicArray,
    axis_of,
    is_integer_type,
    rule,
)
from lwc.core.dims import DimShape, add, maximum, minimum, multiply

__all__: list[str] = []

_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare
"""

_FOLDS: dict[str, tuple[Callable[[Any, Any], Any], int | None]] = {
    "ReduceProd": (multiply, 1),
    "ReduceSum": (add, 0),
    "ReduceMax": (maximum, None),
    "ReduceMin": (minimum, None),
}


@rule(_REDUCTIONS)
def _reduce(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    keep = site.attribute("keepdims", 1) == 1
    axes = site.axes(1)
    if source is None:
        whole = axes == [] and not site.attribute("noop_with_empty_axes", 0) and not keep
        return Fact(dtype, () if whole else None)
    if axes is None:
        return Fact(dtype, site.fresh_shape(len(source)) if keep else None)
    if not axes:
        if site.attribute("noop_with_empty_axes", 0):
            return Fact(dtype, source)
        axes = list(range(len(source)))
    places = {axis_of(axis, len(source)) for axis in axes}
    shape = _reduced(source, places, keep)
    return Fact(dtype, shape, _folded(site, shape, len(places)))


def _reduced(source: DimShape, places: set[int], keep: bool) -> DimShape:
    if keep:
        return tuple(1 if axis in places else dim for axis, dim in enumerate(source))
    return tuple(dim for axis, dim in enumerate(source) if axis not in places)


def _folded(site: Site, shape: DimShape, axes: int) -> SymbolicArray | None:
    """Fold a small integer tensor that is reduced over every axis."""
    known, dtype = site.known(0), site.dtype(0)
    fold = _FOLDS.get(site.node.op_type)
    if known is None or fold is None or dtype is None or not is_integer_type(dtype):
        return None
    if axes != known.ndim or dtype == ir.DataType.BOOL:
        return None
    combine, start = fold
    total: Any = start
    elements = list(known.flat)
    if total is None:
        if not elements:
            return None
        total, elements = elements[0], elements[1:]
    for element in elements:
        total = combine(total, element)
    result = object_array(total)
    return result.reshape([1] * len(shape)) if in_range(result, dtype) else None


@rule("ArgMax ArgMin")
def _arg_extreme(site: Site) -> Outcome:
    source = site.shape(0)
    if source is None:
        return Fact(ir.DataType.INT64)
    axis = axis_of(site.attribute("axis", 0), len(source))
    return Fact(ir.DataType.INT64, _reduced(source, {axis}, site.attribute("keepdims", 1) == 1))


@rule("LayerNormalization")
def _layer_norm(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    statistics = ir.DataType(site.attribute("stash_type", 1))
    shape = None
    if source is not None:
        axis = axis_of(site.attribute("axis", -1), len(source))
        shape = _reduced(source, set(range(axis, len(source))), keep=True)
    return [Fact(dtype, source), Fact(statistics, shape), Fact(statistics, shape)]


@rule("RMSNormalization")
def _rms_norm(site: Site) -> Outcome:
    return Fact(site.dtype(1), site.shape(0))


@rule("BatchNormalization")
def _batch_norm(site: Site) -> Outcome:
    channels = site.shape(3)
    return [
        Fact(site.dtype(0), site.shape(0)),
        Fact(site.dtype(3), channels),
        Fact(site.dtype(3), channels),
    ]
