"""Operators that move data: reshaping, joining, cutting, and indexing by axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.analysis.shape_rules.elementwise import object_array
from lwc.analysis.shape_rules.registry import (
    Fact,
    Misfit,
    Outcome,
    Site,
    SymbolicArray,
    array_of,
    axis_of,
    extent,
    is_integer_type,
    rule,
    static_size,
    tensor_fact,
    trackable,
)
from lwc.core.dims import (
    Dim,
    DimShape,
    add,
    at_least,
    ceil_div,
    maximum,
    minimum,
    multiply,
    product,
    quotient,
    subtract,
)

__all__ = ["content_or_anything", "slice_extent"]


@rule("Reshape")
def _reshape(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    target = site.known(1)
    if target is None:
        length = site.shape(1)
        rank = length[0] if length and isinstance(length[0], int) else None
        return Fact(dtype, None if rank is None else site.fresh_shape(rank))
    shape = _reshaped(site, source, target.tolist())
    return Fact(dtype, shape, _relaid(site.known(0), shape))


def _reshaped(site: Site, source: DimShape | None, target: list[Any]) -> DimShape:
    """Return the shape Reshape gives for `target`, -1 and 0 resolved where they can be."""
    copies = not site.attribute("allowzero", 0)
    shape: list[Dim | None] = []
    for axis, element in enumerate(target):
        if isinstance(element, int):
            if element == 0 and copies:
                if source is not None and axis >= len(source):
                    raise Misfit("a 0 in the target shape lies outside the input's rank")
                shape.append(site.fresh() if source is None else source[axis])
            else:
                shape.append(None if element == -1 else extent(site, element))
        elif site.shapes.is_unknown(element) or not _is_extent(element):
            shape.append(None)
        else:
            shape.append(element)
    open_axes = [axis for axis, dim in enumerate(shape) if dim is None]
    if not open_axes:
        return tuple(dim for dim in shape if dim is not None)
    rest = product(dim for dim in shape if dim is not None)
    if len(open_axes) > 1 or source is None or rest == 0:
        return tuple(site.fresh() if dim is None else dim for dim in shape)
    return tuple(_missing_factor(site, source, shape) if dim is None else dim for dim in shape)


def _is_extent(element: Any) -> bool:
    """Tell whether a Reshape target is an extent and cannot be -1: it is provably above that."""
    return at_least(element, 0)


def _missing_factor(site: Site, source: DimShape, shape: list[Dim | None]) -> Dim:
    """Return product(source) / product of the known extents, equal ones struck out first."""
    over = list(source)
    under: list[Dim] = []
    for dim in shape:
        if dim is None:
            continue
        match = next((i for i, other in enumerate(over) if other is dim or other == dim), None)
        if match is None:
            under.append(dim)
        else:
            over.pop(match)
    numerator, denominator = product(over), product(under)
    if isinstance(numerator, int) and isinstance(denominator, int):
        if denominator == 0 or numerator % denominator:
            raise Misfit(f"{numerator} elements do not divide by {denominator}")
        return numerator // denominator
    return quotient(numerator, denominator)


def _relaid(known: SymbolicArray | None, shape: DimShape | None) -> SymbolicArray | None:
    """Give content another static shape of the same size."""
    if known is None or shape is None or static_size(shape) != known.size:
        return None
    return known.reshape(shape)


@rule("Flatten")
def _flatten(site: Site) -> Outcome:
    shape = site.shape(0)
    if shape is None:
        return Fact(site.dtype(0), site.fresh_shape(2))
    axis = site.attribute("axis", 1)
    axis = axis if axis == len(shape) else axis_of(axis, len(shape))
    result = (_size(shape[:axis]), _size(shape[axis:]))
    return Fact(site.dtype(0), result, _relaid(site.known(0), result))


def _sum(dims: list[Dim]) -> Dim:
    total: Dim = 0
    for dim in dims:
        total = add(total, dim)
    return total


def _size(dims: DimShape) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = multiply(total, dim)
    return total


@rule("Unsqueeze")
def _unsqueeze(site: Site) -> Outcome:
    source, axes = site.shape(0), site.axes(1)
    if source is None:
        return Fact(site.dtype(0))
    if axes is None:
        given = site.shape(1)
        count = given[0] if given else 1
        rank = len(source) + count if isinstance(count, int) else None
        return Fact(site.dtype(0), None if rank is None else site.fresh_shape(rank))
    rank = len(source) + len(axes)
    places = {axis_of(axis, rank) for axis in axes}
    if len(places) != len(axes):
        raise Misfit("an axis is named twice")
    remaining = iter(source)
    shape = tuple(1 if axis in places else next(remaining) for axis in range(rank))
    return Fact(site.dtype(0), shape, _relaid(site.known(0), shape))


@rule("Squeeze")
def _squeeze(site: Site) -> Outcome:
    source, axes = site.shape(0), site.axes(1)
    if source is None or axes is None:
        return Fact(site.dtype(0))
    if axes:
        places = {axis_of(axis, len(source)) for axis in axes}
    elif all(isinstance(dim, int) or at_least(dim, 2) for dim in source):
        places = {axis for axis, dim in enumerate(source) if isinstance(dim, int) and dim == 1}
    else:
        return Fact(site.dtype(0))
    shape = tuple(dim for axis, dim in enumerate(source) if axis not in places)
    return Fact(site.dtype(0), shape, _relaid(site.known(0), shape))


@rule("Transpose")
def _transpose(site: Site) -> Outcome:
    source = site.shape(0)
    order = site.attribute("perm")
    if source is None:
        return Fact(site.dtype(0), None if order is None else site.fresh_shape(len(order)))
    order = tuple(range(len(source)))[::-1] if order is None else tuple(order)
    if sorted(order) != list(range(len(source))):
        raise Misfit(f"perm {list(order)} does not permute {len(source)} axes")
    known = site.known(0)
    moved = None if known is None else known.transpose(order)
    return Fact(site.dtype(0), tuple(source[axis] for axis in order), moved)


@rule("Concat")
def _concat(site: Site) -> Outcome:
    facts = [fact for fact in site.inputs if fact is not None]
    dtype = facts[0].dtype
    shapes = [fact.shape for fact in facts if fact.shape is not None]
    if not shapes:
        return Fact(dtype)
    rank = len(shapes[0])
    axis = axis_of(site.attribute("axis", 0), rank)
    if any(len(shape) != rank for shape in shapes):
        raise Misfit("the inputs differ in rank")
    result = list(shapes[0])
    for shape in shapes[1:]:
        for place in range(rank):
            if place != axis:
                result[place] = site.same(result[place], shape[place])
            else:
                result[axis] = add(result[axis], shape[axis])
    if len(shapes) < len(facts):
        result[axis] = site.fresh()
        return Fact(dtype, tuple(result))
    known = None
    size = static_size(tuple(result))
    if size is not None and trackable(dtype, size) and any(f.known is not None for f in facts):
        parts = [content_or_anything(site, fact) for fact in facts]
        if all(part is not None for part in parts):
            known = np.concatenate([p for p in parts if p is not None], axis=axis)
    return Fact(dtype, tuple(result), known)


def content_or_anything(site: Site, fact: Fact) -> SymbolicArray | None:
    """Return content, that of an integer tensor not followed as symbols that say nothing."""
    if fact.known is not None:
        return fact.known
    size = static_size(fact.shape)
    integral = fact.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    if size is None or not integral or not trackable(fact.dtype, size) or fact.shape is None:
        return None
    return array_of([site.anything() for _ in range(size)], fact.shape)


@rule("Split")
def _split(site: Site) -> Outcome:
    source, dtype, parts = site.shape(0), site.dtype(0), site.outputs
    if source is None:
        return [Fact(dtype)] * parts
    axis = axis_of(site.attribute("axis", 0), len(source))
    whole = source[axis]
    sizes: list[Dim]
    given = site.attribute("split")
    if site.has(1) or given is not None:
        known = site.known(1) if site.has(1) else array_of(list(given))
        if known is None:
            sizes = [site.fresh() for _ in range(parts)]
        else:
            sizes = [extent(site, element) for element in known.tolist()]
    else:
        count = site.attribute("num_outputs", parts)
        chunk = ceil_div(whole, count)
        # All chunks but the last are full: where that does not fit, the runtime refuses.
        sizes = [chunk] * (count - 1) + [subtract(whole, multiply(chunk, count - 1))]
    if len(sizes) != parts:
        raise Misfit(f"{len(sizes)} sizes for {parts} outputs")
    total = _sum(sizes)
    if isinstance(total, int) and isinstance(whole, int) and total != whole:
        raise Misfit(f"the pieces add up to {total}, the axis has {whole}")
    content = site.known(0)
    facts, start = [], 0
    for size in sizes:
        shape = (*source[:axis], size, *source[axis + 1 :])
        piece = None
        if content is not None and isinstance(size, int):
            piece = np.take(content, range(start, start + size), axis)
            start += size
        else:
            content = None
        facts.append(Fact(dtype, shape, piece))
    return facts


@rule("Slice")
def _slice(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    if source is None:
        return Fact(dtype)
    starts, ends = _bounds(site, 1, "starts"), _bounds(site, 2, "ends")
    count = len(starts) if starts is not None else len(ends) if ends is not None else None
    axes = site.axes(3)
    if axes == [] and not site.has(3) and count is not None:
        axes = list(range(count))
    if axes is None or count is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    given = site.known(4)
    steps = None if given is None else given.tolist()
    if not site.has(4):
        steps = [1] * len(axes)
    shape = list(source)
    content = site.known(0)
    for place, named in enumerate(axes):
        axis = axis_of(named, len(source))
        step = None if steps is None else steps[place]
        if starts is None or ends is None or not isinstance(step, int):
            shape[axis] = site.fresh()
            content = None
            continue
        start, end = starts[place], ends[place]
        if isinstance(start, int) and isinstance(end, int) and isinstance(source[axis], int):
            span = _span(start, end, step, source[axis])
            shape[axis] = len(span)
            content = None if content is None else np.take(content, list(span), axis)
        else:
            content = None
            shape[axis] = slice_extent(site, start, end, step, source[axis])
    return Fact(dtype, tuple(shape), content)


def _bounds(site: Site, index: int, name: str) -> list[Any] | None:
    if not site.has(index):
        found = site.attribute(name)
        return None if found is None else list(found)
    known = site.known(index)
    if known is not None:
        return list(known.ravel().tolist())
    shape = site.shape(index)
    if shape and isinstance(shape[0], int):
        return [site.anything() for _ in range(shape[0])]
    return None


def _span(start: int, end: int, step: int, size: int) -> range:
    """Return the indices Slice takes: Python's rule, but an end below -size means before 0."""
    if step == 0:
        raise Misfit("the step of a slice is 0")
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


