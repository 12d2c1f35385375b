"""LayerNorm and RMSNorm as exporters spell them, read into one description."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import onnx_ir as ir

from lwc.passes.fusion.pieces import inner_nodes, orders, same, shared_inside
from lwc.rewrite import Editor, Miss, attribute, producer_of

__all__ = ["Kind", "SpelledNorm", "spelled_batch_form", "spelled_norm"]

Kind: TypeAlias = Literal["layer", "rms"]

_ROUNDING = 2.0**-21
"""Relative error of constants computed in float32 by a few operations."""


class SpelledNorm(NamedTuple):
    """(x - mean(x)) / sqrt(variance(x) + epsilon), or x / sqrt(mean(x²) + epsilon).

    Attributes:
        kind: `layer` or `rms`.
        source: x, float32.
        axes: How many last axes means are taken over.
        epsilon: The number added under the root.
        weight: What the result is multiplied by along these axes; None for nothing.
        bias: What is added to it then.
    """

    kind: Kind
    source: ir.Value
    axes: int
    epsilon: float
    weight: ir.Value | None = None
    bias: ir.Value | None = None


class _Spread(NamedTuple):
    """sqrt(mean(d²) + epsilon) over so many last axes."""

    deviation: ir.Value
    axes: int
    epsilon: float


class _Mean(NamedTuple):
    """A mean that keeps its axes: the last `axes` ones, 0 where it is over others."""

    source: ir.Value
    axes: int


def spelled_norm(node: ir.Node, edit: Editor, kind: Kind) -> SpelledNorm | Miss | None:
    """Read a Mul or Div as the end of a norm without bias; None where it is nothing like it.

    The weight is found here only where it was multiplied before the division.
    """
    found = _quotient(node, edit)
    if not isinstance(found, tuple):
        return found
    numerator, weight, spread = found
    source = _centred(spread.deviation, spread.axes, edit)
    if kind != ("rms" if source is None else "layer"):
        return None
    if not same(numerator, spread.deviation, edit):
        weighted = producer_of(numerator, "Mul") if weight is None else None
        for deviation, factor in orders(weighted) if weighted is not None else ():
            if same(deviation, spread.deviation, edit):
                weight = factor
                break
        else:
            return Miss("what is divided is not what the root was taken of")
    source = spread.deviation if source is None else source
    made = SpelledNorm(kind, source, spread.axes, spread.epsilon, weight)
    return _checked(node, made, edit)


def spelled_batch_form(node: ir.Node, edit: Editor) -> SpelledNorm | Miss | None:
    """Read an Add as x · k + (bias - mean(x) · k), k = weight / sqrt(variance(x) + epsilon)."""
    for product, rest in orders(node):
        scaled, shift = producer_of(product, "Mul"), producer_of(rest, "Sub")
        moved = None if shift is None else producer_of(shift.inputs[1], "Mul")
        if scaled is None or shift is None or moved is None:
            continue
        for source, factor in orders(scaled):
            for mean, again in orders(moved):
                centre = _mean(mean, edit)
                if centre is None or not same(centre.source, source, edit):
                    continue
                if not same(factor, again, edit):
                    continue
                return _batch_form(node, source, factor, shift.inputs[0], edit)
    return None


def _batch_form(
    node: ir.Node, source: ir.Value, factor: ir.Value, bias: ir.Value | None, edit: Editor
) -> SpelledNorm | Miss | None:
    found = _inverse_spread(factor, edit)
    if not isinstance(found, tuple):
        return found
    weight, spread = found
    if not same(_centred(spread.deviation, spread.axes, edit), source, edit):
        return Miss("the variance is of something else than what is normalized")
    made = SpelledNorm("layer", source, spread.axes, spread.epsilon, weight, bias)
    return _checked(node, made, edit)


def _checked(node: ir.Node, norm: SpelledNorm, edit: Editor) -> SpelledNorm | Miss:
    """Check types, extents, and that nothing else reads what is inside."""
    dtype = edit.dtype(norm.source)
    if dtype != ir.DataType.FLOAT:
        # Half precision overflows in squares where the operator, which computes in single
        # precision, does not; what computes in double was meant to be more precise than that.
        name = "an unknown type" if dtype is None else dtype.name.lower()
        return Miss(f"it computes in {name}, the operator in float")
    shape = edit.shape(norm.source)
    if shape is None or not all(isinstance(dim, int) and dim > 0 for dim in shape[-norm.axes :]):
        return Miss("the extent of the axes that are normalized is not known")
    if not edit.same_shape(norm.source, node.outputs[0]):
        return Miss("a constant widens the result")
    return shared_inside(inner_nodes(node, (norm.source, norm.weight, norm.bias), edit)) or norm


def _quotient(
    node: ir.Node, edit: Editor
) -> tuple[ir.Value, ir.Value | None, _Spread] | Miss | None:
    """Read a node as numerator · weight / sqrt(mean(d²) + epsilon)."""
    if node.op_type == "Div":
        numerator, divisor = node.inputs
        spread = _root_spread(divisor, edit)
        if numerator is None or not isinstance(spread, _Spread):
            return spread if isinstance(spread, Miss) else None
        return numerator, None, spread
    miss = None
    for numerator, factor in orders(node):
        found = _inverse_spread(factor, edit)
        if isinstance(found, tuple):
            return numerator, *found
        miss = miss or found
    return miss


def _inverse_spread(value: ir.Value, edit: Editor) -> tuple[ir.Value | None, _Spread] | Miss | None:
    """Read a value as weight / sqrt(mean(d²) + epsilon)."""
    spread = _inverse_root(value, edit)
    if spread is not None:
        return spread if isinstance(spread, Miss) else (None, spread)
    product = producer_of(value, "Mul")
    for weight, factor in orders(product) if product is not None else ():
        spread = _inverse_root(factor, edit)
        if spread is not None:
            return spread if isinstance(spread, Miss) else (weight, spread)
    return None


def _inverse_root(value: ir.Value, edit: Editor) -> _Spread | Miss | None:
    """Read one of the spellings of 1 / sqrt(...)."""
    power = producer_of(value, "Pow")
    if power is not None and edit.scalar(power.inputs[1]) == -0.5:
        return _spread(power.inputs[0], edit)
    root = producer_of(value, "Sqrt")
    if root is not None:
        inverse = _inverted(root.inputs[0], edit)
        return None if inverse is None else _spread(inverse, edit)
    return _root_spread(_inverted(value, edit), edit)


def _inverted(value: ir.Value | None, edit: Editor) -> ir.Value | None:
    """Return what a value is one over."""
    node = producer_of(value, "Reciprocal")
    if node is not None:
        return node.inputs[0]
    node = producer_of(value, "Div")
    return node.inputs[1] if node is not None and edit.scalar(node.inputs[0]) == 1 else None


def _root_spread(value: ir.Value | None, edit: Editor) -> _Spread | Miss | None:
    """Read one of the spellings of sqrt(...)."""
    node = producer_of(value, "Sqrt")
    if node is not None:
        return _spread(node.inputs[0], edit)
    node = producer_of(value, "Pow")
    if node is not None and edit.scalar(node.inputs[1]) == 0.5:
        return _spread(node.inputs[0], edit)
    node = producer_of(value, "Add")
    for root, _ in orders(node) if node is not None else ():
        inner = producer_of(root, "Sqrt")
        if inner is not None and _mean_square(inner.inputs[0], edit) is not None:
            return Miss("epsilon is added after the root, not under it", node)
    return None


def _spread(radicand: ir.Value | None, edit: Editor) -> _Spread | Miss | None:
    node = producer_of(radicand, "Add")
    if node is None:
        mean = _mean_square(radicand, edit)
        return None if mean is None else Miss("no epsilon is added under the root")
    for value, constant in orders(node):
        mean = _mean_square(value, edit)
        if mean is None:
            if _is_difference_of_means(value, edit):
                return Miss("the variance is a difference of two means, which cancels", node)
            continue
        epsilon = edit.scalar(constant)
        if epsilon is None or not 0 < epsilon < math.inf:
            return Miss("epsilon is not one positive constant", node)
        if not mean.axes:
            return Miss("the mean is not over the last axes, or drops them", node)
        return _Spread(mean.source, mean.axes, float(epsilon))
    return None


def _mean_square(value: ir.Value | None, edit: Editor) -> _Mean | None:
    """Read a value as mean(d²); the source is d."""
    squares = _reduction(value, "ReduceSumSquare", edit)
    if squares is not None:
        return squares
    mean = _mean(value, edit)
    root = None if mean is None else _squared(mean.source, edit)
    return None if mean is None or root is None else _Mean(root, mean.axes)


def _squared(value: ir.Value, edit: Editor) -> ir.Value | None:
    """Return what a value is the square of."""
    node = producer_of(value, "Pow", "Mul")
    if node is None:
        return None
    first, second = node.inputs
    is_square = edit.scalar(second) == 2 if node.op_type == "Pow" else same(first, second, edit)
    return first if is_square else None


def _is_difference_of_means(value: ir.Value, edit: Editor) -> bool:
    """Tell whether a value is mean(x²) - mean(x)²."""
    node = producer_of(value, "Sub")
    if node is None or _mean_square(node.inputs[0], edit) is None or node.inputs[1] is None:
        return False
    mean = _squared(node.inputs[1], edit)
    return mean is not None and _mean(mean, edit) is not None


def _centred(value: ir.Value, axes: int, edit: Editor) -> ir.Value | None:
    """Return x where a value is x minus its mean over the same axes."""
    node = producer_of(value, "Sub")
    if node is None:
        return None
    source, subtracted = node.inputs
    mean = _mean(subtracted, edit)
    if mean is None or mean.axes != axes or not same(mean.source, source, edit):
        return None
    return source


def _mean(value: ir.Value | None, edit: Editor) -> _Mean | None:
    node = producer_of(value, "ReduceMean")
    if node is not None and node.inputs[0] is not None:
        return _Mean(node.inputs[0], _last_axes(node, edit))
    return _reduction(value, "ReduceSum", edit)


def _reduction(value: ir.Value | None, op: str, edit: Editor) -> _Mean | None:
    """Read a value as a sum divided by the number of elements."""
    node = producer_of(value, "Div", "Mul")
    if node is None:
        return None
    for total, constant in orders(node):
        number, summed = edit.scalar(constant), producer_of(total, op)
        if not number or summed is None or summed.inputs[0] is None:
            if node.op_type == "Div":
                return None
            continue
        axes, shape = _last_axes(summed, edit), edit.shape(summed.inputs[0])
        if not axes or shape is None or not all(isinstance(dim, int) for dim in shape[-axes:]):
            return None
        count = math.prod(int(dim) for dim in shape[-axes:])
        factor = number if node.op_type == "Mul" else 1 / number
        return _Mean(summed.inputs[0], axes) if abs(factor * count - 1) <= _ROUNDING else None
    return None


def _last_axes(node: ir.Node, edit: Editor) -> int:
    """Return how many last axes a node reduces and keeps; 0 where it does otherwise."""
    rank = edit.rank(node.inputs[0])
    if rank is None or not attribute(node, "keepdims", 1):
        return 0
    given = attribute(node, "axes")
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = edit.ints(node.inputs[1])
        if given is None:
            return 0
    if not given:
        return 0 if attribute(node, "noop_with_empty_axes", 0) else rank
    axes = {int(axis) - rank if axis >= 0 else int(axis) for axis in given}
    return len(axes) if axes == set(range(-len(axes), 0)) else 0
