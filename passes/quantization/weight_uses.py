"""Which constants are weights of linear layers and embeddings, and everything that reads them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.module import Module
from lwc.core.walk import constant_tensor, is_default_domain
from lwc.core.weights import reading

__all__ = ["Role", "WeightUse", "WeightUses", "find_weights", "matrix"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Role: TypeAlias = Literal["MatMul", "Gemm", "Gather"]

_OPERAND: dict[str, int] = {"MatMul": 1, "Gemm": 1, "Gather": 0}
"""Which input of the operator may be a weight."""


@dataclass(frozen=True)
class WeightUse:
    """One node that reads a weight.

    Attributes:
        node: The node.
        role: Its operator.
        transposed: Whether it sees the constant, as it is stored, as `[outputs, inputs]`.
    """

    node: ir.Node
    role: Role
    transposed: bool


@dataclass(frozen=True)
class WeightUses:
    """A constant matrix with all that reads it.

    Attributes:
        value: The initializer, or the output of the Constant node.
        tensor: Its content.
        uses: The linear layers and embeddings that read it, directly or through a Transpose.
        obstacle: Why it must stay as it is, or None.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    uses: tuple[WeightUse, ...]
    obstacle: str | None

    @property
    def tied(self) -> bool:
        """Whether an embedding and a linear layer share it."""
        return len({use.role == "Gather" for use in self.uses}) == 2

    @property
    def extents(self) -> tuple[int, int]:
        """Inputs and outputs of the layer."""
        rows, columns = self.tensor.shape.numpy()
        return (columns, rows) if self.uses[0].transposed else (rows, columns)

    def read_in(self, graph: ir.Graph) -> bool:
        """Tell whether nodes of this graph alone read it, and none of its subgraphs."""
        return all(use.node.graph is graph for use in self.uses)

    def multiplies(self, values: Container[ir.Value]) -> bool:
        """Tell whether all its products have one of these values on the left."""
        return all(use.role == "Gather" or use.node.inputs[0] in values for use in self.uses)

    def belongs_to(self, graph: ir.Graph) -> bool:
        """Tell whether it is an initializer, and nodes of this graph alone read it."""
        return self.value.is_initializer() and self.read_in(graph)


def matrix(
    tensor: ir.TensorProtocol, transposed: bool, dtype: type[np.floating[Any]] | None = None
) -> Array:
    """Return a copy of a weight as `[inputs, outputs]`.

    Args:
        tensor: The weight.
        transposed: Whether it lies as `[outputs, inputs]`.
        dtype: Type of the copy; by default that of the weight.
    """
    with reading(tensor) as array:
        return np.array(array.T if transposed else array, dtype)


def find_weights(module: Module) -> Iterator[WeightUses]:
    """Yield every floating-point constant that MatMul, Gemm or Gather use as a weight, once.

    They come in the order of their first use.
    """
    seen: set[ir.Value] = set()
    for node in module.nodes():
        index = _OPERAND.get(node.op_type)
        if index is None or not is_default_domain(node) or len(node.inputs) <= index:
            continue
        value = _source(node.inputs[index])
        if value is None or value in seen:
            continue
        seen.add(value)
        tensor = constant_tensor(value)
        if tensor is None or not tensor.dtype.is_floating_point() or _is_lookup(node, tensor):
            continue
        uses, obstacle = _trace(value, flipped=False)
        if value.is_graph_output():
            obstacle = "it is a graph output"
        elif len({use.transposed for use in uses}) > 1:
            obstacle = "its uses disagree on which axis is the layer's input"
        if len(tensor.shape) != 2:
            obstacle = f"it has rank {len(tensor.shape)}"
        elif 0 in tensor.shape.numpy():
            obstacle = "it holds no numbers"
        yield WeightUses(value, tensor, tuple(uses), obstacle)


def _turns(transpose: ir.Node) -> bool:
    """Tell whether a Transpose of a matrix swaps its axes; it may also leave them."""
    order = transpose.attributes.get("perm")
    return order is None or list(order.as_ints()) != [0, 1]


def _source(value: ir.Value | None) -> ir.Value | None:
    """Follow Transpose nodes up to the value they read."""
    while value is not None:
        producer = value.producer()
        if producer is None or producer.op_type != "Transpose" or not is_default_domain(producer):
            return value
        value = producer.inputs[0]
    return None


def _trace(value: ir.Value, flipped: bool) -> tuple[list[WeightUse], str | None]:
    """Collect what reads `value`; the obstacle is the first reader that is no linear layer."""
    uses: list[WeightUse] = []
    obstacle: str | None = None
    for node, index in value.uses():
        reason: str | None = None
        if node.op_type == "Transpose" and is_default_domain(node):
            if node.outputs[0].is_graph_output():
                reason = "its transpose is a graph output"
            else:
                below, reason = _trace(node.outputs[0], flipped != _turns(node))
                uses.extend(below)
        elif not is_default_domain(node) or _OPERAND.get(node.op_type) != index:
            reason = f"{node.op_type} reads it too"
        elif node.op_type == "MatMul":
            uses.append(WeightUse(node, "MatMul", flipped))
        elif node.op_type == "Gemm":
            if _integer(node, "transA", 0):
                reason = "its Gemm transposes the left operand"
            uses.append(WeightUse(node, "Gemm", flipped != bool(_integer(node, "transB", 0))))
        else:
            if _integer(node, "axis", 0) not in (0, -2):
                reason = "its Gather does not select rows"
            uses.append(WeightUse(node, "Gather", not flipped))
        obstacle = obstacle or reason
    return uses, obstacle


def _is_lookup(gather: ir.Node, tensor: ir.TensorProtocol) -> bool:
    """Tell whether a Gather looks up numbers, or scales or zero points of a quantized table."""
    return gather.op_type == "Gather" and (
        len(tensor.shape) < 2
        or any(
            user.op_type == "DequantizeLinear" and index > 0
            for user, index in gather.outputs[0].uses()
        )
    )


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref():
        return default
    return attribute.as_int()
