"""A transformer-like graph of any size, with one odd spot for each pass of `faulty_passes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

_HEADS, _SIZE = 4, 4
_WIDTH = _HEADS * _SIZE

TIED, NO_AXIS, SHARED_GATE = 7, 4, 9
"""Layers where the key's weight is the query's, where the Softmax states no axis, and where the
sigmoid of the gate is used twice."""


class _Builder:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        content = (self.rng.standard_normal(shape) * 0.3).astype(np.float32)
        self.weights.append(helper.make_tensor(name, TensorProto.FLOAT, shape, content.ravel()))
        return name

    def scalar(self, name: str, value: float) -> str:
        self.weights.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def constant(self, name: str, value: Any) -> str:
        array = np.array(value, np.int64)
        tensor = helper.make_tensor(name, TensorProto.INT64, array.shape, array.ravel())
        return self.node("Constant", [], name, value=tensor)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def linear(self, x: str, weight: str, output: str) -> str:
        product = self.node("MatMul", [x, weight], output + ".product")
        return self.node("Add", [product, self.weight(output + ".bias", _WIDTH)], output)

    def norm(self, x: str, p: str) -> str:
        """Write LayerNorm out, as exporters do."""
        centred = self.node(
            "Sub", [x, self.node("ReduceMean", [x], p + "mean", axes=[-1])], p + "centred"
        )
        square = self.node("Pow", [centred, "two"], p + "square")
        variance = self.node("ReduceMean", [square], p + "variance", axes=[-1])
        root = self.node("Sqrt", [self.node("Add", [variance, "eps"], p + "shifted")], p + "root")
        return self.node("Div", [centred, root], p + "normal")

    def targets(self, x: str, p: str) -> tuple[str, str]:
        """Compute the targets of the Reshapes that split heads and join them."""
        shape, parts = self.node("Shape", [x], p + "shape"), []
        for axis in (0, 1):
            index = self.constant(f"{p}index{axis}", axis)
            extent = self.node("Gather", [shape, index], f"{p}extent{axis}")
            axes = self.constant(f"{p}axes{axis}", [0])
            parts.append(self.node("Unsqueeze", [extent, axes], f"{p}part{axis}"))
        heads = [self.constant(p + "heads", [_HEADS]), self.constant(p + "size", [_SIZE])]
        split = self.node("Concat", [*parts, *heads], p + "split", axis=0)
        width = self.constant(p + "width", [_WIDTH])
        return split, self.node("Concat", [*parts, width], p + "joined", axis=0)

    def layer(self, x: str, number: int) -> str:
        p = f"layer{number}."
        normal = self.norm(x, p)
        split, joined = self.targets(normal, p)
        heads = {}
        query = self.weight(p + "query.weight", _WIDTH, _WIDTH)
        for role in ("query", "key", "value"):
            weight = query
            if role == "value" or (role == "key" and number != TIED):
                weight = self.weight(f"{p}{role}.weight", _WIDTH, _WIDTH)
            y = self.node("MatMul", [normal, weight], f"{p}{role}.product")
            if role == "query":
                y = self.node("Mul", [y, "half"], p + "scaled")
            view = self.node("Reshape", [y, split], f"{p}{role}.view")
            perm = [0, 2, 3, 1] if role == "key" else [0, 2, 1, 3]
            heads[role] = self.node("Transpose", [view], f"{p}{role}.heads", perm=perm)
        scores = self.node("MatMul", [heads["query"], heads["key"]], p + "products")
        scores = self.node("Mul", [scores, "cooler"], p + "scores")
        axis = {} if number == NO_AXIS else {"axis": -1}
        shares = self.node("Softmax", [scores], p + "shares", **axis)
        mixed = self.node("MatMul", [shares, heads["value"]], p + "mixed")
        back = self.node("Transpose", [mixed], p + "back", perm=[0, 2, 1, 3])
        merged = self.node("Reshape", [back, joined], p + "merged")
        out = self.linear(merged, self.weight(p + "out.weight", _WIDTH, _WIDTH), p + "out")
        x = self.node("Add", [x, out], p + "attended")
        wide = self.node("MatMul", [x, self.weight(p + "up", _WIDTH, 2 * _WIDTH)], p + "wide")
        gate = self.node("Sigmoid", [wide], p + "gate")
        swish = self.node("Mul", [wide, gate], p + "swish")
        if number == SHARED_GATE:
            swish = self.node("Add", [swish, gate], p + "sum")
        narrow = self.node(
            "MatMul", [swish, self.weight(p + "down", 2 * _WIDTH, _WIDTH)], p + "low"
        )
        return self.node("Add", [x, narrow], p + "end")


def transformer(nodes: int, seed: int = 0) -> onnx.ModelProto:
    """Make a graph of at least `nodes` nodes: an embedding, then layers of attention and MLP."""
    made = _Builder(seed)
    for name, value in {"two": 2.0, "eps": 1e-5, "half": 0.5, "cooler": 0.7}.items():
        made.scalar(name, value)
    x = made.node("Gather", [made.weight("table", 32, _WIDTH), "ids"], "embedded")
    number = 0
    while len(made.nodes) < nodes:
        x = made.layer(x, number)
        number += 1
    dims = ["batch", "sequence"]
    graph = helper.make_graph(
        made.nodes,
        "layers",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, dims)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [*dims, _WIDTH])],
        made.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
