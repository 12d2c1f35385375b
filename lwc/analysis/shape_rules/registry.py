"""What a shape rule sees and gives: facts about values, and the node under inference.

A rule is a function from a `Site` (one node with the facts of its inputs) to the facts of its
outputs. It is registered for operators by name, `Op` or `domain::Op`. A rule gives up with
`Misfit` where the inputs cannot belong to the operator, and leaves open what it cannot prove: a
fact is never a guess.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir
import sympy

from lwc.core.dims import Dim, DimShape, Expr, at_least, equal, lower_bound, multiply, subtract
from lwc.core.weights import reading

if TYPE_CHECKING:
    from lwc.analysis.shapes import Shapes

__all__ = [
    "FLOAT_LIMIT",
    "KNOWN_LIMIT",
    "RULES",
    "UNKNOWN",
    "Fact",
    "Misfit",
    "Outcome",
    "Rule",
    "Site",
    "SymbolicArray",
    "array_of",
    "axis_of",
    "differ",
    "element_count",
    "extent",
    "ints_of",
    "is_clipped",
    "is_integer_type",
    "not_one",
    "rule",
    "shapes_equal",
    "static_size",
    "tensor_fact",
    "trackable",
]

SymbolicArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""Tensor content: an object array of int, bool, float or sympy expressions."""

KNOWN_LIMIT = 256
"""Integer and boolean tensors up to this many elements are followed by content."""

FLOAT_LIMIT = 8
"""The same for floating-point tensors: enough for scales, axes and scalar chains."""

_INTEGERS = frozenset(
    {
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.INT16,
        ir.DataType.INT8,
        ir.DataType.UINT64,
        ir.DataType.UINT32,
        ir.DataType.UINT16,
        ir.DataType.UINT8,
        ir.DataType.BOOL,
    }
)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16})


class Misfit(Exception):
    """The inputs of a node cannot belong to its operator."""


class Fact(NamedTuple):
    """What is known of a value.

    Attributes:
        dtype: Element type of a tensor, or None.
        shape: Extents, or None when not even the rank is known.
        known: Content of a small tensor, with its shape, or None.
        element: What is known of every element of a sequence, or of an optional's content.
    """

    dtype: ir.DataType | None = None
    shape: DimShape | None = None
    known: SymbolicArray | None = None
    element: Fact | None = None


UNKNOWN = Fact()

Outcome: TypeAlias = Fact | Sequence[Fact]


