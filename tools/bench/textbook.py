"""Multiply-adds by the textbook, on shapes that a real run had, and onnx-tool's ways of counting.

Independent of lwc's cost model and of onnx-tool: shapes come from ONNX Runtime's profile of a run
of the graph as it is written, bodies of control flow as they ran, and the formulas are written
anew. Next to each formula stand the ones onnx-tool uses instead, so that a difference between the
two programs is explained only where the explanation gives onnx-tool's number exactly.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnx import helper

Shape = Sequence[int]


@dataclass(frozen=True)
class Ran:
    """One execution of a node: shapes of the inputs and outputs that are present, attributes."""

    name: str
    op: str
    inputs: list[list[int]]
    outputs: list[list[int]]
    attributes: Mapping[str, Any]


def executions(path: Path, feed: Mapping[str, Any]) -> list[Ran]:
    """Run a model as it is written and return what each node saw.

    Args:
        path: A model whose nodes, those of subgraphs included, have names of their own.
        feed: Its inputs.
    """
    attributes = {
        node.name: {
            attribute.name: helper.get_attribute_value(attribute)
            for attribute in node.attribute
            if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR)
        }
        for node in _nodes(onnx.load(path, load_external_data=False).graph)
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # it hides weights
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "run"))
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = []
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"] and name in attributes:
            shapes = (_shapes(event["args"][f"{side}_type_shape"]) for side in ("input", "output"))
            ran.append(Ran(name, event["args"]["op_name"], *shapes, attributes[name]))
    return ran


def _nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def stored_parameters(path: Path) -> int:
    """Return the elements of the weights that nodes read: floating-point, or of 8 bits and less.

    Weights are initializers and Constant nodes of the graph and its subgraphs; wider integers are
    shapes and indices.
    """
    elements: dict[str, int] = {}
    read: set[str] = set()
    graphs = [onnx.load(path, load_external_data=False).graph]
    while graphs:
        graph = graphs.pop()
        tensors = [(tensor.name, tensor) for tensor in graph.initializer]
        for node in graph.node:
            read.update(node.input)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    graphs.append(attribute.g)
                elif node.op_type == "Constant" and attribute.type == onnx.AttributeProto.TENSOR:
                    tensors.append((node.output[0], attribute.t))
        for name, tensor in tensors:
            if tensor.data_type in _WEIGHT_TYPES:
                elements[name] = math.prod(tensor.dims)
    return sum(elements[name] for name in read & elements.keys())


_WEIGHT_TYPES = frozenset(
    value
    for name, value in onnx.TensorProto.DataType.items()
    if name in ("DOUBLE", "INT8", "UINT8", "INT4", "UINT4") or "FLOAT" in name
)


def _shapes(listed: list[dict[str, list[int]]]) -> list[list[int]]:
    return [next(iter(entry.values())) for entry in listed]


def _conv(node: Ran) -> int:
    """Every element of the result sums channels of its group × window; padding counts."""
    return math.prod(node.outputs[0]) * math.prod(node.inputs[1][1:])


def _conv_transpose(node: Ran) -> int:
    """Every input element meets every tap of every channel out; what pads crop counts too."""
    return math.prod(node.inputs[0]) * math.prod(node.inputs[1][1:])


def _matmul(node: Ran) -> int:
    return math.prod(node.outputs[0]) * node.inputs[0][-1]


def _gemm(node: Ran) -> int:
    return math.prod(node.outputs[0]) * node.inputs[0][0 if node.attributes.get("transA") else 1]


def _lstm(node: Ran) -> int:
    """Four gates, each a product with the input and one with the state."""
    (steps, batch, width), (directions, hidden) = node.inputs[0], node.inputs[2][::2]
    return steps * batch * directions * 4 * hidden * (width + hidden)


def _batch_norm(node: Ran) -> int:
    """At inference x·a + b with constants a and b for each channel."""
    return math.prod(node.outputs[0])


def _resize(node: Ran) -> int:
    """Two neighbours (cubic: four) on each axis that changes; nearest multiplies nothing."""
    taps = {b"linear": 2, b"cubic": 4}.get(node.attributes.get("mode", b"nearest"), 0)
    axes = sum(a != b for a, b in zip(node.inputs[0], node.outputs[0], strict=True))
    return math.prod(node.outputs[0]) * taps**axes if taps else 0


FORMULAS: dict[str, Callable[[Ran], int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "LSTM": _lstm,
    "BatchNormalization": _batch_norm,
    "Resize": _resize,
}
"""Operators made of multiply-adds, and their number."""


def _result(node: Ran) -> int:
    return math.prod(node.outputs[0])


def _window_over_result(node: Ran) -> int:
    bias = _result(node) if len(node.inputs) > 2 else 0
    return _result(node) * math.prod(node.inputs[1][1:]) + bias


def _lstm_weighed(node: Ran) -> int:
    (steps, batch, _), hidden, biases = node.inputs[0], node.inputs[2][2], node.inputs[3]
    cell = 4 + 3 * 32 + 2 * 38 + 4  # its weights: exp is 32, tanh 38
    return _lstm(node) + steps * batch * (math.prod(biases) + hidden * cell)


_HABITS: dict[str, tuple[Callable[[Ran], int], str]] = {
    "Conv": (
        lambda node: _conv(node) + (_result(node) if len(node.inputs) > 2 else 0),
        "adds 1 per element for the bias",
    ),
    "Gemm": (
        lambda node: _gemm(node) + (_result(node) if len(node.inputs) > 2 else 0),
        "adds 1 per element for the bias",
    ),
    "ConvTranspose": (
        _window_over_result,
        "counts result × channels out × window (+ bias): strides and channels in are left out",
    ),
    "LSTM": (_lstm_weighed, "adds biases, and the gates at its weights (exp 32, tanh 38)"),
    "BatchNormalization": (
        lambda node: 31 * _result(node),
        "charges 31 per element: a root (24) and a division (4) that are constants of the channel",
    ),
    "Resize": (
        lambda node: _result(node) * {b"linear": 4, b"cubic": 8}.get(node.attributes["mode"], 0),
        "counts 8 neighbours where cubic interpolation of an image has 16",
    ),
}


UNEXPLAINED = "is not what any formula here gives"


def count(ran: Iterable[Ran]) -> Counter[str]:
    """Return the multiply-adds by operator."""
    macs: Counter[str] = Counter()
    for node in ran:
        if node.op in FORMULAS:
            macs[node.op] += FORMULAS[node.op](node)
    return macs


def explain(op: str, theirs: int, ran: Sequence[Ran]) -> str:
    """Say why onnx-tool has `theirs` multiply-adds for an operator, if a formula gives that."""
    if theirs == 0:
        return "counts none"
    habit, reason = _HABITS.get(op, (None, ""))
    if habit is not None and sum(habit(node) for node in ran if node.op == op) == theirs:
        return reason
    return UNEXPLAINED
