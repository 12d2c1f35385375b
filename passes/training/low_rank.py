"""Low-rank adapters in a graph: y = x·W + s·(x·A)·B (Hu et al. 2022, LoRA), found by dataflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lwc.core.walk import constant_tensor, op_name
from lwc.passes.quantization.dialect_ops import MATMUL, variant_of
from lwc.rewrite import Editor, attribute, producer_of

__all__ = ["Adapter", "Factor", "adapter_at", "factor_of", "find_adapters", "product_extents"]

_NBITS = ("com.microsoft::MatMulNBits", "com.microsoft::MatMulBnb4")
_LINEAR = ("MatMul", "Gemm", *_NBITS, "com.microsoft::DynamicQuantizeMatMul", MATMUL)
_FIXED_DEPTH = 4
"""Nodes between a product and the constants that its weight is computed from, such as
DequantizeLinear and Transpose."""


@dataclass(frozen=True)
class Factor:
    """A constant matrix that a product reads on its right.

    Attributes:
        value: The constant.
        tensor: Its content.
        transposed: Whether the product sees it turned.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool

    @property
    def extents(self) -> tuple[int, int]:
        """Inputs and outputs of the product."""
        rows, columns = self.tensor.shape.numpy()
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Adapter:
    """An adapter beside a linear operator of the same input.

    Attributes:
        sum: The Add of both.
        side: Which input of the sum is the adapter's.
        base: The linear operator.
        down: A, `[inputs, rank]`.
        up: B, `[rank, outputs]`.
        scale: What multiplies their product.
    """

    sum: ir.Node
    side: int
    base: ir.Node
    down: Factor
    up: Factor
    scale: float


def find_adapters(edit: Editor) -> Iterator[Adapter]:
    """Yield the adapters of the main graph, in its order."""
    for node in edit.module.graph:
        found = adapter_at(node, edit) if op_name(node) == "Add" else None
        if found is not None:
            yield found


def adapter_at(node: ir.Node, edit: Editor) -> Adapter | None:
    """Read an Add as the sum of a linear operator and its adapter.

    The scale may stand anywhere in the adapter, a bias before or behind the sum, and other adapters
    between it and the operator. Nothing else may read what lies between.
    """
    for side in (1, 0):
        low = _low_rank(node.inputs[side], edit)
        if low is None or node.inputs[0] is node.inputs[1]:
            continue
        source, down, up, scale = low
        base = _base(node.inputs[1 - side], source, node, edit)
        if base is not None:
            operator, factor = base
            extents = product_extents(operator, edit)
            if extents is not None and extents == (down.extents[0], up.extents[1]):
                return Adapter(node, side, operator, down, up, scale * factor)
    return None


def product_extents(node: ir.Node | None, edit: Editor) -> tuple[int, int] | None:
    """Return inputs and outputs of an operator x·W with a weight that never changes, else None.

    The weight is a constant matrix, or is computed from constants, as a quantized one is.
    """
    if node is None or op_name(node) not in _LINEAR or len(node.inputs) < 2:
        return None
    if any(each.is_ref() for each in node.attributes.values()) or node.inputs[0] is None:
        return None
    if op_name(node) in _NBITS:
        if not attribute(node, "transB", 1):
            return None
        return int(attribute(node, "K")), int(attribute(node, "N"))
    variant = variant_of(node)
    if variant is not None:
        plain = not variant.gated and variant.activation == "none"
        return (variant.K, variant.N) if plain else None
    shape = edit.shape(node.inputs[1])
    if shape is None or len(shape) != 2 or not _is_fixed(node.inputs[1]):
        return None
    if attribute(node, "transA", 0) or _is_fixed(node.inputs[0]):
        return None
    rows, columns = shape
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return (columns, rows) if attribute(node, "transB", 0) else (rows, columns)


