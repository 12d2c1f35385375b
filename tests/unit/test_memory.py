"""Activation liveness: views, in-place writes, kept buffers, outputs, order, closed forms."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import numpy as np
import pytest
import sympy
from onnx import TensorProto, helper, numpy_helper

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.core.dims import symbol
from lwc.core.errors import UsageError
from lwc.frontend.onnx_reader import from_proto

N = symbol("n")


def module_of(nodes, outputs, shapes=None, weights=()):
    """Build a graph on inputs [n, 64]; `shapes` are those of values that the graph states."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 64])],
        [info(name, TensorProto.FLOAT, ["n", 64]) for name in outputs],
        list(weights),
        value_info=[info(n, TensorProto.FLOAT, shape) for n, shape in (shapes or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    return from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def memory_of(*args, **kwargs) -> Memory:
    return AnalysisManager(module_of(*args, **kwargs)).get(Memory)


def node(op, source, result, **attributes):
    sources = source if isinstance(source, list) else [source]
    return helper.make_node(op, sources, [result], **attributes)


ROW = 64 * 4


def test_a_chain_of_arithmetic_holds_two_buffers():
    chain = [node("Exp", "x", "a"), node("Exp", "a", "b"), node("Exp", "b", "y")]
    memory = memory_of(chain, ["y"])
    assert memory.peak({"n": 10}) == 2 * 10 * ROW


def test_an_activation_writes_in_place():
    nodes = [node("Exp", "x", "a"), node("Relu", "a", "b"), node("ReduceMax", "b", "y")]
    assert memory_of(nodes, ["y"]).peak({"n": 100}) < 1.5 * 100 * ROW


def test_an_activation_does_not_overwrite_what_is_read_again():
    nodes = [node("Exp", "x", "a"), node("Relu", "a", "b"), node("Add", ["a", "b"], "y")]
    memory = memory_of(nodes, ["y"], {"a": ["n", 64], "b": ["n", 64]})
    assert memory.peak({"n": 10}) == 3 * 10 * ROW


def test_a_view_is_free_and_keeps_its_source_alive():
    nodes = [node("Exp", "x", "a"), node("Identity", "a", "v"), node("Exp", "v", "y")]
    assert memory_of(nodes, ["y"]).peak({"n": 10}) == 2 * 10 * ROW


def test_graph_outputs_live_to_the_end():
    nodes = [node("Exp", "x", "y"), node("Exp", "x", "z"), node("Exp", "x", "w")]
    assert memory_of(nodes, ["y", "z", "w"]).peak({"n": 10}) == 3 * 10 * ROW


def test_a_dead_buffer_waits_for_the_next_value_of_its_shape():
    """Between `a` and `c`, which takes its buffer, the wide value is made: all are held."""
    nodes = [
        node("Exp", "x", "a"),
        node("ReduceMax", "a", "m", keepdims=1),
        helper.make_node("Expand", ["m", "wide_shape"], ["wide"]),
        node("ReduceMax", "wide", "k", keepdims=1),
        node("Mul", ["x", "k"], "c"),
        node("Exp", "c", "y"),
    ]
    wide = numpy_helper.from_array(np.array([1000, 64], np.int64), "wide_shape")
    ten, wide_bytes = 10 * ROW, 1000 * ROW
    assert memory_of(nodes, ["y"], weights=[wide]).peak({"n": 10}) >= wide_bytes + ten
    other = [*nodes[:4], node("Transpose", "k", "y")]
    narrow = memory_of(other, ["y"], weights=[wide]).peak({"n": 10})
    assert narrow < wide_bytes + ten


def test_where_names_the_node_and_the_live_values():
    nodes = [node("Exp", "x", "a"), node("Exp", "x", "b"), node("Add", ["a", "b"], "y")]
    peak = memory_of(nodes, ["y"]).where({"n": 4})
    assert peak.node is not None
    assert peak.node.op_type == "Add"
    assert {value.name for value, _ in peak.buffers} == {"a", "b", "y"}


def test_closed_form_is_the_peak_at_every_size():
    nodes = [
        node("Exp", "x", "a"),
        node("Transpose", "a", "t"),
        node("MatMul", ["a", "t"], "scores"),
        node("MatMul", ["scores", "a"], "y"),
    ]
    memory = memory_of(nodes, ["y"])
    assert len(memory.candidates) <= 3
    for n in (1, 7, 64, 1000):
        form = memory.closed_form
        assert int(sympy.sympify(form).subs({N: n})) == memory.peak({"n": n})


def test_a_missing_binding_is_named():
    with pytest.raises(UsageError, match="'n'"):
        memory_of([node("Exp", "x", "y")], ["y"]).peak({})


def reshaped(target):
    """An Exp behind a Reshape, whose target is a weight or comes from the input's shape."""
    nodes = [node("Reshape", ["x", "target"], "r"), node("Exp", "r", "a"), node("Relu", "a", "b")]
    weights = []
    if target is None:
        nodes.insert(0, node("Shape", "x", "target"))
    else:
        weights = [numpy_helper.from_array(np.array(target, np.int64), "target")]
    return [*nodes, node("ReduceMax", "b", "y")], weights


def test_a_shape_out_of_computed_content_is_not_known_beforehand():
    nodes, weights = reshaped([-1, 64])
    assert memory_of(nodes, ["y"], weights=weights).peak({"n": 100}) < 1.5 * 100 * ROW
    nodes, weights = reshaped(None)
    assert memory_of(nodes, ["y"], weights=weights).peak({"n": 100}) >= 2 * 100 * ROW


def test_dequantized_weights_of_one_shape_share_a_buffer_that_stays():
    def layer(source, name):
        return [
            helper.make_node("DequantizeLinear", [f"w{name}", "scale"], [f"d{name}"]),
            node("MatMul", [source, f"d{name}"], f"m{name}"),
        ]

    weights = [numpy_helper.from_array(np.zeros((64, 64), np.int8), f"w{i}") for i in (1, 2)]
    weights.append(numpy_helper.from_array(np.array(1, np.float32), "scale"))
    nodes = [*layer("x", 1), node("Exp", "m1", "e"), *layer("e", 2), node("Exp", "m2", "y")]
    memory = memory_of(nodes, ["y"], weights=weights)
    weight, rows = 64 * 64 * 4, 10 * ROW
    assert memory.peak({"n": 10}) == weight + 2 * rows


def test_where_holds_both_sides_besides_its_result():
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    nodes = [node("Greater", ["x", "zero"], "c"), node("Where", ["c", "x", "zero"], "y")]
    peak = memory_of(nodes, ["y"], weights=[zero]).where({"n": 10})
    assert peak.nbytes == 10 * 64 * 1 + 3 * 10 * ROW
    assert peak.node is not None
    assert peak.node.op_type == "Where"