def array_of(elements: Sequence[Any], shape: Sequence[int] | None = None) -> SymbolicArray:
    """Make an object array from a flat list, one-dimensional unless `shape` is given."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array if shape is None else array.reshape(tuple(shape))


def ints_of(known: SymbolicArray | None) -> list[int] | None:
    """Return content as a flat list if every element is a plain number, else None."""
    if known is None:
        return None
    flat = known.ravel().tolist()
    return [int(e) for e in flat] if all(isinstance(e, int) for e in flat) else None


def tensor_fact(tensor: ir.TensorProtocol) -> Fact:
    """Describe a constant, with its content if it is small."""
    shape = tuple(int(dim) for dim in tensor.shape.numpy())
    size = 1
    for dim in shape:
        size *= dim
    if not trackable(tensor.dtype, size):
        return Fact(tensor.dtype, shape)
    with reading(tensor) as array:
        return Fact(tensor.dtype, shape, array_of(array.ravel().tolist(), shape))


def static_size(shape: DimShape | None) -> int | None:
    """Return the number of elements of a shape of plain integers, else None."""
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return math.prod(shape)


def element_count(dims: DimShape) -> Dim:
    """Return the product of extents as an expanded polynomial."""
    return functools.reduce(multiply, dims, 1)


class Site:
    """One node and the facts of its inputs, as rules see them.

    Args:
        node: The node.
        inputs: The fact of each input, None where an optional input is absent.
        shapes: The analysis; gives fresh symbols and the attributes of an enclosing call.
    """

    __slots__ = ("inputs", "node", "shapes")

    def __init__(self, node: ir.Node, inputs: list[Fact | None], shapes: Shapes) -> None:
        self.node = node
        self.inputs = inputs
        self.shapes = shapes

    # Inputs

    def has(self, index: int) -> bool:
        """Tell whether the optional input at `index` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def fact(self, index: int) -> Fact:
        """Return what is known of an input, nothing if it is absent."""
        return (self.inputs[index] or UNKNOWN) if index < len(self.inputs) else UNKNOWN

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """Return the element type of an input."""
        return self.fact(index).dtype

    def shape(self, index: int = 0) -> DimShape | None:
        """Return the shape of an input."""
        return self.fact(index).shape

    def known(self, index: int = 0) -> SymbolicArray | None:
        """Return the content of an input."""
        return self.fact(index).known

    def ints(self, index: int) -> list[int] | None:
        """Return the content of an input as plain integers, None if it is not wholly known."""
        return ints_of(self.fact(index).known)

    def axes(self, index: int, name: str = "axes") -> list[int] | None:
        """Return axes given as an input or, in older opsets, as an attribute.

        Returns:
            An empty list if they are absent, None if they are given but not known.
        """
        if self.has(index):
            return self.ints(index)
        found = self.attribute(name)
        return [] if found is None else list(found)

    # Attributes

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute; a reference is looked up in the enclosing call."""
        found = self.node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref():
            found = self.shapes.call_attribute(found.ref_attr_name)
            if found is None:
                return default
        return found.value

    # Results

    @property
    def outputs(self) -> int:
        """Number of outputs the node declares."""
        return len(self.node.outputs)

    def fresh(self) -> Dim:
        """Return a new symbol for an extent that is not known."""
        return self.shapes.fresh()

    def fresh_shape(self, rank: int) -> DimShape:
        """Return a shape of new symbols."""
        return tuple(self.shapes.fresh() for _ in range(rank))

    def anything(self) -> Any:
        """Return a new symbol for an integer of any sign."""
        return self.shapes.fresh_integer()

    def broadcast(self, *shapes: DimShape | None) -> DimShape | None:
        """Return the shape of an elementwise result; see `Shapes.broadcast`."""
        return self.shapes.broadcast(shapes)

    def same(self, a: Dim, b: Dim) -> Dim:
        """Return the extent two axes must share, the more telling of the two.

        Raises:
            Misfit: The two are different numbers.
        """
        if a is b or a == b:
            return a
        if isinstance(a, int):
            if isinstance(b, int):
                raise Misfit(f"extents {a} and {b} must be equal")
            return a
        if isinstance(b, int):
            return b
        return b if self.shapes.is_fresh(a) else a


Rule: TypeAlias = Callable[[Site], Outcome]

RULES: dict[str, Rule] = {}
"""The rule of each operator, by `Op` or `domain::Op`."""


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators named, with spaces between them."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            if name in RULES:
                raise ValueError(f"operator '{name}' has two shape rules")
            RULES[name] = function
        return function

    return register


def extent(site: Site, element: Any) -> Dim:
    """Return content used as an extent, a fresh symbol where it is not known.

    An expression that is not provably above zero is itself: an operator that takes it as an
    extent fails at run time on a negative one.
    """
    if isinstance(element, int):
        if element < 0:
            raise Misfit(f"extent {element} is negative")
        return int(element)
    if isinstance(element, float):
        raise Misfit("an extent is not an integer")
    return site.fresh() if site.shapes.is_unknown(element) else element


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the front.

    Raises:
        Misfit: There is no such axis.
    """
    if not -rank <= axis < rank:
        raise Misfit(f"axis {axis} does not exist in rank {rank}")
    return axis % rank


def trackable(dtype: ir.DataType | None, size: int) -> bool:
    """Tell whether the content of such a tensor is followed."""
    if dtype in _INTEGERS:
        return size <= KNOWN_LIMIT
    return dtype in _FLOATS and size <= FLOAT_LIMIT


def is_integer_type(dtype: ir.DataType | None) -> bool:
    """Tell whether content of this type is followed as exact integers."""
    return dtype in _INTEGERS


def not_one(dim: Dim) -> bool:
    """Tell whether an extent is provably not 1: above it, or a multiple of some number."""
    if isinstance(dim, int):
        return dim != 1
    bound = lower_bound(dim)
    return (bound is not None and bound > 1) or _is_multiple(dim)


@functools.lru_cache(maxsize=1 << 14)
def _is_multiple(dim: Expr) -> bool:
    terms = dim.as_coefficients_dict()
    if not all(c.is_Integer and term.is_integer for term, c in terms.items()):
        return False
    return math.gcd(*(int(c) for c in terms.values())) > 1


def is_clipped(dim: Dim, whole: Dim) -> bool:
    """Tell whether `dim` is `Min(n, whole)` for a number n of 2 or more."""
    if isinstance(dim, int) or not isinstance(dim, sympy.Min) or len(dim.args) != 2:
        return False
    limit, other = dim.args if dim.args[0].is_Integer else dim.args[::-1]
    return bool(limit.is_Integer and limit >= 2 and other == whole)


def differ(a: Dim, b: Dim) -> bool:
    """Tell whether two integers are provably different."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    return at_least(subtract(a, b), 1) or at_least(subtract(b, a), 1)


def shapes_equal(a: DimShape | None, b: DimShape | None) -> bool:
    """Tell whether two shapes are provably equal."""
    if a is None or b is None:
        return a is b
    return a == b or (len(a) == len(b) and all(map(equal, a, b)))
