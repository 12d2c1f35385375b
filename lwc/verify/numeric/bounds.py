"""How far an output may be off: bounds on rounding, and differences measured against them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.errors import VerificationError
from lwc.core.walk import attribute_graphs, is_default_domain
from lwc.pipeline.passes import Approximate, Contract

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = [
    "ROUNDING_FLOAT32",
    "Bounds",
    "OutputError",
    "contract_bounds",
    "depth",
    "difference",
    "distance",
    "exact_rtol",
    "root_mean_square",
    "rounding",
    "shown",
    "usual_size",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutputError:
    """How far one output is off on one feed.

    Attributes:
        output: Name of the output.
        shapes: Shapes of the feed, by input.
        max_error: Largest absolute difference.
        excess: Largest ratio of a difference to its bound; up to 1 is within bounds.
        index: Where `excess` is reached.
        expected: The element there before.
        result: The element there after.
    """

    output: str
    shapes: dict[str, tuple[int, ...]]
    max_error: float
    excess: float
    index: tuple[int, ...]
    expected: float
    result: float


def exact_rtol(module: Module) -> float:
    """Bound the relative rounding error between two orders of one module's arithmetic.

    Roundings along a chain of `depth` operators are taken as independent, so that they add up as
    a random walk: `c · eps · sqrt(depth)` with the machine epsilon of the coarsest floating-point
    type computed in (Higham and Mary, "A new approach to probabilistic rounding error analysis",
    2019). The factor is 16 in float32, where it covers the length of sums within one operator
    (on fifteen exporters' files ONNX Runtime's own optimisations need 2), and 2 in the 16-bit
    types, whose sums are taken in float32 and rounded once.
    """
    return rounding(module) * math.sqrt(max(1, depth(module)))


def depth(module: Module) -> int:
    """Count the operators on the longest path of the main graph, bodies of subgraphs included."""
    return _depth(module.graph)


def _depth(graph: ir.Graph) -> int:
    levels: dict[ir.Value | None, int] = {}
    deepest = 0
    for node in graph:
        inner = max((_depth(body) for body in attribute_graphs(node)), default=0)
        level = 1 + inner + max((levels.get(value, 0) for value in node.inputs), default=0)
        levels.update(dict.fromkeys(node.outputs, level))
        deepest = max(deepest, level)
    return deepest


_ROUNDING = {ir.DataType.BFLOAT16: 2 * 2.0**-7, ir.DataType.FLOAT16: 2 * 2.0**-10}
ROUNDING_FLOAT32 = 16 * 2.0**-23
_ROUNDING_DOUBLE = 16 * 2.0**-52

_NO_NUMBER = 1e30
"""Elements of this size and more stand for "minus infinity" in masks: they say nothing of the
size of an output."""

_LEAST_MASK, _APART, _SHARE = 1e3, 1e4, 0.1
"""Smaller numbers mask nothing in a softmax. Elements above that and this many times as large as
the smallest tenth (of those that are not 0) are numbers of a mask, too; up to nine tenths of an
output may be masked."""


class Bounds(NamedTuple):
    """How far an element `y` of an output of usual size `s` may be off.

    By `rtol·(|y| + s) + rounding·min(1, s) + promised`.

    Attributes:
        rtol: Relative bound.
        rounding: Absolute bound on rounding, for outputs of the order of one; no refuge for tiny
            ones.
        promised: Absolute bound of the contract.
    """

    rtol: float
    rounding: float
    promised: float = 0.0

    @property
    def atol(self) -> float:
        """The absolute bound of an output of the order of one."""
        return self.rounding + self.promised


def rounding(module: Module) -> float:
    """Return `c · eps` of the coarsest type computed in; see `exact_rtol`."""
    types = {value.dtype for _, value in module.initializers()}
    types.update(value.dtype for value in module.graph.inputs)
    for node in module.nodes():
        types.update(output.dtype for output in node.outputs)
        if node.op_type == "Cast" and is_default_domain(node) and "to" in node.attributes:
            types.add(ir.DataType(node.attributes.get_int("to", 1)))
    for kind, size in _ROUNDING.items():
        if kind in types:
            return size
    if ir.DataType.DOUBLE in types and ir.DataType.FLOAT not in types:
        return _ROUNDING_DOUBLE
    return ROUNDING_FLOAT32


def contract_bounds(contract: Contract, before: Module) -> Bounds:
    """Return the bounds of an element.

    They are those of the module before: a pass that goes through a coarser type, or adds depth,
    does not loosen what it is held to.
    """
    rtol, atol = exact_rtol(before), rounding(before)
    if isinstance(contract, Approximate):
        return Bounds(contract.rtol + rtol, atol, contract.atol)
    return Bounds(rtol, atol)


def difference(
    name: str,
    shapes: dict[str, tuple[int, ...]],
    expected: Array,
    result: Array,
    bounds: Bounds,
) -> OutputError:
    """Compare one output before and after.

    Integers, booleans and strings must be equal; NaN and infinities must stay where they are.

    Args:
        name: The output.
        shapes: Shapes of the feed, for the message.
        expected: The output before.
        result: The output after.
        bounds: How far elements may be off.

    Raises:
        VerificationError: The shape is another.
    """
    expected, result = np.asarray(expected), np.asarray(result)
    if expected.shape != result.shape:
        raise VerificationError(
            f"output '{name}' had shape {list(expected.shape)} before the pass and has "
            f"{list(result.shape)} after it, with {shown(shapes)}"
        )
    if not expected.size:
        return OutputError(name, shapes, 0.0, 0.0, (), math.nan, math.nan)
    if expected.dtype.kind in "OUS":
        wanted, found = np.zeros(expected.shape), (expected != result).astype(np.float64)
        bounds = Bounds(0.0, 0.0)
    else:
        wanted, found = expected.astype(np.float64), result.astype(np.float64)
        if expected.dtype.kind in "iub":
            bounds = Bounds(0.0, bounds.rounding)
    error = distance(expected, result) if expected.dtype.kind not in "OUS" else found
    excess = _excess(error, wanted, bounds)
    index = np.unravel_index(int(excess.argmax()), expected.shape)
    return OutputError(
        name,
        shapes,
        float(error.max()),
        float(excess[index]),
        tuple(int(i) for i in index),
        float(wanted[index]),
        float(found[index]),
    )


def distance(a: Array, b: Array) -> Array:
    """Return |a - b|; 0 where both are NaN or the same, infinite where just one is finite."""
    x, y = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    with np.errstate(invalid="ignore"):
        found: Array = np.asarray(np.abs(x - y))  # of scalars NumPy returns no array
    found[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
    found[np.isnan(found)] = math.inf
    # Neighbours above 2**53 are one number in float64.
    return np.maximum(found, a != b) if np.asarray(a).dtype.kind in "iub" else found


def _excess(error: Array, wanted: Array, bounds: Bounds) -> Array:
    """Return the ratio of each error to its bound."""
    size = np.abs(np.where(np.isfinite(wanted), wanted, 0.0))
    scale = usual_size(wanted)
    bound = bounds.promised + bounds.rounding * min(1.0, scale) + bounds.rtol * (size + scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess: Array = np.where(error > 0, error / bound, 0.0)
    return excess


def usual_size(array: Array) -> float:
    """Return the root mean square of the elements that are numbers: finite, and of no mask."""
    size = np.abs(np.asarray(array, np.float64))
    size = size[size < _NO_NUMBER]
    if size.size and float(size.max()) > _LEAST_MASK:
        numbers = size[size > 0]
        rank = int(_SHARE * (numbers.size - 1))
        small = float(np.partition(numbers, rank)[rank])
        size = size[size <= max(_LEAST_MASK, _APART * small)]
    return root_mean_square(size)


def root_mean_square(array: Array) -> float:
    """Return the root mean square of the elements; 0 where there are none."""
    largest = float(np.max(np.abs(array), initial=0.0))
    if not 0 < largest < math.inf:
        return largest
    # Relative to the largest, whose square may be more than a float64 holds.
    return largest * math.sqrt(float(np.mean(np.square(array / largest))))


def shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Write the shapes of a feed."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