_FAR = (1 << 31) - 1
"""No extent reaches this; exporters write such numbers for "to the end"."""


def slice_extent(site: Site, start: Any, end: Any, step: int, size: Dim) -> Dim:
    """Return how many indices a slice takes, bounds clamped as far as they are known to need it.

    Args:
        site: The node; gives a fresh symbol where a bound has no known sign.
        start: First index, negative from the end.
        end: Index to stop before, negative from the end.
        step: Distance, of either sign.
        size: Extent of the axis.
    """
    if step == 0:
        raise Misfit("the step of a slice is 0")
    if step < 0:
        whole = isinstance(start, int) and isinstance(end, int) and start >= _FAR and end <= -_FAR
        if whole or (start == -1 and isinstance(end, int) and end <= -_FAR):
            return ceil_div(size, -step)
        return site.fresh()
    first, last = _clamped(site, start, size), _clamped(site, end, size)
    if first is None or last is None:
        return site.fresh()
    length = maximum(0, subtract(last, first))
    return ceil_div(length, step)


def _clamped(site: Site, bound: Any, size: Dim) -> Dim | None:
    """Return a bound as an index in [0, size], None if its sign is not known."""
    if isinstance(bound, int):
        if bound >= _FAR:
            return size
        if bound < 0:
            return maximum(0, add(size, bound))
        return minimum(bound, size)
    if site.shapes.is_unknown(bound):
        return None
    if at_least(bound, 0):
        return minimum(bound, size)
    if at_least(-1, bound):
        return maximum(0, add(size, bound))
    return None


