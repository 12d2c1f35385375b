"""Operators that make tensors: from shapes, from nothing, and from what elements hold."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from lwc.analysis.shape_rules.elementwise import object_array
from lwc.analysis.shape_rules.registry import (
    Fact,
    Misfit,
    Outcome,
    Site,
    array_of,
    axis_of,
    element_count,
    extent,
    is_integer_type,
    rule,
    static_size,
    tensor_fact,
    trackable,
)
from lwc.core.dims import DimShape, ceil_div, maximum, subtract

__all__: list[str] = []


@rule("Shape")
def _shape(site: Site) -> Outcome:
    source = site.shape(0)
    if source is None:
        return Fact(ir.DataType.INT64, (site.fresh(),))
    part = source[slice(site.attribute("start", 0), site.attribute("end"))]
    return Fact(ir.DataType.INT64, (len(part),), array_of(part))


@rule("Size")
def _size_of(site: Site) -> Outcome:
    source = site.shape(0)
    return Fact(
        ir.DataType.INT64, (), None if source is None else object_array(element_count(source))
    )


@rule("Constant")
def _constant(site: Site) -> Outcome:
    node = site.node
    tensor = site.attribute("value")
    if tensor is not None:
        return tensor_fact(tensor)
    for name, dtype in _CONSTANT_KINDS.items():
        given = site.attribute(name)
        if given is None:
            continue
        if not isinstance(given, tuple | list):
            array = object_array(given)
            return Fact(dtype, (), None if dtype == ir.DataType.STRING else array)
        small = dtype != ir.DataType.STRING and trackable(dtype, len(given))
        return Fact(dtype, (len(given),), array_of(list(given)) if small else None)
    value = node.outputs[0]
    return Fact(value.dtype, None)


_CONSTANT_KINDS = {
    "value_int": ir.DataType.INT64,
    "value_ints": ir.DataType.INT64,
    "value_float": ir.DataType.FLOAT,
    "value_floats": ir.DataType.FLOAT,
    "value_string": ir.DataType.STRING,
    "value_strings": ir.DataType.STRING,
}


@rule("ConstantOfShape")
def _constant_of_shape(site: Site) -> Outcome:
    tensor = site.attribute("value")
    dtype = ir.DataType.FLOAT if tensor is None else tensor.dtype
    target = site.known(0)
    if target is None:
        length = site.shape(0)
        rank = length[0] if length and isinstance(length[0], int) else None
        return Fact(dtype, None if rank is None else site.fresh_shape(rank))
    shape = tuple(extent(site, element) for element in target.tolist())
    size = static_size(shape)
    if size is None or not trackable(dtype, size):
        return Fact(dtype, shape)
    fill = 0.0 if tensor is None else tensor.numpy().ravel().tolist()[0]
    return Fact(dtype, shape, array_of([fill] * size, [int(d) for d in shape]))


@rule("Range")
def _range(site: Site) -> Outcome:
    dtype = site.dtype(0)
    bounds = [site.known(index) for index in range(3)]
    if any(bound is None or bound.size != 1 for bound in bounds):
        return Fact(dtype, (site.fresh(),))
    start, limit, delta = (_integral(bound.item()) for bound in bounds if bound is not None)
    if delta == 0:
        raise Misfit("the step of a range is 0")
    if all(isinstance(element, int) for element in (start, limit, delta)):
        span = range(start, limit, delta)
        integral = is_integer_type(dtype) and trackable(dtype, len(span))
        return Fact(dtype, (len(span),), array_of(list(span)) if integral else None)
    bound = (start, limit)
    if not isinstance(delta, int) or any(isinstance(element, float) for element in bound):
        return Fact(dtype, (site.fresh(),))
    if any(site.shapes.is_unknown(e) or not _is_whole(e) for e in bound):
        return Fact(dtype, (site.fresh(),))
    span_length = subtract(limit, start) if delta > 0 else subtract(start, limit)
    return Fact(dtype, (ceil_div(maximum(0, span_length), abs(delta)),))


@rule("OneHot")
def _one_hot(site: Site) -> Outcome:
    indices, depth = site.shape(0), site.known(1)
    dtype = site.dtype(2)
    if indices is None:
        return Fact(dtype)
    axis = axis_of(site.attribute("axis", -1), len(indices) + 1)
    size = site.fresh() if depth is None else extent(site, _integral(depth.item()))
    return Fact(dtype, (*indices[:axis], size, *indices[axis:]))


def _integral(element: Any) -> Any:
    """Return a whole float as int, anything else as it is."""
    return int(element) if isinstance(element, float) and element.is_integer() else element


def _is_whole(element: Any) -> bool:
    return isinstance(element, int) or bool(element.is_integer)


@rule("NonZero")
def _nonzero(site: Site) -> Outcome:
    source = site.shape(0)
    # Of a scalar ONNX makes no rows and ONNX Runtime one.
    rank = len(source) if source else site.fresh()
    return Fact(ir.DataType.INT64, (rank, site.fresh()))


@rule("Unique")
def _unique(site: Site) -> Outcome:
    source, axis, count = site.shape(0), site.attribute("axis"), site.fresh()
    shape: DimShape | None = (count,)
    if axis is not None:
        if source is None:
            shape = None
        else:
            axis = axis_of(axis, len(source))
            shape = (*source[:axis], count, *source[axis + 1 :])
    int64 = ir.DataType.INT64
    inverse = (site.fresh(),)
    if source is not None:
        inverse = (element_count(source) if axis is None else source[axis],)
    return [
        Fact(site.dtype(0), shape),
        Fact(int64, (count,)),
        Fact(int64, inverse),
        Fact(int64, (count,)),
    ]


@rule("TopK")
def _top_k(site: Site) -> Outcome:
    source, k = site.shape(0), site.known(1)
    if source is None:
        return [Fact(site.dtype(0)), Fact(ir.DataType.INT64)]
    axis = axis_of(site.attribute("axis", -1), len(source))
    count = site.fresh() if k is None else extent(site, k.item())
    shape = (*source[:axis], count, *source[axis + 1 :])
    return [Fact(site.dtype(0), shape), Fact(ir.DataType.INT64, shape)]