def factor_of(node: ir.Node | None) -> Factor | None:
    """Return the constant matrix that a MatMul or Gemm multiplies by, else None."""
    if node is None or op_name(node) not in ("MatMul", "Gemm"):
        return None
    if any(each.is_ref() for each in node.attributes.values()) or attribute(node, "transA", 0):
        return None
    value, turned = node.inputs[1], bool(attribute(node, "transB", 0))
    turn = producer_of(value, "Transpose")
    if turn is not None and list(attribute(turn, "perm", [1, 0])) == [1, 0]:
        value, turned = turn.inputs[0], not turned
    tensor = constant_tensor(value)
    if value is None or tensor is None or len(tensor.shape) != 2:
        return None
    return Factor(value, tensor, turned) if tensor.dtype.is_floating_point() else None


def _low_rank(
    value: ir.Value | None, edit: Editor
) -> tuple[ir.Value, Factor, Factor, float] | None:
    """Read a value as s·(x·A)·B: return x, A, B and s."""
    factors: list[Factor] = []
    scale = 1.0
    while value is not None and len(factors) < 2:
        node = value.producer()
        if node is None or not edit.single_use(value):
            return None
        scaled = _scaled(node, edit)
        factor = factor_of(node)
        if scaled is not None:
            value, scale = scaled[0], scale * scaled[1]
        elif factor is not None and not (len(node.inputs) > 2 and node.inputs[2] is not None):
            factors.append(factor)
            scale *= attribute(node, "alpha", 1.0)
            value = node.inputs[0]
        else:
            return None
    if value is None:
        return None
    up, down = factors
    return (value, down, up, scale) if down.extents[1] == up.extents[0] else None


def _scaled(node: ir.Node, edit: Editor) -> tuple[ir.Value | None, float] | None:
    """Read a node as the multiple of a value: return the value and the number."""
    if producer_of(node.outputs[0], "Identity") is not None:
        return node.inputs[0], 1.0
    if producer_of(node.outputs[0], "Mul", "Div") is None:
        return None
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        tensor, number = constant_tensor(node.inputs[place]), edit.scalar(node.inputs[place])
        rank = edit.rank(node.inputs[1 - place])
        plain = tensor is not None and rank is not None and len(tensor.shape) <= rank
        if number is not None and plain and tensor is not None and tensor.size == 1:
            if node.op_type == "Mul":
                return node.inputs[0 if place else 1], float(number)
            return (node.inputs[0], 1 / float(number)) if number else None
    return None


def _base(
    value: ir.Value | None, source: ir.Value, sum_: ir.Node, edit: Editor
) -> tuple[ir.Node, float] | None:
    """Follow sums down to a linear operator that reads the adapter's source.

    Returns:
        The operator, and the multiple of its input that the adapter reads.
    """
    node = None if value is None else value.producer()
    if node is None or value is None or not edit.single_use(value) or node.graph is not sum_.graph:
        return None
    if product_extents(node, edit) is not None:
        factor = _multiple(source, node.inputs[0], edit)
        return None if factor is None else (node, factor)
    if op_name(node) != "Add":
        return None
    found = (_base(operand, source, sum_, edit) for operand in node.inputs)
    return next((each for each in found if each is not None), None)


def _multiple(value: ir.Value | None, other: ir.Value | None, edit: Editor) -> float | None:
    """Return the number by which one value is a multiple of another, or None."""
    while (step := producer_of(other, "Identity")) is not None:
        other = step.inputs[0]
    factor = 1.0
    while value is not other:
        node = None if value is None else value.producer()
        scaled = None if node is None else _scaled(node, edit)
        if scaled is None:
            return None
        value, factor = scaled[0], factor * scaled[1]
    return factor


def _is_fixed(value: ir.Value | None, depth: int = _FIXED_DEPTH) -> bool:
    """Tell whether a value is computed from constants alone."""
    if value is None or constant_tensor(value) is not None:
        return True
    node = value.producer()
    if node is None or not depth or not node.inputs:
        return False
    return all(_is_fixed(each, depth - 1) for each in node.inputs)
