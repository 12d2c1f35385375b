"""Operators that pick elements: each says which element of its input stands at an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import sympy

from lwc.core.dims import Dim, add, modulo, multiply, product, subtract
from lwc.passes.attention.element_kinds import Element, Indices, Look, as_index
from lwc.rewrite import attribute

if TYPE_CHECKING:
    from lwc.passes.attention.elements import Elements

__all__ = ["PICKS", "split"]

PICKS: dict[str, Look] = {}
"""The operators of this file, by name."""


def _picks(*ops: str) -> Callable[[Look], Look]:
    def wrap(function: Look) -> Look:
        PICKS.update(dict.fromkeys(ops, function))
        return function

    return wrap


@_picks("Identity")
def _same(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    return of.operand(node, 0, index)


@_picks("Unsqueeze")
def _unsqueeze(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    axes = of.constants(node.inputs[1])
    if axes is None or node.inputs[0] is None:
        return None
    new = {axis % len(index) for axis in axes}
    return of.at(node.inputs[0], tuple(i for n, i in enumerate(index) if n not in new))


@_picks("Squeeze")
def _squeeze(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    shape = of.shape(node.inputs[0])
    if shape is None or node.inputs[0] is None:
        return None
    axes = of.constants(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else ()
    if axes is None:
        return None
    gone = {axis % len(shape) for axis in axes}
    if not gone:
        gone = {axis for axis, dim in enumerate(shape) if dim == 1}
        if len(shape) - len(gone) != len(index):
            return None
    rest = iter(index)
    return of.at(node.inputs[0], tuple(0 if n in gone else next(rest) for n in range(len(shape))))


@_picks("Transpose")
def _transpose(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    perm = attribute(node, "perm", list(reversed(range(len(index)))))
    own: list[Dim] = [0] * len(index)
    for place, axis in enumerate(perm):
        own[axis] = index[place]
    return None if node.inputs[0] is None else of.at(node.inputs[0], tuple(own))


@_picks("Expand")
def _expand(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    return of.operand(node, 0, index)


@_picks("Reshape", "Flatten")
def _reshape(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    """The place in memory order, taken apart by the extents before."""
    source, shape, whole = node.inputs[0], of.shape(node.inputs[0]), of.shape(node.outputs[0])
    if source is None or shape is None or whole is None:
        return None
    place: Dim = 0
    for at, dim in zip(index, whole, strict=True):
        place = add(multiply(place, dim), at)
    counted = {at: dim for at, dim in zip(index, whole, strict=True) if not isinstance(at, int)}
    extents = {**of.extents, **counted}
    own = _taken_apart(place, shape)
    # Each index stays below its extent: else a term that is a multiple by chance was misplaced.
    fits = own is not None and all(
        _within(at, dim, extents.get(at), of) for at, dim in zip(own, shape, strict=True)
    )
    return of.at(source, tuple(own)) if own is not None and fits else None


def _taken_apart(place: Dim, shape: Sequence[Dim]) -> list[Dim] | None:
    """Divide a place in memory order by the strides of a shape."""
    own: list[Dim] = []
    rest = sympy.expand(place)
    for axis in range(len(shape)):
        stride = sympy.sympify(product(shape[axis + 1 :]))
        if shape[axis] == 1:
            own.append(0)
            continue
        outer = sympy.Integer(0)
        for term in sympy.Add.make_args(rest):
            if term.is_Integer and stride.is_Integer:
                outer += term // stride
                continue
            ratio = sympy.cancel(term / stride)
            if ratio.as_numer_denom()[1] == 1:
                outer += ratio
        rest = sympy.expand(rest - outer * stride)
        own.append(int(outer) if outer.is_Integer else outer)
    return own if rest == 0 else None


def _within(at: Dim, dim: Dim, extent: Dim | None, of: Elements) -> bool:
    """Tell whether an index is one variable that counts this extent, or a number in range."""
    if isinstance(at, int):
        return 0 <= at < dim if isinstance(dim, int) else at == 0
    return extent is not None and of.edit.same_dim(extent, dim)


@_picks("Slice")
def _slice(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, shape = node.inputs[0], of.shape(node.inputs[0])
    if source is None or shape is None:
        return None
    begins = of.edit.symbolic(node.inputs[1])
    given = [each for each in node.inputs[3:5] if each is not None]
    axes = of.constants(node.inputs[3]) if given else list(range(len(begins or ())))
    steps: list[int] | None = [1] * len(axes or ())
    if len(node.inputs) > 4 and node.inputs[4]:
        steps = of.constants(node.inputs[4])
    if begins is None or axes is None or steps is None or any(step < 1 for step in steps):
        return None
    own = list(index)
    for begin, axis, step in zip(begins, axes, steps, strict=True):
        # What may be negative counts from the end, or does not.
        if not isinstance(begin, int) and not begin.is_nonnegative:
            return None
        behind = isinstance(begin, int) and begin < 0
        if behind and begin > -(2**31) and not _holds(shape[axis], -begin):
            return None
        first = add(shape[axis], begin) if behind and begin > -(2**31) else 0 if behind else begin
        own[axis] = add(multiply(own[axis], step), first)
    return of.at(source, tuple(own))


def _holds(extent: Dim, count: Dim) -> bool:
    """Tell whether an extent is provably at least `count`: else a begin is moved to 0."""
    rest = subtract(extent, count)
    return rest >= 0 if isinstance(rest, int) else bool(rest.is_nonnegative)


def split(of: Elements, node: ir.Node, part: int, index: Indices) -> Element | None:
    """Return the element at `index` of one part of a Split."""
    source, axis = node.inputs[0], attribute(node, "axis", 0) % len(index)
    if source is None:
        return None
    begin: Dim = 0
    for value in node.outputs[:part]:
        shape = of.shape(value)
        if shape is None:
            return None
        begin = add(begin, shape[axis])
    return of.at(source, (*index[:axis], add(index[axis], begin), *index[axis + 1 :]))


@_picks("Tile")
def _tile(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, shape, times = node.inputs[0], of.shape(node.inputs[0]), of.constants(node.inputs[1])
    if source is None or shape is None or times is None:
        return None
    own: list[Dim] = []
    for at, dim, count in zip(index, shape, times, strict=True):
        if count != 1 and dim != 1 and not (isinstance(at, int) and isinstance(dim, int)):
            return None
        own.append(at if count == 1 else modulo(at, dim))
    return of.at(source, tuple(own))


def _place(element: Element, source: ir.Value, axis: int, of: Elements) -> Dim | None:
    """Return where an index points to; those below 0 count from the end."""
    place, shape = as_index(element), of.shape(source)
    if isinstance(place, int) and place < 0:
        return None if shape is None else add(shape[axis], place)
    return place


@_picks("Gather")
def _gather(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, where = node.inputs[0], node.inputs[1]
    rank, width = of.rank(source), of.rank(where)
    if source is None or where is None or rank is None or width is None:
        return None
    axis = attribute(node, "axis", 0) % rank
    place = _place(of.at(where, index[axis : axis + width]), source, axis, of)
    if place is None:
        return None
    return of.at(source, (*index[:axis], place, *index[axis + width :]))


@_picks("GatherND")
def _gather_nd(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, where = node.inputs[0], node.inputs[1]
    shape = of.shape(where)
    if attribute(node, "batch_dims", 0) or source is None or where is None or shape is None:
        return None
    count, lead = shape[-1], len(shape) - 1
    if not isinstance(count, int):
        return None
    places = [
        _place(of.at(where, (*index[:lead], axis)), source, axis, of) for axis in range(count)
    ]
    known = [place for place in places if place is not None]
    return of.at(source, (*known, *index[lead:])) if len(known) == count else None


@_picks("Concat")
def _concat(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    """Only where the place along the axis is a number."""
    axis = attribute(node, "axis") % len(index)
    at = index[axis]
    for value in node.inputs:
        shape = of.shape(value)
        if value is None or shape is None or not isinstance(at, int):
            return None
        dim = shape[axis]
        if not isinstance(dim, int):
            return None
        if at < dim:
            return of.at(value, (*index[:axis], at, *index[axis + 1 :]))
        at -= dim
    return None
