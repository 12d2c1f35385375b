"""fold-linear: every fold agrees with the unfolded graph, and illegal ones are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import module_of, ops, run_pass, run_pass_to_the_end, run_plain

from lwc.core.module import Module
from lwc.passes.cleanup.fold_linear import FoldLinear
from lwc.verify.contract.clauses import check_contract

Array = np.ndarray[Any, Any]
RTOL, ATOL = 1e-4, 1e-5
"""float32 rounding over sums of at most a few hundred products."""


class Graph:
    """A chain of nodes with random float32 weights."""

    def __init__(self, shape: list[int | str], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = "x"
        self.outputs: list[str] = []

    def weight(self, *shape: int, positive: bool = False) -> str:
        array = self.random.standard_normal(shape)
        array = np.abs(array) + 0.5 if positive else array
        return self.constant(array.astype(np.float32))

    def constant(self, array: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> Graph:
        made = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *inputs], [made], **attributes))
        self.last = made
        return self

    def module(self) -> Module:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        names = [self.last, *self.outputs]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        graph = helper.make_graph(self.nodes, "g", [x], outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return Module(ir.from_proto(model))

    def feeds(self) -> list[Array]:
        shapes = [[d if isinstance(d, int) else n for d in self.shape] for n in (2, 3)]
        return [self.random.standard_normal(shape).astype(np.float32) for shape in shapes]


def fold(graph: Graph) -> tuple[list[str], Module]:
    """Fold, compare at two batch sizes, check that a second run changes nothing."""
    module, feeds = graph.module(), graph.feeds()
    wanted = [run_plain(module, {"x": x}) for x in feeds]
    run_pass_to_the_end(FoldLinear(), module)
    for x, expected in zip(feeds, wanted, strict=True):
        for a, b in zip(run_plain(module, {"x": x}), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL)
    return ops(module), module


def missed(module: Module) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


def batch_norm(graph: Graph, channels: int) -> Graph:
    gamma, beta, mean = (graph.weight(channels) for _ in range(3))
    return graph.add(
        "BatchNormalization", gamma, beta, mean, graph.weight(channels, positive=True), epsilon=1e-3
    )


def conv(graph: Graph, *, outputs: int = 6, inputs: int = 4, groups: int = 1, **more: Any) -> Graph:
    weights = [graph.weight(outputs, inputs // groups, 3, 3)]
    if more.pop("bias", True):
        weights.append(graph.weight(outputs))
    return graph.add("Conv", *weights, group=groups, **more)


IMAGE: list[int | str] = ["N", 4, 7, 7]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_after_conv(groups: int, bias: bool) -> None:
    graph = batch_norm(conv(Graph(IMAGE), groups=groups, bias=bias, pads=[1, 1, 1, 1]), 6)
    assert fold(graph)[0] == ["Conv"]


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_after_transposed_conv(groups: int) -> None:
    graph = Graph(IMAGE)
    graph.add("ConvTranspose", graph.weight(4, 6 // groups, 3, 3), group=groups, strides=[2, 2])
    assert fold(batch_norm(graph, 6))[0] == ["ConvTranspose"]


def test_batch_norm_in_float64_with_the_epsilon_of_the_standard() -> None:
    """It is a float32: 1e-5 as a float64 is another number."""
    text = """g (double[N, 2] x) => (double[N, 2] y)
        <double[2, 2] w = {0.37, 0.63, 0.36, 0.48}, double[2] scale = {1.1, 0.77},
         double[2] bias = {2.0, -2.6}, double[2] mean = {0.35, 0.82}, double[2] var = {1.0, 0.84}>
        { a = MatMul(x, w) y = BatchNormalization(a, scale, bias, mean, var) }"""
    assert check_contract(FoldLinear(), module_of(text)).float64


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_before_conv_without_padding(groups: int) -> None:
    graph = conv(batch_norm(Graph(IMAGE), 4), groups=groups)
    assert fold(graph)[0] == ["Conv"]


def test_batch_norm_before_a_padded_conv_stays() -> None:
    ops, module = fold(conv(batch_norm(Graph(IMAGE), 4), pads=[1, 1, 1, 1]))
    assert ops == ["BatchNormalization", "Conv"]
    assert "pads" in missed(module)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1, 1), (1, 6, 1, 1), (1, 1, 1, 1)])
def test_channel_constants_after_conv(op: str, shape: tuple[int, ...]) -> None:
    graph = conv(Graph(IMAGE))
    assert fold(graph.add(op, graph.weight(*shape, positive=True)))[0] == ["Conv"]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 6, 5, 1), (2, 6, 1, 1), (1, 1, 6, 1, 1)])
def test_constants_that_vary_elsewhere_or_widen_stay(shape: tuple[int, ...]) -> None:
    graph = conv(Graph([2, 4, 7, 7]))
    assert "Mul" in fold(graph.add("Mul", graph.weight(*shape)))[0]


def test_constant_minus_linear() -> None:
    graph = Graph(["N", 5])
    graph.add("Gemm", graph.weight(5, 3), graph.weight(3))
    graph.nodes.append(helper.make_node("Sub", [graph.weight(3), graph.last], ["r"]))
    graph.last = "r"
    assert fold(graph)[0] == ["Gemm"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_gemm_between_scales_and_shifts(transposed: int, beta: float) -> None:
    graph = Graph(["N", 5])
    graph.add("Mul", graph.weight(5)).add("Add", graph.weight(5))
    weight = graph.weight(3, 5) if transposed else graph.weight(5, 3)
    graph.add("Gemm", weight, graph.weight(3), transB=transposed, beta=beta)
    graph.add("Mul", graph.weight(3)).add("Add", graph.weight(1, 3))
    assert fold(graph)[0] == ["Gemm"]


def test_matmul_and_bias_become_gemm_at_rank_two_only() -> None:
    for shape, expected in ((["N", 5], ["Gemm"]), (["N", 4, 5], ["MatMul", "Add"])):
        graph = Graph(shape)  # type: ignore[arg-type]
        graph.add("MatMul", graph.weight(5, 3)).add("Add", graph.weight(3))
        assert fold(graph)[0] == expected


def test_scale_before_and_after_matmul_of_any_rank() -> None:
    graph = Graph(["N", 4, 5])
    graph.add("Mul", graph.weight(5)).add("MatMul", graph.weight(5, 3)).add("Div", graph.weight(3))
    assert fold(graph)[0] == ["MatMul"]


def test_attention_scale_moves_through_views_into_the_query_projection() -> None:
    graph = Graph(["N", 4, 8])
    graph.add("MatMul", graph.weight(8, 8)).add("Add", graph.weight(8))
    graph.add("Reshape", graph.constant(np.array([0, 0, 2, 4])))
    graph.add("Transpose", perm=[0, 2, 1, 3])
    query = graph.last
    graph.last = "x"
    graph.add("MatMul", graph.weight(8, 8)).add("Reshape", graph.constant(np.array([0, 0, 2, 4])))
    graph.add("Transpose", perm=[0, 2, 3, 1])
    graph.nodes.append(helper.make_node("MatMul", [query, graph.last], ["scores"]))
    graph.last = "scores"
    ops, _ = fold(graph.add("Div", graph.constant(np.array(2.0, np.float32))))
    assert "Div" not in ops
    assert ops.count("MatMul") == 3


def test_several_consumers_and_graph_outputs_prevent_folding() -> None:
    graph = conv(Graph(IMAGE))
    graph.outputs.append(graph.last)
    ops, module = fold(graph.add("Mul", graph.weight(6, 1, 1)))
    assert ops == ["Conv", "Mul"]
    assert "other uses" in missed(module)


def test_a_shared_weight_is_not_copied() -> None:
    graph = Graph(["N", 8])
    weight = graph.weight(8, 8)
    graph.add("MatMul", weight).add("Mul", graph.weight(8)).add("Relu").add("MatMul", weight)
    ops, module = fold(graph)
    assert ops == ["MatMul", "Mul", "Relu", "MatMul"]
    assert "shared" in missed(module)


def test_a_fold_that_leaves_float16_is_refused() -> None:
    weight = numpy_helper.from_array(np.full((4, 4), 6e4, np.float16), "w")
    factor = numpy_helper.from_array(np.full(4, 4, np.float16), "c")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["N", 4])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Mul", ["p", "c"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight, factor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    module = Module(ir.from_proto(model))
    assert not run_pass(FoldLinear(), module).changed
    assert "leaves the range of float16" in missed(module)


def pad(graph: Graph, pads: list[int], value: float = 0.0, **more: Any) -> Graph:
    fill = graph.constant(np.array(value, np.float32))
    return graph.add("Pad", graph.constant(np.array(pads)), fill, **more)


SPATIAL = [0, 0, 1, 2, 0, 0, 0, 1]


def test_padding_moves_into_conv() -> None:
    ops, module = fold(conv(pad(Graph(IMAGE), SPATIAL), pads=[1, 0, 1, 0]))
    assert ops == ["Conv"]
    assert module.graph[0].attributes["pads"].value == (2, 2, 1, 1)


@pytest.mark.parametrize("counted", [0, 1])
def test_padding_moves_into_average_pool_and_is_counted(counted: int) -> None:
    graph = pad(Graph(IMAGE), [0, 0, 1, 1, 0, 0, 1, 1])
    graph.add("AveragePool", kernel_shape=[3, 3], count_include_pad=counted)
    assert fold(graph)[0] == ["AveragePool"]


@pytest.mark.parametrize(
    ("pads", "value", "mode", "reason"),
    [
        (SPATIAL, 1.0, "constant", "not 0"),
        (SPATIAL, 0.0, "edge", "mode is edge"),
        ([0, 0, -1, 0, 0, 0, 0, 0], 0.0, "constant", "crops"),
        ([1, 0, 0, 0, 0, 0, 0, 0], 0.0, "constant", "batch or the channels"),
    ],
)
def test_other_padding_stays(pads: list[int], value: float, mode: str, reason: str) -> None:
    ops, module = fold(conv(pad(Graph(IMAGE), pads, value, mode=mode)))
    assert ops == ["Pad", "Conv"]
    assert reason in missed(module)


def test_average_that_leaves_its_own_padding_out_stays() -> None:
    graph = pad(Graph(IMAGE), SPATIAL)
    graph.add("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=0)
    assert fold(graph)[0] == ["Pad", "AveragePool"]


@pytest.mark.parametrize(("value", "expected"), [(-np.inf, ["MaxPool"]), (0.0, ["Pad", "MaxPool"])])
def test_max_pool_takes_padding_by_the_lowest_value_only(value: float, expected: list[str]) -> None:
    graph = pad(Graph(IMAGE), SPATIAL, value)
    assert fold(graph.add("MaxPool", kernel_shape=[3, 3]))[0] == expected


def test_two_scales_in_a_row_become_one() -> None:
    graph = Graph(["N", 4, 5])
    graph.add("Mul", graph.weight(5)).add("Mul", graph.weight()).add("Add", graph.weight(4, 1))
    assert fold(graph.add("Add", graph.weight()))[0] == ["Mul", "Add"]


@pytest.mark.parametrize("op", ["Mul", "Add"])
@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_two_constants_whose_product_leaves_the_type_stay_apart(op: str, factor: float) -> None:
    size = factor if op == "Mul" else 3e38
    graph = Graph([5])
    for _ in range(2):
        graph.add(op, graph.constant(np.full(5, size, np.float32)))
    module = graph.module()
    x = np.full(5, 1 / factor if op == "Mul" else -3e38, np.float32)
    wanted = run_plain(module, {"x": x})[0]
    run_pass_to_the_end(FoldLinear(), module)
    np.testing.assert_allclose(run_plain(module, {"x": x})[0], wanted, rtol=1e-5)
    assert ops(module) == [op, op]


@pytest.mark.parametrize(("inner", "folds"), [("Erf", False), ("Tanh", False), ("Sigmoid", True)])
def test_the_half_of_a_gelu_stays_where_the_runtime_fuses_it(inner: str, folds: bool) -> None:
    graph = Graph(["n", 4])
    graph.add(inner).add("Add", graph.constant(np.ones(1, np.float32)))
    graph.add("Mul", "x").add("Mul", graph.constant(np.full(1, 0.5, np.float32)))
    graph.add("MatMul", graph.weight(4, 5))
    module = graph.module()
    run_pass(FoldLinear(), module)
    missed = [remark.message for remark in module.remarks if remark.kind == "missed"]
    assert ops(module).count("Mul") == (1 if folds else 2)
    assert any("GELU" in message for message in missed) is not folds