@rule("Gather")
def _gather(site: Site) -> Outcome:
    data, indices, dtype = site.shape(0), site.shape(1), site.dtype(0)
    if data is None or indices is None:
        return Fact(dtype)
    axis = axis_of(site.attribute("axis", 0), len(data))
    shape = (*data[:axis], *indices, *data[axis + 1 :])
    content, places = site.known(0), site.ints(1)
    if content is None or places is None or not all(isinstance(dim, int) for dim in indices):
        return Fact(dtype, shape)
    size = content.shape[axis]
    if any(not -size <= place < size for place in places):
        raise Misfit("an index lies outside the axis")
    at = np.array([place % size for place in places], dtype=np.int64).reshape(indices)
    return Fact(dtype, shape, object_array(np.take(content, at, axis)))


@rule("GatherElements")
def _gather_elements(site: Site) -> Outcome:
    return Fact(site.dtype(0), site.shape(1))


@rule("GatherND")
def _gather_nd(site: Site) -> Outcome:
    data, indices = site.shape(0), site.shape(1)
    batch = site.attribute("batch_dims", 0)
    if data is None or not indices or not isinstance(indices[-1], int):
        return Fact(site.dtype(0))
    if batch + indices[-1] > len(data):
        raise Misfit("the indices are longer than the rank")
    return Fact(site.dtype(0), (*indices[:-1], *data[batch + indices[-1] :]))


