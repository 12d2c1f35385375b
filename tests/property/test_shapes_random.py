"""Random graphs of shape arithmetic: whatever inference claims, ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from shape_oracle import compare

from lwc.core import dims
from lwc.core.dims import evaluate, symbol
from lwc.core.module import Module

SIZES = st.integers(min_value=1, max_value=7)


class Graph:
    """A random graph under construction, with the true shape of every value beside it."""

    def __init__(self, a: int, b: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {"x": (a, b, 6), "z": (b, 4)}

    def constant(self, values: list[int]) -> str:
        name = f"c{len(self.constants)}"
        array = np.array(values, dtype=np.int64)
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.shapes[name] = shape
        return name

    def module(self) -> Module:
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", 6]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 4]),
        ]
        last = helper.make_empty_tensor_value_info(self.nodes[-1].output[0])
        graph = helper.make_graph(self.nodes, "g", inputs, [last], self.constants)
        opsets = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return Module(ir.from_proto(model))


def _grow(draw: st.DrawFn, graph: Graph) -> None:
    """Append one random operator, or two, that accept the shapes there are."""
    name = draw(st.sampled_from(sorted(graph.shapes)))
    shape = graph.shapes[name]
    rank = len(shape)
    kind = draw(
        st.sampled_from(
            ["slice", "concat", "reshape", "through", "transpose", "binary", "expand", "reduce"]
        )
    )
    if kind == "slice" and rank:
        axis = draw(st.integers(-rank, rank - 1))
        bound = st.integers(-9, 9) | st.sampled_from([2**31 - 1, 2**63 - 1, -(2**63), -(2**31)])
        start, end = draw(bound), draw(bound)
        step = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        truth = list(shape)
        truth[axis] = len(_span(start, end, step, shape[axis]))
        if not all(truth):
            return
        inputs = [name, *(graph.constant([n]) for n in (start, end, axis, step))]
        graph.node("Slice", inputs, tuple(truth))
    elif kind == "concat" and rank:
        axis = draw(st.integers(0, rank - 1))
        truth = list(shape)
        truth[axis] *= 2
        graph.node("Concat", [name, name], tuple(truth), axis=axis)
    elif kind == "reshape" and rank:
        axis = draw(st.integers(0, rank - 1))
        target = [0] * axis + [-1]
        flat = (*shape[:axis], int(np.prod(shape[axis:])))
        graph.node("Reshape", [name, graph.constant(target)], flat)
    elif kind == "through":
        _reshape_by_shape(draw, graph, name)
    elif kind == "transpose" and rank:
        order = draw(st.permutations(range(rank)))
        graph.node("Transpose", [name], tuple(shape[i] for i in order), perm=order)
    elif kind == "binary":
        other = draw(st.sampled_from(sorted(graph.shapes)))
        try:
            common = np.broadcast_shapes(shape, graph.shapes[other])
        except ValueError:
            return
        graph.node("Add", [name, other], common)
    elif kind == "expand":
        ones = (1,) * (rank + 1)
        graph.node("Expand", [name, graph.constant(list(ones))], (1, *shape))
    elif kind == "reduce" and rank:
        axis, keep = draw(st.integers(0, rank - 1)), draw(st.integers(0, 1))
        left = (*shape[:axis], *([1] * keep), *shape[axis + 1 :])
        graph.node("ReduceMax", [name, graph.constant([axis])], left, keepdims=keep)


def _reshape_by_shape(draw: st.DrawFn, graph: Graph, name: str) -> None:
    """Reshape a value to a target computed from its own shape, reversed or joined."""
    shape = graph.shapes[name]
    if len(shape) < 2:
        return
    extents = graph.node("Shape", [name], (len(shape),))
    first = graph.node("Gather", [extents, graph.constant([0])], (1,), axis=0)
    second = graph.node("Gather", [extents, graph.constant([-1])], (1,), axis=0)
    rest = graph.constant([-1])
    truth: tuple[int, ...]
    del graph.shapes[extents], graph.shapes[first], graph.shapes[second]
    if draw(st.booleans()):
        product = graph.node("Mul", [first, second], (1,))
        target = graph.node("Concat", [product, rest], (2,), axis=0)
        truth = (shape[0] * shape[-1], int(np.prod(shape[1:-1])))
    else:
        product = graph.node("Identity", [second], (1,))
        target = graph.node("Concat", [product, first, rest], (3,), axis=0)
        truth = (shape[-1], shape[0], int(np.prod(shape[1:-1])))
    del graph.shapes[product], graph.shapes[target]
    graph.node("Reshape", [name, target], truth)


def _span(start: int, end: int, step: int, size: int) -> range:
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, int, int]:
    a, b = draw(SIZES), draw(SIZES)
    graph = Graph(a, b)
    for _ in range(draw(st.integers(1, 10))):
        _grow(draw, graph)
    if not graph.nodes:
        graph.node("Relu", ["x"], graph.shapes["x"])
    return graph, a, b


@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs_have_the_shapes_that_were_claimed(drawn: tuple[Graph, int, int]) -> None:
    graph, a, b = drawn
    feed = {"x": np.ones((a, b, 6), np.float32), "z": np.ones((b, 4), np.float32)}
    note(str([f"{n.op_type}({', '.join(n.input)})" for n in graph.nodes]))
    result = compare(graph.module(), feed)
    assert not result.wrong
    assert result.values == len(graph.nodes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), SIZES, SIZES)
def test_dimension_arithmetic_agrees_with_numbers(data: st.DataObject, a: int, b: int) -> None:
    numbers: list[tuple[Any, int]] = [(symbol("a"), a), (symbol("b"), b), (3, 3)]
    for _ in range(data.draw(st.integers(1, 6))):
        (x, p), (y, q) = data.draw(st.sampled_from(numbers)), data.draw(st.sampled_from(numbers))
        n = data.draw(st.integers(1, 9))
        claimed, true = data.draw(
            st.sampled_from(
                [
                    (dims.add(x, y), p + q),
                    (dims.subtract(x, y), p - q),
                    (dims.multiply(x, y), p * q),
                    (dims.floor_div(x, n), p // n),
                    (dims.ceil_div(x, n), -(-p // n)),
                    (dims.modulo(x, n), p % n),
                    (dims.maximum(x, y), max(p, q)),
                    (dims.minimum(x, y), min(p, q)),
                    (dims.quotient(dims.multiply(x, n), n), p),
                ]
            )
        )
        assert evaluate(claimed, {"a": a, "b": b}) == true
        bound = dims.lower_bound(claimed)
        assert bound is None or bound <= true
        numbers.append((claimed, true))
    (x, p), (y, q) = data.draw(st.sampled_from(numbers)), data.draw(st.sampled_from(numbers))
    assert not dims.equal(x, y) or p == q
    assert not dims.at_least(x, y) or p >= q


@pytest.mark.parametrize("auto", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 1), (3, 3, 0), (3, 1, 1), (2, 2, 1)])
def test_pooling_agrees_with_the_runtime(
    *, auto: str, ceil: int, kernel: int, stride: int, pad: int
) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [kernel], "strides": [stride], "ceil_mode": ceil}
    attributes |= {"auto_pad": auto} if auto != "NOTSET" else {"pads": [pad, pad]}
    node = helper.make_node("MaxPool", ["x"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, "w"])],
        [helper.make_empty_tensor_value_info("y")],
    )
    opsets = [helper.make_opsetid("", 18)]
    module = Module(ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9)))
    for size in (3, 5, 6, 7, 8, 13):
        result = compare(module, {"x": np.ones((1, 2, size), np.float32)})
        assert not result.wrong, size
        assert result.complete == 1
