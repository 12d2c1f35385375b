"""The vocabulary of cost rules: what a rule sees, what it returns, how it is found.

Counting rules, the same for every operator:

* A multiply-add is one MAC and two FLOPs.
* One arithmetic operation, comparison, selection or primitive function (exp, erf, tanh, sqrt,
  sigmoid, ...) on one element is one FLOP, whatever it costs on a given processor.
* Moving, converting, indexing and generating data is no FLOP; it is traffic.
* The graph is counted as it is written: padding positions of a convolution and masked positions
  of an attention are computed by the operator's definition, so they count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import onnx_ir as ir

from lwc.core.dims import Dim, DimShape, product, simplify_dim

__all__ = [
    "MS",
    "CostRule",
    "Operands",
    "UnknownCost",
    "Work",
    "cost_rule",
    "find_rule",
    "packed_bytes",
    "total",
]

MS = "com.microsoft::"
"""Prefix of ONNX Runtime's own operators in rule names."""


class UnknownCost(Exception):
    """The operands do not say enough to count: a shape, a rank or an attribute is missing."""


@dataclass(frozen=True)
class Work:
    """What one execution of a node does.

    Attributes:
        macs: Multiply-adds.
        other_flops: Floating-point operations besides the multiply-adds.
        read: Bytes read, or None for the size of all inputs.
        written: Bytes written, or None for the size of all outputs.
        scratch: Bytes of workspace the kernel holds while it runs, besides its outputs.
        kernel: The kernel table of a `Target` that tells its time: `matmul`, `softmax`, ...
        problem: The problem size in that table's axes.
        repeat: How often the kernel runs on that problem.
    """

    macs: Dim = 0
    other_flops: Dim = 0
    read: Dim | None = None
    written: Dim | None = None
    scratch: Dim = 0
    kernel: str = ""
    problem: tuple[Dim, ...] = ()
    repeat: Dim = 1


@dataclass(frozen=True)
class Operands:
    """What a rule sees of a node. Equal operands give equal work, so rules are memoised on them.

    Attributes:
        op: `Op` or `domain::Op`.
        inputs: Shapes; None for an absent input or an unknown shape.
        outputs: Shapes; None where unknown.
        input_types: Element types; None where absent or unknown.
        output_types: Element types.
        constant: Whether each input is a weight.
        attributes: Plain attributes (numbers, strings, lists of them).
    """

    op: str
    inputs: tuple[DimShape | None, ...]
    outputs: tuple[DimShape | None, ...]
    input_types: tuple[ir.DataType | None, ...]
    output_types: tuple[ir.DataType | None, ...]
    constant: tuple[bool, ...]
    attributes: Mapping[str, Any] = field(hash=False, compare=False)
    attribute_key: tuple[Any, ...] = ()

    def has(self, index: int) -> bool:
        """Tell whether input `index` is given."""
        return index < len(self.inputs) and self.input_types[index] is not None

    def shape(self, index: int) -> DimShape:
        """Return the shape of an input.

        Raises:
            UnknownCost: It is absent or not known.
        """
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise UnknownCost(f"the shape of input {index} is not known")
        return found

    def out(self, index: int = 0) -> DimShape:
        """Return the shape of an output.

        Raises:
            UnknownCost: It is not known.
        """
        found = self.outputs[index] if index < len(self.outputs) else None
        if found is None:
            raise UnknownCost(f"the shape of output {index} is not known")
        return found

    def size(self, index: int) -> Dim:
        """Return the number of elements of an input."""
        return product(self.shape(index))

    def out_size(self, index: int = 0) -> Dim:
        """Return the number of elements of an output."""
        return product(self.out(index))

    def nbytes(self, index: int) -> Dim:
        """Return the size of an input in bytes; 0 for one that is absent."""
        return _nbytes(self.shape(index), self.input_types[index]) if self.has(index) else 0

    def out_nbytes(self, index: int = 0) -> Dim:
        """Return the size of an output in bytes."""
        return _nbytes(self.out(index), self.output_types[index])

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute's plain value."""
        return self.attributes.get(name, default)


def _nbytes(shape: DimShape, dtype: ir.DataType | None) -> Dim:
    if dtype is None:
        raise UnknownCost("an element type is not known")
    if dtype == ir.DataType.STRING:
        return 0  # strings live in their own heap blocks of unknown length
    return packed_bytes(product(shape), dtype.bitwidth)


def packed_bytes(elements: Dim, bits: int) -> Dim:
    """Return the bytes of `elements` packed elements of `bits` bits."""
    if isinstance(elements, int):
        return -(-elements * bits // 8)
    return elements * (bits // 8) if bits % 8 == 0 else elements * bits / 8


CostRule: TypeAlias = Callable[[Operands], Work]

_RULES: dict[str, CostRule] = {}


def cost_rule(*ops: str) -> Callable[[CostRule], CostRule]:
    """Register a rule for the operators named `Op` or `domain::Op`."""

    def register(rule: CostRule) -> CostRule:
        for op in ops:
            if op in _RULES:
                raise ValueError(f"two cost rules for {op}")
            _RULES[op] = rule
        return rule

    return register


def find_rule(op: str) -> CostRule | None:
    """Return the rule of an operator, or None."""
    return _RULES.get(op)


def total(items: Sequence[Dim]) -> Dim:
    """Add extents."""
    result: Dim = 0
    for item in items:
        result = result + item
    return simplify_dim(result)
