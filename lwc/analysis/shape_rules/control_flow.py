"""If, Loop, Scan, function calls, sequences and optionals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from lwc.analysis.shape_rules.registry import (
    UNKNOWN,
    Fact,
    Outcome,
    Site,
    SymbolicArray,
    axis_of,
    rule,
    shapes_equal,
)
from lwc.core.dims import Dim, DimShape, equal, maximum

if TYPE_CHECKING:
    from lwc.analysis.shapes import Shapes
    from lwc.core.module import Module

__all__ = ["agreed", "infer_call", "visit_uncalled_functions"]


def infer_call(site: Site, function: ir.Function) -> Outcome:
    """Infer the body of a function for this call."""
    attributes = {}
    for name, default in function.attributes.items():
        given = site.node.attributes.get(name)
        if given is not None and given.is_ref():
            given = site.shapes.call_attribute(given.ref_attr_name)
        if given is None and default.value is not None:
            given = default
        if given is not None:
            attributes[name] = given
    return site.shapes.call(function, attributes, site.inputs)


def visit_uncalled_functions(shapes: Shapes, module: Module) -> None:
    """Infer function bodies that nothing calls, their inputs unknown."""
    for function in module.model.functions.values():
        if any(value not in shapes for node in function for value in node.outputs):
            shapes.call(function, dict(function.attributes), ())


def agreed(a: Fact, b: Fact) -> Fact:
    """Return what two facts about one value agree on, without making new symbols."""
    if a is b:
        return a
    shape = a.shape if shapes_equal(a.shape, b.shape) else None
    element = None if a.element is None or b.element is None else agreed(a.element, b.element)
    return Fact(
        a.dtype if a.dtype == b.dtype else None,
        shape,
        a.known if shape is not None and same_content(a.known, b.known) else None,
        element,
    )


def joined(a: Fact, b: Fact, shapes: Shapes) -> Fact:
    """Return what holds of a value that is one of two: differing extents become fresh symbols."""
    merged = agreed(a, b)
    if merged.shape is not None or a.shape is None or b.shape is None:
        return merged
    if len(a.shape) != len(b.shape):
        return merged
    shape = tuple(
        x if equal(x, y) else shapes.fresh() for x, y in zip(a.shape, b.shape, strict=True)
    )
    return merged._replace(shape=shape)


def same_content(a: SymbolicArray | None, b: SymbolicArray | None) -> bool:
    """Tell whether two contents are element by element the same expression."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and all(
        type(x) is type(y) and x == y for x, y in zip(a.flat, b.flat, strict=True)
    )


@rule("If")
def _if(site: Site) -> Outcome:
    shapes = site.shapes
    branches = []
    for name in ("then_branch", "else_branch"):
        graph = site.attribute(name)
        shapes.visit(graph)
        branches.append([shapes.fact(value) for value in graph.outputs])
    condition = site.known(0)
    if condition is not None and isinstance(condition.flat[0], bool):
        return branches[0 if condition.flat[0] else 1]
    return [joined(a, b, shapes) for a, b in zip(*branches, strict=True)]


@rule("Loop")
def _loop(site: Site) -> Outcome:
    shapes, body = site.shapes, site.attribute("body")
    carried = len(site.inputs) - 2
    born = shapes.fresh_count
    state = [site.fact(2 + index)._replace(known=None) for index in range(carried)]
    iteration, condition, *variables = body.inputs
    shapes.set_fact(iteration, Fact(ir.DataType.INT64, ()))
    shapes.set_fact(condition, Fact(ir.DataType.BOOL, ()))
    after = _settle(site, body, variables, state, 1)
    scanned = [shapes.fact(value) for value in body.outputs[1 + carried :]]
    count = _trip_count(site, body)
    finals = [
        outlive(joined(site.fact(2 + i)._replace(known=None), fact, shapes), shapes, born)
        for i, fact in enumerate(after)
    ]
    return [*finals, *(_stacked(fact, 0, count, shapes, born) for fact in scanned)]


def _settle(
    site: Site, body: ir.Graph, variables: list[ir.Value], state: list[Fact], first_output: int
) -> list[Fact]:
    """Infer a body until what is assumed of its loop variables holds after an iteration too.

    Each round only forgets, an extent at a time, then a rank: it ends.
    """
    shapes = site.shapes
    born = shapes.fresh_count
    while True:
        for variable, fact in zip(variables, state, strict=True):
            shapes.set_fact(variable, fact)
        shapes.visit(body)
        outputs = body.outputs[first_output : first_output + len(variables)]
        after = [shapes.fact(value)._replace(known=None) for value in outputs]
        widened = [_widened(a, b, shapes, born) for a, b in zip(state, after, strict=True)]
        if all(a is b for a, b in zip(state, widened, strict=True)):
            return after
        state = widened


