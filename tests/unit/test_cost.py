"""Symbolic cost: counts against hand calculations, totals, control flow, what is not counted."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import numpy as np
import onnx
import pytest
import sympy
from onnx import TensorProto, helper, numpy_helper

from lwc.analysis.cost import Cost
from lwc.analysis.cost_rules.base import find_rule
from lwc.analysis.manager import AnalysisManager
from lwc.core.dims import symbol
from lwc.frontend.onnx_reader import from_proto

B, S, T = symbol("b"), symbol("s"), symbol("t")
FLOAT = TensorProto.FLOAT


def cost_of(nodes, inputs, weights=None, outputs=None, functions=()):
    outputs = outputs or [nodes[-1].output[0]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid(domain, version)
            for domain, version in (("", 21), ("com.microsoft", 1), ("mine", 1))
        ],
        ir_version=10,
        functions=list(functions),
    )
    return AnalysisManager(from_proto(model)).get(Cost)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def equal(form, expected) -> bool:
    return bool(sympy.expand(form - expected) == 0)


def test_linear_layer_counts_two_flops_per_multiply_add_and_its_bytes():
    cost = cost_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (FLOAT, ["b", "s", 64])},
        {"w": zeros(64, 128)},
    )
    total = cost.total
    assert equal(total.macs, B * S * 64 * 128)
    assert equal(total.flops, 2 * B * S * 64 * 128)
    assert total.parameters == 64 * 128
    assert total.parameter_bytes == 4 * 64 * 128
    assert equal(total.read_bytes, 4 * (B * S * 64 + 64 * 128))
    assert equal(total.written_bytes, 4 * B * S * 128)


def test_batched_product_of_activations():
    cost = cost_of(
        [helper.make_node("MatMul", ["q", "k"], ["y"])],
        {"q": (FLOAT, ["b", 4, "s", 16]), "k": (FLOAT, ["b", 4, 16, "t"])},
    )
    assert equal(cost.total.macs, B * 4 * S * T * 16)
    assert cost.total.parameters == 0


@pytest.mark.parametrize(
    ("node", "inputs", "weights", "macs", "other"),
    [
        (
            helper.make_node("Gemm", ["x", "w", "c"], ["y"], transB=1),
            {"x": (FLOAT, ["b", 8])},
            {"w": zeros(16, 8), "c": zeros(16)},
            B * 8 * 16,
            B * 16,
        ),
        (
            helper.make_node("Conv", ["x", "w", "c"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
            {"x": (FLOAT, ["b", 3, 32, 32])},
            {"w": zeros(8, 3, 3, 3), "c": zeros(8)},
            B * 8 * 16 * 16 * 3 * 9,
            B * 8 * 16 * 16,
        ),
        (
            helper.make_node("Conv", ["x", "w"], ["y"], group=8, pads=[1, 1, 1, 1]),
            {"x": (FLOAT, ["b", 8, 10, 10])},
            {"w": zeros(8, 1, 3, 3)},
            B * 8 * 100 * 9,
            0,
        ),
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
            {"x": (FLOAT, ["b", 8, 10, 10])},
            {"w": zeros(8, 4, 2, 2)},
            B * 8 * 100 * 4 * 4,
            0,
        ),
        (
            helper.make_node("Softmax", ["x"], ["y"]),
            {"x": (FLOAT, ["b", "s"])},
            {},
            0,
            5 * B * S,
        ),
        (
            helper.make_node("LayerNormalization", ["x", "g", "h"], ["y"]),
            {"x": (FLOAT, ["b", 16])},
            {"g": zeros(16), "h": zeros(16)},
            0,
            7 * B * 16,
        ),
        (
            helper.make_node("Einsum", ["x", "w"], ["y"], equation="bsk,kn->bsn"),
            {"x": (FLOAT, ["b", "s", 8])},
            {"w": zeros(8, 4)},
            B * S * 8 * 4,
            0,
        ),
        (
            helper.make_node(
                "MatMulNBits",
                ["x", "w", "z"],
                ["y"],
                domain="com.microsoft",
                K=64,
                N=32,
                bits=4,
                block_size=32,
            ),
            {"x": (FLOAT, ["b", "s", 64])},
            {"w": zeros(32, 2, 16, dtype=np.uint8), "z": zeros(64)},
            B * S * 64 * 32,
            0,
        ),
        (
            helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v", "pk", "pv", "n", "m"],
                ["y", "a", "c"],
                domain="com.microsoft",
                num_heads=4,
                kv_num_heads=2,
            ),
            {
                "q": (FLOAT, ["b", 1, 64]),
                "k": (FLOAT, ["b", 1, 32]),
                "v": (FLOAT, ["b", 1, 32]),
                "pk": (FLOAT, ["b", 2, "t", 16]),
                "pv": (FLOAT, ["b", 2, "t", 16]),
                "n": (TensorProto.INT32, ["b"]),
                "m": (TensorProto.INT32, []),
            },
            {},
            B * 4 * (T + 1) * (16 + 16),
            B * 4 * (T + 1) * 6,
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_counts_match_the_textbook(node, inputs, weights, macs, other):
    cost = cost_of([node], inputs, weights)
    assert cost.uncounted == {}
    (found,) = cost.nodes.values()
    assert equal(found.macs, macs)
    assert equal(found.flops - 2 * found.macs, other)


def test_packed_weights_count_logically_and_scales_only_as_bytes():
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "z"], ["y"], domain="com.microsoft", K=64, N=32, bits=4,
        block_size=32,
    )  # fmt: skip
    weights = {"w": zeros(32, 2, 16, dtype=np.uint8), "z": zeros(64)}
    cost = cost_of([node], {"x": (FLOAT, ["s", 64])}, weights)
    assert cost.total.parameters == 64 * 32
    assert cost.total.parameter_bytes == 64 * 32 // 2 + 64 * 4


def test_a_shared_weight_counts_once_in_totals_and_for_each_node():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    cost = cost_of(nodes, {"x": (FLOAT, ["s", 8])}, {"w": zeros(8, 8)})
    assert [found.parameters for found in cost.nodes.values()] == [64, 64]
    assert cost.total.parameters == 64


def test_views_cost_nothing_and_gather_reads_only_what_it_picks():
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "axes"], ["y"]),
    ]
    weights = {"table": zeros(1000, 16), "axes": np.array([0], np.int64)}
    cost = cost_of(nodes, {"ids": (TensorProto.INT64, ["s"])}, weights)
    gather, view = cost.nodes.values()
    assert equal(gather.read_bytes, S * 16 * 4 + S * 8)
    assert gather.flops == 0
    assert view.traffic == 0


def test_an_operator_without_a_rule_is_listed_and_not_zero():
    node = helper.make_node("Mystery", ["x"], ["y"], domain="mine")
    cost = cost_of([node, helper.make_node("Relu", ["x"], ["z"])], {"x": (FLOAT, ["s"])},
                   outputs=["y", "z"])  # fmt: skip
    assert cost.uncounted == {"mine::Mystery": 1}
    assert "rule" in cost.reasons["mine::Mystery"]
    assert equal(cost.total.flops, S)


def branch(name, nodes, output):
    return helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(output)])


def test_if_costs_its_dearer_branch():
    one = branch("one", [helper.make_node("Relu", ["x"], ["p"])], "p")
    two = branch(
        "two",
        [helper.make_node("Relu", ["x"], ["q"]), helper.make_node("Neg", ["q"], ["r"])],
        "r",
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=one, else_branch=two)
    cost = cost_of([node], {"x": (FLOAT, ["s"]), "c": (TensorProto.BOOL, [])})
    assert equal(cost.total.flops, 2 * S)


def test_loop_multiplies_by_its_trip_count():
    body = helper.make_graph(
        [
            helper.make_node("Relu", ["carried"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", FLOAT, [16]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [16]),
        ],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)
    cost = cost_of([node], {"x": (FLOAT, [16])}, {"n": np.array(7, np.int64)})
    assert cost.total.flops == 7 * 16
    cost = cost_of([node], {"x": (FLOAT, [16]), "n": (TensorProto.INT64, [])})
    (trips,) = cost.total.flops.free_symbols
    assert equal(cost.total.flops, trips * 16)


def test_a_function_costs_its_body():
    function = helper.make_function(
        "mine",
        "Twice",
        ["x"],
        ["y"],
        [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        [helper.make_opsetid("", 21)],
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="mine")
    cost = cost_of([node], {"x": (FLOAT, ["s"])}, functions=[function])
    assert cost.uncounted == {}
    assert equal(cost.total.flops, 2 * S)


def test_equal_layers_share_one_count():
    nodes = [helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"]) for i in range(50)]
    cost = cost_of(nodes, {"x0": (FLOAT, ["s", 8])}, {"w": zeros(8, 8)})
    assert len({id(found.work) for found in cost.nodes.values()}) == 1
    assert equal(cost.total.macs, 50 * S * 64)


def test_every_standard_fused_operator_of_transformers_has_a_rule():
    ops = ["Attention", "RMSNormalization", "RotaryEmbedding", "Gelu", "DequantizeLinear"]
    ops += [
        f"com.microsoft::{op}"
        for op in ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention",
                   "MultiHeadAttention", "FusedMatMul", "SkipLayerNormalization",
                   "SkipSimplifiedLayerNormalization", "DynamicQuantizeMatMul", "BiasGelu")
    ]  # fmt: skip
    assert [op for op in ops if find_rule(op) is None] == []


@pytest.mark.parametrize(
    ("strides", "pads", "group"),
    [(1, 0, 1), (2, 1, 1), (3, 1, 2)],
    ids=["plain", "strided", "grouped"],
)
def test_convolutions_count_as_torchs_own_counter_does(strides, pads, group):
    """An independent count: two FLOPs per multiply-add, padding and cropping included."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    source = torch.zeros(2, 8, 9, 11)
    weights = {"Conv": torch.zeros(6, 8 // group, 3, 3), "ConvTranspose": torch.zeros(8, 6, 3, 3)}
    functions = {
        "Conv": torch.nn.functional.conv2d,
        "ConvTranspose": torch.nn.functional.conv_transpose2d,
    }
    for op, weight in weights.items():
        with FlopCounterMode(display=False) as counter:
            functions[op](source, weight, stride=strides, padding=pads, groups=group)
        node = helper.make_node(
            op, ["x", "w"], ["y"], strides=[strides] * 2, pads=[pads] * 4, group=group
        )
        cost = cost_of([node], {"x": (FLOAT, [2, 8, 9, 11])}, {"w": weight.numpy()})
        assert cost.total.flops == counter.get_total_flops(), op


def test_group_query_attention_holds_heads_and_no_scores():
    """Probed on ONNX Runtime 1.31: q, k and v of the new tokens, and q and k again if turned."""

    def scratch(**attributes):
        node = helper.make_node(
            "GroupQueryAttention", ["q", "k", "v", "pk", "pv", "n", "m"], ["y", "a", "c"],
            domain="com.microsoft", num_heads=4, kv_num_heads=2, **attributes,
        )  # fmt: skip
        inputs = {
            "q": (FLOAT, ["b", "s", 64]),
            "k": (FLOAT, ["b", "s", 32]),
            "v": (FLOAT, ["b", "s", 32]),
            "pk": (FLOAT, ["b", 2, "t", 16]),
            "pv": (FLOAT, ["b", 2, "t", 16]),
            "n": (TensorProto.INT32, ["b"]),
            "m": (TensorProto.INT32, []),
        }
        (found,) = cost_of([node], inputs).nodes.values()
        return found.work.scratch

    assert equal(scratch(), 4 * B * S * 16 * (4 + 2 * 2))
    assert equal(scratch(do_rotary=1), 4 * B * S * 16 * (4 + 2 * 2 + 4 + 2))
