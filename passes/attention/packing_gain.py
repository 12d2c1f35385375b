"""Does one linear operator pay against several? The cost model's answer, on graphs of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.predict import predict
from lwc.analysis.target import Target
from lwc.core.dialect import DOMAIN
from lwc.core.module import Module
from lwc.passes.attention.linears import Linear

__all__ = ["DECODE", "PREFILL", "Gain"]

DECODE, PREFILL = 1, 512
"""Tokens of one step of generation, and of a prompt."""


class Gain:
    """Compares linear operators apart with one that gives all of their columns.

    On a measured target the predicted seconds decide. Without one the bytes that are moved do:
    one operator reads the activation once, and a Split reads and writes every column again.

    Args:
        target: The measured machine, or None.
        opset: Version of the standard operators.
    """

    def __init__(self, target: Target | None, opset: int) -> None:
        self._target = target
        self._opset = opset
        self._known: dict[object, float] = {}

    def objection(
        self, linears: Sequence[Linear], tokens: Sequence[int], *, cut: bool
    ) -> str | None:
        """Say at which size one operator does not pay, or return None.

        Args:
            linears: Operators of one kind.
            tokens: Numbers of tokens at which it must pay.
            cut: Whether a Split must follow.
        """
        form = "split" if cut else "whole"
        for count in tokens:
            before, after = (self._measure(linears, count, each) for each in ("apart", form))
            if after >= before:
                what = "one node and a Split take" if cut else "one node takes"
                return f"at {count} token{'s' * (count > 1)} {what} {self._shown(after, before)}"
        return None

    def _shown(self, after: float, before: float) -> str:
        if self._target is None:
            return f"{after:.0f} bytes to and from memory, not {before:.0f}"
        return f"{1e6 * after:.1f} microseconds as predicted, not {1e6 * before:.1f}"

    def _measure(self, linears: Sequence[Linear], tokens: int, form: str) -> float:
        """Return seconds, or bytes, of operators `apart`, as one (`whole`), or cut (`split`)."""
        first = linears[0]
        key = (first.kind, _depth(first), tuple(each.columns for each in linears), tokens, form)
        found = self._known.get(key)
        if found is None:
            cost = AnalysisManager(self._model(linears, tokens, form)).get(Cost)
            if self._target is None:
                found = float(int(cost.total.traffic))
            else:
                found = predict(cost, self._target, {}).seconds
            self._known[key] = found
        return found

    def _model(self, linears: Sequence[Linear], tokens: int, form: str) -> Module:
        """Make a graph of these operators alone, on zeros of their shapes."""
        first = linears[0]
        inputs = _depth(first)
        turned = first.node.op_type == "Gemm" and bool(first.node.attributes.get_int("transA", 0))
        source = ir.Value(
            name="x",
            type=ir.TensorType(first.source.dtype or ir.DataType.FLOAT),
            shape=ir.Shape([inputs, tokens] if turned else [tokens, inputs]),
        )
        weights: list[ir.Value] = []
        groups = [[each] for each in linears] if form == "apart" else [list(linears)]
        nodes = [_node(group, source, weights) for group in groups]
        ends = [node.outputs[0] for node in nodes]
        if form == "split":
            sizes = np.array([each.columns for each in linears], np.int64)
            cuts = _weight(ir.Tensor(sizes), weights)
            axis = ir.AttrInt64("axis", -1)
            node = ir.Node("", "Split", [*ends, cuts], [axis], num_outputs=len(linears))
            nodes.append(node)
            ends = list(node.outputs)
        graph = ir.Graph(
            [source], ends, nodes=nodes, initializers=weights, name="gain",
            opset_imports={"": self._opset, "com.microsoft": 1, DOMAIN: 1},
        )  # fmt: skip
        return Module(ir.Model(graph, ir_version=10))


def _depth(linear: Linear) -> int:
    """Return the inputs of a linear operator."""
    if "K" in linear.node.attributes:
        return linear.node.attributes["K"].as_int()
    return linear.weights[1].shape.numpy()[1 - linear.axis]


def _node(group: Sequence[Linear], source: ir.Value, weights: list[ir.Value]) -> ir.Node:
    first = group[0]
    columns = sum(each.columns for each in group)
    inputs: list[ir.Value | None] = [source]
    for place in range(1, 1 + max(first.weights)):
        tensor = first.weights.get(place)
        if tensor is None:
            inputs.append(None)
            continue
        shape = list(tensor.shape.numpy())
        axis = first.axis if place == 1 else 0
        if shape:
            shape[axis] = shape[axis] * columns // first.columns
        inputs.append(_weight(_zeros(tensor.dtype, tuple(shape)), weights))
    attributes = [each for name, each in first.node.attributes.items() if name != "N"]
    if "N" in first.node.attributes:
        attributes.append(ir.AttrInt64("N", columns))
    return ir.Node(first.node.domain, first.node.op_type, inputs, attributes)


def _weight(tensor: ir.TensorProtocol, weights: list[ir.Value]) -> ir.Value:
    name = f"w{len(weights)}"
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )  # fmt: skip
    weights.append(value)
    return value


def _zeros(dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """Return zeros that take memory only where someone reads them."""
    return ir.LazyTensor(
        lambda: ir.Tensor(np.zeros(shape, dtype.numpy()), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(shape),
    )
