"""GELU, SiLU and their kin as exporters spell them, read into one description.

All are x · g(p(x)) times a constant, where g is sigmoid, or a + b · erf or tanh, and p a polynomial
of x. So the factors of a product are collected, one of them is read as such a gate, and the
polynomial is computed from its graph, whatever the order of its operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.passes.fusion.pieces import inner_nodes, orders, same, shared_inside
from lwc.rewrite import Editor, Miss, producer_of

__all__ = ["Activation", "Gate", "spelled_activation"]

Gate: TypeAlias = Literal["Erf", "Tanh", "Sigmoid"]

Polynomial: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64]]"

_DEGREE = 3
_DEPTH = 8
"""Operations in a row that are followed."""

_ROUNDING = 2.0**-21
"""Relative error of constants computed in float32 by a few operations."""

_ERF = np.array([0, math.sqrt(0.5), 0, 0])
_TANH = math.sqrt(2 / math.pi) * np.array([0, 1, 0, 0.044715])
"""Hendrycks and Gimpel, "Gaussian error linear units", 2016: x/2 · (1 + tanh(this))."""


class Activation(NamedTuple):
    """A function of each element of a value.

    Attributes:
        kind: `gelu`, `gelu-tanh`, or `swish`, which is x · sigmoid(alpha · x).
        source: x, float32.
        alpha: The factor of `swish`.
    """

    kind: Literal["gelu", "gelu-tanh", "swish"]
    source: ir.Value
    alpha: float = 1.0


@dataclass
class _Product:
    """constant · product of factors."""

    constant: float = 1.0
    factors: list[ir.Value] = field(default_factory=list)


class _Squashed(NamedTuple):
    """offset + slope · g(inner)."""

    inner: ir.Value
    offset: float
    slope: float


def spelled_activation(node: ir.Node, edit: Editor, gate: Gate) -> Activation | Miss | None:
    """Read a Mul or Div as the end of an activation; None where it is nothing like it."""
    product = _product(node, edit)
    if product is None or len(product.factors) != 2:
        return None
    for source, factor in (product.factors, product.factors[::-1]):
        squashed = _squashed(factor, edit, gate)
        if squashed is None:
            continue
        found = _named(gate, source, squashed, product.constant, edit)
        if isinstance(found, Miss) and _may_go_on(node, edit):
            return None
        return found if isinstance(found, Miss | None) else _checked(node, found, edit)
    return None


def _named(
    gate: Gate, source: ir.Value, squashed: _Squashed, constant: float, edit: Editor
) -> Activation | Miss | None:
    """Find which activation constant · x · (offset + slope · g(p(x))) is."""
    polynomial = _polynomial(squashed.inner, source, edit)
    if polynomial is None:
        return None if gate == "Sigmoid" else Miss("what is squashed is no polynomial of x")
    offset, slope = constant * squashed.offset, constant * squashed.slope
    if gate == "Sigmoid":
        if not _near(slope, 1):
            return Miss(f"its constant factor is {slope:.7g}, not 1")
        if _all_near(polynomial, 2 * _TANH):
            return Activation("gelu-tanh", source)  # sigmoid(2u) = (1 + tanh(u)) / 2
        if polynomial[1] and _all_near(polynomial, np.array([0, polynomial[1], 0, 0])):
            return Activation("swish", source, float(polynomial[1]))
        return None
    if not (_near(offset, 0.5) and _near(slope, 0.5)):
        return Miss(f"its constant factors are {offset:.7g} and {slope:.7g}, not 0.5")
    if not _all_near(polynomial, _ERF if gate == "Erf" else _TANH):
        return Miss(f"{gate} is of another polynomial than that of GELU")
    return Activation("gelu" if gate == "Erf" else "gelu-tanh", source)


def _checked(node: ir.Node, found: Activation, edit: Editor) -> Activation | Miss:
    """Check the type, and that nothing else reads what is inside."""
    dtype = edit.dtype(found.source)
    if dtype != ir.DataType.FLOAT:
        name = "an unknown type" if dtype is None else dtype.name.lower()
        return Miss(f"runtimes have the operator for float on the CPU, this is {name}")
    if not edit.same_shape(found.source, node.outputs[0]):
        return Miss("a constant widens the result")
    return shared_inside(inner_nodes(node, (found.source,), edit)) or found


def _may_go_on(node: ir.Node, edit: Editor) -> bool:
    """Tell whether a product is scaled by a constant next, which may be the one that lacks."""
    value = node.outputs[0]
    if not edit.single_use(value):
        return False
    user, index = next(iter(value.uses()))
    if user.domain or user.op_type not in ("Mul", "Div"):
        return False
    return edit.scalar(user.inputs[1 - index]) is not None


def _product(node: ir.Node, edit: Editor) -> _Product | None:
    """Collect the factors of a product; None where one of them divides."""
    product = _Product()
    return product if _multiply(product, node, edit, _DEPTH) else None


def _multiply(product: _Product, node: ir.Node, edit: Editor, depth: int) -> bool:
    """Add the factors of a Mul or Div, those of products that nothing else reads one by one."""
    operands = list(node.inputs)
    if node.op_type == "Div":
        divisor = edit.scalar(operands.pop())
        if not divisor:
            return False
        product.constant /= divisor
    for value in operands:
        number = edit.scalar(value)
        if number is not None:
            product.constant *= number
            continue
        inner = producer_of(value, "Mul", "Div")
        alone = depth and value is not None and edit.single_use(value)
        if inner is None or not alone or not _multiply(product, inner, edit, depth - 1):
            assert value is not None
            product.factors.append(value)
    return True


def _squashed(value: ir.Value, edit: Editor, gate: Gate) -> _Squashed | None:
    """Read a value as offset + slope · gate(inner); a sigmoid stands alone."""
    if gate == "Sigmoid":
        node = producer_of(value, "Sigmoid")
        return None if node is None or node.inputs[0] is None else _Squashed(node.inputs[0], 0, 1)
    total = producer_of(value, "Add")
    for term, constant in orders(total) if total is not None else ():
        offset = edit.scalar(constant)
        if offset is None:
            continue
        factor = producer_of(term, "Mul", "Div")
        product = _Product(factors=[term]) if factor is None else _product(factor, edit)
        if product is None or len(product.factors) != 1:
            return None
        node = producer_of(product.factors[0], gate)
        if node is not None and node.inputs[0] is not None:
            return _Squashed(node.inputs[0], float(offset), product.constant)
    return None


def _polynomial(
    value: ir.Value | None, x: ir.Value, edit: Editor, depth: int = _DEPTH
) -> Polynomial | None:
    """Return the coefficients of a value as a polynomial of `x`, by degree up to 3."""
    if value is None or not depth:
        return None
    number = edit.scalar(value)
    if number is not None:
        return np.array([number, 0, 0, 0], np.float64)
    if same(value, x, edit):
        return np.array([0, 1, 0, 0], np.float64)
    node = producer_of(value, "Add", "Div", "Mul", "Neg", "Pow", "Sub")
    if node is None:
        return None
    first = _polynomial(node.inputs[0], x, edit, depth - 1)
    if first is None or node.op_type == "Neg":
        return None if first is None else -first
    if node.op_type == "Pow":
        exponent = edit.scalar(node.inputs[1])
        return _power(first, int(exponent)) if exponent in (1, 2, 3) else None
    second = _polynomial(node.inputs[1], x, edit, depth - 1)
    if second is None:
        return None
    if node.op_type == "Div":
        return first / second[0] if second[0] and not np.any(second[1:]) else None
    if node.op_type == "Mul":
        return _times(first, second)
    return first + second if node.op_type == "Add" else first - second


def _times(a: Polynomial, b: Polynomial) -> Polynomial | None:
    product = np.convolve(a, b)
    return None if np.any(product[_DEGREE + 1 :]) else product[: _DEGREE + 1]


def _power(base: Polynomial, exponent: int) -> Polynomial | None:
    power: Polynomial | None = base
    for _ in range(exponent - 1):
        power = None if power is None else _times(power, base)
    return power


def _near(number: float, wanted: float) -> bool:
    return abs(number - wanted) <= _ROUNDING * abs(wanted)


def _all_near(found: Polynomial, wanted: Polynomial) -> bool:
    return bool(np.all(np.abs(found - wanted) <= _ROUNDING * np.abs(wanted)))
