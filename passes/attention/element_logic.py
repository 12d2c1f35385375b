"""Operators that compute elements: comparisons, logic, choices and arithmetic on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lwc.core.dims import Dim, add, multiply, subtract
from lwc.passes.attention.element_kinds import (
    CONDITIONS,
    AtMost,
    Both,
    Element,
    Index,
    Indices,
    Look,
    Never,
    Number,
    Read,
    Select,
    as_index,
    hides,
    opposite,
    rounded,
    truth,
)
from lwc.rewrite import attribute

if TYPE_CHECKING:
    from lwc.passes.attention.elements import Elements

__all__ = ["COMPUTES"]

COMPUTES: dict[str, Look] = {}
"""The operators of this file, by name."""


def _computes(*ops: str) -> Callable[[Look], Look]:
    def wrap(function: Look) -> Look:
        COMPUTES.update(dict.fromkeys(ops, function))
        return function

    return wrap


@_computes("Cast")
def _cast(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    element = of.operand(node, 0, index)
    to = ir.DataType(attribute(node, "to"))
    if to == ir.DataType.BOOL:
        return truth(element)
    if isinstance(element, Read):
        return None
    if isinstance(element, Number):
        return Number(_held(element.value, to))
    if isinstance(element, Select):
        return Select(element.condition, _held(element.yes, to), _held(element.no, to))
    if isinstance(element, Index) and to not in _COUNTS:
        return None
    return element


_COUNTS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types that hold places of a sequence and their differences: narrow ones wrap or round."""


def _held(value: float, to: ir.DataType) -> float:
    """Return a number cast to a type."""
    if to.is_integer():
        return int(value) if math.isfinite(value) else math.nan
    return rounded(value, to)


@_computes("Range")
def _range(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    start, step = (as_index(of.scalar(node.inputs[place])) for place in (0, 2))
    if start is None or step is None:
        return None
    return Index(add(start, multiply(step, index[0])))


@_computes("ConstantOfShape")
def _filled(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    fill = attribute(node, "value")
    return Number(0.0 if fill is None else fill.numpy().reshape(-1)[0].item())


@_computes("Trilu")
def _trilu(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    element = None if node.inputs[0] is None else of.at(node.inputs[0], index)
    shift: Dim | None = 0
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        shift = as_index(of.scalar(node.inputs[1]))
    if not isinstance(element, Number) or shift is None:
        return None
    ahead = subtract(subtract(index[-1], index[-2]), shift)
    kept = AtMost(subtract(0, ahead)) if attribute(node, "upper", 1) else AtMost(ahead)
    return Select(kept, float(element.value), 0.0)


@_computes("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
def _compare(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    first, second = (of.operand(node, place, index) for place in (0, 1))
    a, b = as_index(first), as_index(second)
    if a is None or b is None or (isinstance(first, Number) and isinstance(second, Number)):
        return None
    if "Greater" in node.op_type:
        a, b = b, a
    difference = subtract(a, b)
    return AtMost(difference if "Equal" in node.op_type else add(difference, 1))


@_computes("Equal")
def _equal(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    """Equal to 0: the opposite of not zero."""
    operands = [of.operand(node, place, index) for place in (0, 1)]
    for element, other in (operands, operands[::-1]):
        if isinstance(other, Number) and other.value == 0 and isinstance(element, Read):
            return Never(Read(element.value, element.index, nonzero=True))
    return None


@_computes("Not")
def _not(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    return opposite(truth(of.operand(node, 0, index)))


@_computes("And")
def _and(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    terms: list[Element] = []
    for place in (0, 1):
        element = truth(of.operand(node, place, index))
        if element is None:
            return None
        if isinstance(element, Number):
            if not element.value:
                return element
            continue
        terms.append(element)
    return _both(*terms) if terms else Number(True)


@_computes("Or")
def _or(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    operands = [truth(of.operand(node, place, index)) for place in (0, 1)]
    for element, other in (operands, operands[::-1]):
        if isinstance(element, Number):
            return element if element.value else other
    return None


@_computes("Where")
def _where(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    condition, yes, no = (of.operand(node, place, index) for place in (0, 1, 2))
    condition = truth(condition)
    if isinstance(condition, Number):
        return yes if condition.value else no
    if condition is None:
        return None
    if isinstance(yes, Number) and isinstance(no, Number):
        return Select(condition, float(yes.value), float(no.value))
    if isinstance(no, Select):
        condition, yes, no = opposite(condition), no, yes
    if not isinstance(yes, Select) or not isinstance(no, Number) or yes.no != no.value:
        return None
    return None if condition is None else Select(_both(condition, yes.condition), yes.yes, yes.no)


def _both(*conditions: Element) -> Element:
    """Return the conjunction of conditions."""
    terms: list[Element] = []
    for each in conditions:
        terms += each.terms if isinstance(each, Both) else [each]
    unique = tuple(dict.fromkeys(terms))
    return unique[0] if len(unique) == 1 else Both(unique)


@_computes("Add", "Sub", "Mul", "Max", "Min")
def _arithmetic(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    if len(node.inputs) != 2:
        return None
    a, b = (of.operand(node, place, index) for place in (0, 1))
    if a is None or b is None:
        return None
    dtype, apply = of.edit.dtype(node.outputs[0]), _FLOATS[node.op_type]
    if isinstance(a, Number) and isinstance(b, Number):
        return Number(rounded(apply(a.value, b.value), dtype))
    first, second = as_index(a), as_index(b)
    if first is not None and second is not None and node.op_type in _DIMS:
        return Index(_DIMS[node.op_type](first, second))
    for one, other, swapped in ((a, b, False), (b, a, True)):
        if isinstance(one, (*CONDITIONS, Select)) and isinstance(other, Number):
            chosen = one if isinstance(one, Select) else Select(one, 1.0, 0.0)
            yes, no = (
                rounded(apply(other.value, x) if swapped else apply(x, other.value), dtype)
                for x in (chosen.yes, chosen.no)
            )
            return Select(chosen.condition, float(yes), float(no))
    if not isinstance(a, Select) or not isinstance(b, Select):
        return None
    if a.condition == b.condition:
        yes, no = rounded(apply(a.yes, b.yes), dtype), rounded(apply(a.no, b.no), dtype)
        return Select(a.condition, float(yes), float(no))
    return _joined(a, b, dtype) if node.op_type == "Add" else None


def _joined(a: Select, b: Select, dtype: ir.DataType | None) -> Element | None:
    """The sum of two maps that hide: what either hides is hidden.

    Each must hide by itself: a penalty that only lowers scores is none of the sum's condition.
    """
    if (a.yes, b.yes) != (0.0, 0.0) or not (hides(a.no, dtype) and hides(b.no, dtype)):
        return None
    return Select(_both(a.condition, b.condition), 0.0, float(rounded(a.no + b.no, dtype)))


_FLOATS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Max": max,
    "Min": min,
}
_DIMS: dict[str, Callable[[Dim, Dim], Dim]] = {"Add": add, "Sub": subtract, "Mul": multiply}
