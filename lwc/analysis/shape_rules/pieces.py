"""Operators that put tensors together and take pieces of them: joining, cutting, indexing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    rule,
    static_size,
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
    subtract,
)

__all__ = ["joined_shape"]


@rule("Concat")
def _concat(site: Site) -> Outcome:
    facts = [fact for fact in site.inputs if fact is not None]
    dtype, result = facts[0].dtype, joined_shape(site, facts)
    if result is None or any(fact.shape is None for fact in facts):
        return Fact(dtype, result)
    known = None
    size = static_size(result)
    if size is not None and trackable(dtype, size) and any(f.known is not None for f in facts):
        parts = [_content_or_anything(site, fact) for fact in facts]
        if all(part is not None for part in parts):
            axis = axis_of(site.attribute("axis", 0), len(result))
            known = np.concatenate([p for p in parts if p is not None], axis=axis)
    return Fact(dtype, result, known)


def joined_shape(site: Site, facts: Sequence[Fact]) -> DimShape | None:
    """Return the shape of values joined along the attribute `axis`."""
    shapes = [fact.shape for fact in facts if fact.shape is not None]
    if not shapes:
        return None
    rank = len(shapes[0])
    axis = axis_of(site.attribute("axis", 0), rank)
    if any(len(shape) != rank for shape in shapes):
        raise Misfit("the inputs differ in rank")
    # Runtimes skip empty operands whatever their other extents.
    filled = [shape for shape in shapes if 0 not in shape] or shapes
    result = list(filled[0])
    for shape in filled[1:]:
        for place in range(rank):
            if place != axis:
                result[place] = site.same(result[place], shape[place])
    result[axis] = functools.reduce(add, (shape[axis] for shape in shapes))
    if len(shapes) < len(facts):
        result[axis] = site.fresh()
    return tuple(result)


def _content_or_anything(site: Site, fact: Fact) -> SymbolicArray | None:
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
    total = functools.reduce(add, sizes, 0)
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
        if step < 0 and end in _ENDS:
            shape[axis] = site.fresh()
            content = None
        elif isinstance(start, int) and isinstance(end, int) and isinstance(source[axis], int):
            span = _span(start, end, step, source[axis])
            shape[axis] = len(span)
            content = None if content is None else np.take(content, list(span), axis)
        else:
            content = None
            shape[axis] = _slice_extent(site, start, end, step, source[axis])
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


_ENDS = ((1 << 31) - 1, (1 << 63) - 1)
"""Ends that ONNX Runtime reads as "to the end" in either direction; ONNX clamps them."""

_FAR = (1 << 31) - 1
"""No extent reaches this; exporters write such numbers for "to the end"."""


def _slice_extent(site: Site, start: Any, end: Any, step: int, size: Dim) -> Dim:
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
    # The size is mentioned once if at all possible: slices of slices would double it each time.
    if at_least(start, 0) and not at_least(start, _FAR):
        length = maximum(0, subtract(last, start))
    elif last == size and at_least(-1, start):
        length = minimum(size, subtract(0, start))
    else:
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


@rule("GatherND com.microsoft::GatherND")
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


@rule("Compress")
def _compress(site: Site) -> Outcome:
    source, axis = site.shape(0), site.attribute("axis")
    if axis is None:
        return Fact(site.dtype(0), (site.fresh(),))
    if source is None:
        return Fact(site.dtype(0))
    axis = axis_of(axis, len(source))
    return Fact(site.dtype(0), (*source[:axis], site.fresh(), *source[axis + 1 :]))
