"""Which float32 values of a model become half precision, and which stay.

Two things decide. The operator's schema: an input or output that does not admit the half type
stays float32 (Resize's scales, the scales of QuantizeLinear before opset 19, ...). And numbers:
some float32 results have no useful half form, so the nodes that compute them are kept:

- positions and masks made from integers: float16 counts exactly only up to 2048, and rotary
  angles made of rounded positions are wrong at the end of a long text;
- squares, and what is computed from them alone (the inside of an RMS norm): they overflow
  float16 from 256 on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.core.module import Module
from lwc.core.walk import (
    attribute_graphs,
    constant_tensor,
    graph_and_subgraphs,
    is_default_domain,
    op_name,
)
from lwc.rewrite import RewriteLimit

__all__ = ["HalfPlan", "plan_half"]

_KEPT = frozenset(
    [
        "Range",
        "CumSum",
        "ConstantOfShape",
        "EyeLike",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "HannWindow",
        "HammingWindow",
        "BlackmanWindow",
        "MelWeightMatrix",
        "DFT",
        "STFT",
        "ReduceSumSquare",
        "ReduceL2",
        "ReduceLogSumExp",
        "Pow",
    ]
)
"""Operators that stay float32: counting, random numbers, windows, squares."""

_MOVES = (
    "Concat",
    "Slice",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "Reshape",
    "Transpose",
    "Expand",
    "Tile",
    "Trilu",
    "Identity",
)
"""Operators that only place elements."""

_CARRIERS = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Sqrt",
        "Reciprocal",
        "Pow",
        "Sin",
        "Cos",
        "MatMul",
        "Where",
        *_MOVES,
        "Cast",
        "Floor",
        "Max",
        "Min",
        "Clip",
        "ReduceMean",
        "ReduceSum",
    ]
)
"""Operators that stay float32 when all their floating-point inputs are kept or constants."""

_SATURATING = frozenset(
    [
        "Add",
        "Sub",
        "Where",
        "Max",
        "Min",
        "Clip",
        "Neg",
        *_MOVES,
    ]
)
"""Operators whose result saturates where a huge constant does: they move it, choose it or add to
it. A factor of 1e5 is no filler: its product with 1e-5 is a number like any other."""

_CARRIED_CONSTANT = 4096
"""A constant of more elements is a weight: what it meets is no longer position arithmetic."""

_READ = 1 << 14
"""Constants of more elements are not searched for huge numbers."""

_HALF_CONTRIB = frozenset(
    [
        "MatMulNBits",
        "MatMulBnb4",
        "GatherBlockQuantized",
        "Gelu",
        "FastGelu",
        "BiasGelu",
        "QuickGelu",
        "FusedMatMul",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "RotaryEmbedding",
    ]
)
"""com.microsoft operators all of whose floating-point operands share one type, float16 included."""

_CACHE_SCALES = 12, 13
"""Inputs of GroupQueryAttention that are float32 whatever its other operands are."""

_TYPE_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclass
class HalfPlan:
    """The decision.

    Attributes:
        half: The half type.
        opsets: The module's operator set versions, by domain.
        kept: Nodes all of whose floating-point operands stay float32, with the reason; the
            reason is None where it is the rule for that operator and needs no remark.
        far: Those of them that compute from finite constants beyond `limit`, such as a mask's
            -3.4e38; their results have to be clamped where they become half.
    """

    half: ir.DataType
    opsets: Mapping[str, int]
    kept: dict[ir.Node, str | None] = field(default_factory=dict)
    far: set[ir.Node] = field(default_factory=set)

    @property
    def limit(self) -> float:
        """The largest finite number of the half type."""
        return 65504.0 if self.half == ir.DataType.FLOAT16 else float.fromhex("0x1.fep127")

    def wants(self, node: ir.Node, index: int) -> bool:
        """Tell whether the node reads its input as half precision."""
        return node not in self.kept and self._admits(node, index, "inputs")

    def makes(self, node: ir.Node, index: int) -> bool:
        """Tell whether the node makes its output in half precision."""
        return node not in self.kept and self._admits(node, index, "outputs")

    def _admits(self, node: ir.Node, index: int, side: str) -> bool:
        if side == "inputs" and index in _CACHE_SCALES and node.op_type == "GroupQueryAttention":
            return False
        schema = _schema(node.op_type, node.domain, self.opsets.get(node.domain, 1))
        formals: Any = () if schema is None else getattr(schema, side)
        if not formals:
            return True
        admitted = formals[min(index, len(formals) - 1)].types
        return _TYPE_NAMES[self.half] in admitted or "tensor(float)" not in admitted


def plan_half(
    module: Module,
    shapes: Shapes,
    half: ir.DataType,
    excluded: Callable[[ir.Node], bool],
    limit: RewriteLimit,
) -> HalfPlan:
    """Decide for every node of the main graph and its subgraphs; function bodies stay.

    A node that computes in half precision counts as one rewrite; those after `limit` are kept.
    """
    plan = HalfPlan(half, module.graph.opset_imports)
    for node in _in_order(module.graph):
        if any(True for _ in attribute_graphs(node)):
            continue
        reason = _foreign(node, module, half)
        if reason is not None:
            plan.kept[node] = reason
        elif excluded(node):
            plan.kept[node] = "it is excluded"
        elif node.op_type not in _SATURATING and (huge := _beyond(node, plan.limit)) is not None:
            plan.kept[node] = f"'{huge}' holds numbers beyond {half.name.lower()}'s range"
        elif limit.exhausted or (
            is_default_domain(node)
            and (node.op_type in _KEPT or _counts(node, shapes) or _carries(node, shapes, plan))
        ):
            plan.kept[node] = None
        elif node.op_type != "Constant" and _touches_float(node, shapes):
            limit.spend("to-half", node)
        if node in plan.kept and (
            _beyond(node, plan.limit) is not None
            or any(value is not None and value.producer() in plan.far for value in node.inputs)
        ):
            plan.far.add(node)
    return plan


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    for current in graph_and_subgraphs(graph):
        yield from current


def _touches_float(node: ir.Node, shapes: Shapes) -> bool:
    operands = (*node.inputs, *node.outputs)
    return any(v is not None and shapes.dtype(v) == ir.DataType.FLOAT for v in operands)


def _foreign(node: ir.Node, module: Module, half: ir.DataType) -> str | None:
    if node.op_identifier() in module.model.functions:
        return "it calls a function, whose body stays float32"
    if is_default_domain(node) or node.domain == "ai.onnx.ml":
        return None
    if node.domain == "com.microsoft" and node.op_type in _HALF_CONTRIB:
        return None if half == ir.DataType.FLOAT16 else f"{op_name(node)} has no {half} form"
    return f"whether {op_name(node)} has a {half} form is not known"


def _beyond(node: ir.Node, limit: float) -> str | None:
    """Name a constant the node computes from that holds finite numbers beyond `limit`."""
    for value in node.inputs:
        if value is not None and _exceeds(constant_tensor(value), limit):
            return str(value.name)
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        filler = node.attributes["value"]
        if not filler.is_ref() and _exceeds(filler.as_tensor(), limit):
            return str(node.outputs[0].name)
    return None


def _exceeds(tensor: ir.TensorProtocol | None, limit: float) -> bool:
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size > _READ:
        return False
    array = tensor.numpy()
    return bool((np.isfinite(array) & (np.abs(array) > limit)).any())


def _counts(node: ir.Node, shapes: Shapes) -> bool:
    """Tell whether the node makes float32 of integers, deliberately of half, or a square."""
    if node.op_type == "Cast":
        source = node.inputs[0]
        return source is not None and shapes.dtype(source) not in (ir.DataType.FLOAT, None)
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _carries(node: ir.Node, shapes: Shapes, plan: HalfPlan) -> bool:
    """Tell whether all that the node computes with is kept or a small constant."""
    if node.op_type not in _CARRIERS:
        return False
    carried = False
    for value in node.inputs:
        if value is None or shapes.dtype(value) != ir.DataType.FLOAT:
            continue
        constant = constant_tensor(value)
        if constant is not None:
            if constant.size > _CARRIED_CONSTANT:
                return False
        elif value.producer() in plan.kept:
            carried = True
        else:
            return False
    return carried


@functools.cache
def _schema(op_type: str, domain: str, version: int) -> Any:
    """Return the schema, or None for an operator that ONNX does not define."""
    if not onnx.defs.has(op_type, domain):
        return None
    return onnx.defs.get_schema(op_type, version, domain)