@rule("ScatterND ScatterElements Scatter TensorScatter")
def _scatter(site: Site) -> Outcome:
    return Fact(site.dtype(0), site.shape(0))


@rule("Expand")
def _expand(site: Site) -> Outcome:
    dtype, source = site.dtype(0), site.shape(0)
    target = site.known(1)
    if target is None:
        length = site.shape(1)
        if source is None or not length or not isinstance(length[0], int):
            return Fact(dtype)
        return Fact(dtype, site.fresh_shape(max(len(source), length[0])))
    wanted = tuple(extent(site, element) for element in target.tolist())
    shape = site.broadcast(source, wanted)
    known, size = site.known(0), static_size(shape)
    if known is None or shape is None or size is None or not trackable(dtype, size):
        return Fact(dtype, shape)
    return Fact(dtype, shape, np.broadcast_to(known, shape))


@rule("Tile")
def _tile(site: Site) -> Outcome:
    dtype, source, repeats = site.dtype(0), site.shape(0), site.known(1)
    if source is None:
        return Fact(dtype)
    if repeats is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    times = [extent(site, element) for element in repeats.tolist()]
    if len(times) != len(source):
        raise Misfit("one repeat is needed for each axis")
    shape = tuple(multiply(dim, n) for dim, n in zip(source, times, strict=True))
    known, size = site.known(0), static_size(shape)
    if known is None or size is None or not trackable(dtype, size):
        return Fact(dtype, shape)
    return Fact(dtype, shape, np.tile(known, [int(n) for n in times]))


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
    return Fact(ir.DataType.INT64, (), None if source is None else object_array(_size(source)))


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


@rule("Pad")
def _pad(site: Site) -> Outcome:
    source, dtype = site.shape(0), site.dtype(0)
    if source is None:
        return Fact(dtype)
    pads = site.known(1)
    if pads is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    axes = site.axes(3) if site.has(3) else list(range(len(source)))
    if axes is None:
        return Fact(dtype, site.fresh_shape(len(source)))
    amounts = pads.tolist()
    if len(amounts) != 2 * len(axes):
        raise Misfit("two pads are needed for each axis")
    shape = list(source)
    for place, named in enumerate(axes):
        axis = axis_of(named, len(source))
        amount = add(amounts[place], amounts[place + len(axes)])
        if not isinstance(amount, int) and site.shapes.mentions_fresh(amount):
            shape[axis] = site.fresh()
        else:
            shape[axis] = add(shape[axis], amount)
    return Fact(dtype, tuple(shape))


@rule("DepthToSpace")
def _depth_to_space(site: Site) -> Outcome:
    source, block = site.shape(0), site.attribute("blocksize", 1)
    if source is None:
        return Fact(site.dtype(0), site.fresh_shape(4))
    n, c, h, w = source
    return Fact(
        site.dtype(0), (n, quotient(c, block * block), multiply(h, block), multiply(w, block))
    )


@rule("SpaceToDepth")
def _space_to_depth(site: Site) -> Outcome:
    source, block = site.shape(0), site.attribute("blocksize", 1)
    if source is None:
        return Fact(site.dtype(0), site.fresh_shape(4))
    n, c, h, w = source
    return Fact(
        site.dtype(0), (n, multiply(c, block * block), quotient(h, block), quotient(w, block))
    )


@rule("NonZero")
def _nonzero(site: Site) -> Outcome:
    source = site.shape(0)
    rank = site.fresh() if source is None else len(source)
    return Fact(ir.DataType.INT64, (rank, site.fresh()))


@rule("Compress")
def _compress(site: Site) -> Outcome:
    source, axis = site.shape(0), site.attribute("axis")
    if axis is None:
        return Fact(site.dtype(0), (site.fresh(),))
    if source is None:
        return Fact(site.dtype(0))
    axis = axis_of(axis, len(source))
    return Fact(site.dtype(0), (*source[:axis], site.fresh(), *source[axis + 1 :]))


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
        inverse = (_size(source) if axis is None else source[axis],)
    return [
        Fact(site.dtype(0), shape),
        Fact(int64, (count,)),
        Fact(int64, inverse),
        Fact(int64, (count,)),
    ]


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


@rule("TopK")
def _top_k(site: Site) -> Outcome:
    source, k = site.shape(0), site.known(1)
    if source is None:
        return [Fact(site.dtype(0)), Fact(ir.DataType.INT64)]
    axis = axis_of(site.attribute("axis", -1), len(source))
    count = site.fresh() if k is None else extent(site, k.item())
    shape = (*source[:axis], count, *source[axis + 1 :])
    return [Fact(site.dtype(0), shape), Fact(ir.DataType.INT64, shape)]