def _widened(before: Fact, after: Fact, shapes: Shapes, born: int) -> Fact:
    """Return `before` itself if it covers `after`, else what is left of it.

    A symbol made since `born` stands for this extent alone and covers any other; an older one is
    known outside of the loop.
    """

    def covers(x: Dim, y: Dim) -> bool:
        return equal(x, y) or (shapes.is_fresh(x) and shapes.made_since(x, born))

    dtype = before.dtype if before.dtype == after.dtype else None
    element = before.element
    if element is not None:
        element = (
            UNKNOWN if after.element is None else _widened(element, after.element, shapes, born)
        )
    shape = before.shape
    if shape is not None:
        if after.shape is None or len(after.shape) != len(shape):
            shape = None
        elif not all(map(covers, shape, after.shape)):
            shape = tuple(
                x if covers(x, y) else shapes.fresh()
                for x, y in zip(shape, after.shape, strict=True)
            )
    if dtype is before.dtype and element is before.element and shape is before.shape:
        return before
    return Fact(dtype, shape, None, element)


def outlive(fact: Fact, shapes: Shapes, born: int) -> Fact:
    """Replace what belongs to one iteration, symbols made after `born`, by fresh symbols."""
    if fact.element is not None:
        return Fact(element=outlive(fact.element, shapes, born))
    if fact.shape is None:
        return fact
    shape = tuple(shapes.fresh() if shapes.made_since(dim, born) else dim for dim in fact.shape)
    return fact._replace(shape=shape)


def _stacked(fact: Fact, axis: int, count: Dim, shapes: Shapes, born: int) -> Fact:
    """Describe the results of all iterations joined along a new axis."""
    if fact.shape is None:
        return Fact(fact.dtype)
    shape = list(outlive(fact, shapes, born).shape or ())
    shape.insert(axis_of(axis, len(shape) + 1), count)
    return Fact(fact.dtype, tuple(shape))


def _trip_count(site: Site, body: ir.Graph) -> Dim:
    """Return how often a Loop runs: its bound, if nothing can end it sooner."""
    bound = site.known(0)
    begins = not site.has(1) or _is_true(site.known(1))
    goes_on = body.outputs[0] is body.inputs[1] or _is_true(site.shapes.known(body.outputs[0]))
    if bound is None or not (begins and goes_on):
        return site.fresh()
    element = bound.flat[0]
    if isinstance(element, int):
        return max(0, element)
    return site.fresh() if site.shapes.is_unknown(element) else maximum(0, element)


def _is_true(known: SymbolicArray | None) -> bool:
    return known is not None and known.size == 1 and known.flat[0] is True


@rule("Scan")
def _scan(site: Site) -> Outcome:
    shapes, body = site.shapes, site.attribute("body")
    scanned = site.attribute("num_scan_inputs")
    carried = len(site.inputs) - scanned
    born = shapes.fresh_count
    axes = site.attribute("scan_input_axes") or [0] * scanned
    length: Dim | None = None
    for index, axis in enumerate(axes):
        fact, variable = site.fact(carried + index), body.inputs[carried + index]
        shape: DimShape | None = None
        if fact.shape is not None:
            place = axis_of(axis, len(fact.shape))
            shape = (*fact.shape[:place], *fact.shape[place + 1 :])
            length = fact.shape[place] if length is None else site.same(length, fact.shape[place])
        shapes.set_fact(variable, Fact(fact.dtype, shape))
    state = [site.fact(index)._replace(known=None) for index in range(carried)]
    after = _settle(site, body, list(body.inputs[:carried]), state, 0)
    finals = [
        outlive(joined(site.fact(i)._replace(known=None), fact, shapes), shapes, born)
        for i, fact in enumerate(after)
    ]
    count = site.fresh() if length is None else length
    outputs = [shapes.fact(value) for value in body.outputs[carried:]]
    places = site.attribute("scan_output_axes") or [0] * len(outputs)
    stacked = [
        _stacked(fact, axis, count, shapes, born)
        for fact, axis in zip(outputs, places, strict=True)
    ]
    return [*finals, *stacked]
