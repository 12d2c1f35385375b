"""canonicalize, rule by rule: what must happen, what must not, and the bounds of folding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import module_of, ops, run_pass, run_pass_to_the_end, run_plain

from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.pipeline.passes import PassResult

Array = np.ndarray[Any, Any]


def canonicalize(module: Module, **options: Any) -> PassResult:
    return run_pass_to_the_end(Canonicalize(**options), module)


def constant_graph(op: str, inputs: list[Array], **attributes: Any) -> Module:
    """Make y = op(constants), kept alive by an Add-free Identity on an input."""
    weights = [numpy_helper.from_array(x, f"c{i}") for i, x in enumerate(inputs)]
    node = helper.make_node(op, [f"c{i}" for i in range(len(inputs))], ["y"], **attributes)
    output = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph([node], "g", [], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Module(ir.from_proto(onnx.shape_inference.infer_shapes(model)))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Div", [np.array([-7, 7, -6]), np.array([2, -2, 4])], {}),
        ("Div", [np.array([1.0, -1.0, 0.0], np.float32), np.zeros(3, np.float32)], {}),
        ("Cast", [np.array([-1.7, 1.7, 2.5e9], np.float32)], {"to": TensorProto.INT64}),
        ("Cast", [np.array([300, -1], np.int64)], {"to": TensorProto.UINT8}),
        ("Cast", [np.array([np.nan, 0.0, -0.0, 2.0], np.float32)], {"to": TensorProto.BOOL}),
        ("Slice", [np.arange(10), np.array([-3]), np.array([100]), np.array([0])], {}),
        (
            "Slice",
            [np.arange(9), np.array([7]), np.array([-99]), np.array([0]), np.array([-2])],
            {},
        ),
        ("Gather", [np.arange(12).reshape(3, 4), np.array([[-1, 0]])], {"axis": 1}),
        ("Mod", [np.array([-7, 7]), np.array([3, -3])], {}),
        ("Pow", [np.array([2.0, 3.0], np.float32), np.array([3, 2])], {}),
        ("Where", [np.array([True, False]), np.array([1.0]), np.array([2.0, 3.0])], {}),
        ("Softmax", [np.array([[1.0, 2.0]], np.float32)], {"axis": -1}),
    ],
)
def test_folding_gives_what_the_runtime_gives(
    op: str, inputs: list[Array], attributes: dict[str, Any]
) -> None:
    module = constant_graph(op, inputs, **attributes)
    (wanted,) = run_plain(module, {})
    assert canonicalize(module).changed
    assert ops(module) == ["Identity"]
    (found,) = run_plain(module, {})
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "reason"),
    [
        ("Div", [np.array([1, 2]), np.array([0, 1])], {}, "division by zero"),
        ("Cast", [np.array([np.nan], np.float32)], {"to": TensorProto.INT32}, "no defined result"),
        ("Cast", [np.array([3e9], np.float32)], {"to": TensorProto.INT32}, "no defined result"),
        ("Cast", [np.array([2.0**63])], {"to": TensorProto.INT64}, "no defined result"),
        ("Gather", [np.arange(3), np.array([5])], {}, "not known"),
    ],
)
def test_undefined_results_are_left_unfolded_with_a_remark(
    op: str, inputs: list[Array], attributes: dict[str, Any], reason: str
) -> None:
    module = constant_graph(op, inputs, **attributes)
    canonicalize(module)
    assert ops(module) == [op]
    assert any(reason in each.message for each in module.remarks if each.kind == "missed")


def test_random_operators_are_neither_folded_nor_merged() -> None:
    module = module_of(
        """g (float[4] x) => (float[4] y) {
            a = RandomNormal<shape = [4]>()
            b = RandomNormal<shape = [4]>()
            c = Sub(a, b)
            y = Add(c, x)
        }"""
    )
    assert not canonicalize(module).changed
    assert ops(module).count("RandomNormal") == 2


def expanding(op: str) -> Module:
    big, small = np.zeros((64, 64), np.float16), np.array([64, 64])
    made: dict[str, tuple[list[Array], dict[str, Any]]] = {
        "Cast": ([big], {"to": TensorProto.FLOAT}),
        "ConstantOfShape": ([small], {}),
        "Expand": ([np.ones(64, np.float32), small], {}),
        "Tile": ([np.ones((1, 64), np.float32), np.array([64, 1])], {}),
        "DequantizeLinear": ([np.ones((64, 64), np.int8), np.array(0.5, np.float32)], {}),
    }
    inputs, attributes = made[op]
    return constant_graph(op, inputs, **attributes)


@pytest.mark.parametrize("op", ["Cast", "ConstantOfShape", "Expand", "Tile", "DequantizeLinear"])
def test_folding_never_decompresses_unless_asked(op: str) -> None:
    module = expanding(op)
    canonicalize(module)
    assert ops(module) == [op]
    assert any("decompress=true" in each.message for each in module.remarks)
    (wanted,) = run_plain(module, {})
    canonicalize(module, decompress=True)
    assert ops(module) == ["Identity"]
    np.testing.assert_array_equal(run_plain(module, {})[0], wanted)


def test_a_shared_weight_is_not_doubled_by_folding_its_transpose() -> None:
    text = """g (float[N,32] x, float[N,48] z) => (float[N,48] y, float[N,32] u)
    <float[32,48] w = {VALUES}> {
        t = Transpose(w)
        y = MatMul(x, w)
        u = MatMul(z, t)
    }""".replace("VALUES", ",".join(["1.0"] * (32 * 48)))
    module = module_of(text)
    canonicalize(module)
    assert "Transpose" in ops(module)
    alone = module_of(text.replace("y = MatMul(x, w)", "y = Pad(x, p)").replace(
        "t = ", "p = Constant<value = int64[4] {0, 0, 0, 16}>()\n t = "
    ))  # fmt: skip
    canonicalize(alone)
    assert "Transpose" not in ops(alone)


def test_the_parts_of_a_weight_are_folded_together_when_nothing_grows() -> None:
    values = ",".join(str(float(i)) for i in range(512))
    text = """g (float[N,16] x) => (float[N,32] y) <float[16,32] w = {VALUES}> {
        zero = Constant<value = int64[1] {0}>()
        half = Constant<value = int64[1] {16}>()
        all = Constant<value = int64[1] {32}>()
        one = Constant<value = int64[1] {1}>()
        a = Slice(w, zero, half, one)
        b = Slice(w, half, all, one)
        c = Concat<axis = 1>(b, a)
        y = MatMul(x, c)
    }""".replace("VALUES", values)
    module = module_of(text)
    x = np.eye(3, 16, dtype=np.float32)
    (wanted,) = run_plain(module, {"x": x})
    canonicalize(module)
    assert ops(module) == ["MatMul"]
    assert len(module.graph.initializers) == 1
    np.testing.assert_array_equal(run_plain(module, {"x": x})[0], wanted)


def test_folding_stays_within_the_memory_bound() -> None:
    module = constant_graph("Transpose", [np.zeros((1024, 512), np.float32)])
    canonicalize(module, fold_memory=1)
    assert ops(module) == ["Transpose"]
    assert any("more than the bound" in each.message for each in module.remarks)
    canonicalize(module)
    assert ops(module) == ["Identity"]


def test_a_result_of_unknown_size_is_not_computed() -> None:
    module = module_of(
        """g (float[N] x) => (float[M] y) {
            i = NonZero(x)
            s = Shape(i)
            f = ConstantOfShape(s)
            y = ReduceSum<keepdims = 0>(f)
        }"""
    )
    canonicalize(module)
    assert "ConstantOfShape" in ops(module)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a = Transpose<perm = [1, 0]>(x)\n b = Transpose<perm = [1, 0]>(a)\n y = Exp(b)", ["Exp"]),
        ("a = Neg(x)\n b = Neg(a)\n y = Exp(b)", ["Exp"]),
        ("a = Relu(x)\n b = Relu(a)\n y = Exp(b)", ["Relu", "Exp"]),
        ("a = Concat<axis = 0>(x)\n b = Sum(a)\n y = Exp(b)", ["Exp"]),
        ("a, m = Dropout(x)\n y = Exp(a)", ["Exp"]),
        ("a, b = Split<axis = 1>(x)\n c = Concat<axis = -1>(a, b)\n y = Exp(c)", ["Exp"]),
        ("s = Shape(x)\n a = Expand(x, s)\n b = Reshape(a, s)\n y = Exp(b)", ["Exp"]),
        (
            "p = Constant<value = int64[4] {0, 0, 0, 0}>()\n a = Pad(x, p)\n b = Clip(a)\n"
            " y = Exp(b)",
            ["Exp"],
        ),
        (
            "t = Constant<value = float {1.0}>()\n a = Mul(x, t)\n b = Div(a, t)\n c = Pow(b, t)\n"
            " y = Exp(c)",
            ["Exp"],
        ),
        (
            "c = Constant<value = bool {0}>()\n n = Neg(x)\n w = Where(c, n, x)\n y = Exp(w)",
            ["Exp"],
        ),
        (
            "a = Constant<value = int64[1] {0}>()\n b = Unsqueeze(x, a)\n c = Squeeze(b, a)\n"
            " y = Exp(c)",
            ["Exp"],
        ),
        (
            "z = Constant<value = int64[1] {0}>()\n o = Constant<value = int64[1] {1}>()\n"
            " e = Constant<value = int64[1] {4}>()\n f = Constant<value = int64[1] {6}>()\n"
            " a = Slice(x, o, f, o)\n b = Slice(a, o, e, o)\n y = Pad(b, p)\n",
            ["Slice", "Pad"],
        ),
    ],
)
def test_what_does_nothing_goes(text: str, left: list[str]) -> None:
    pads = "p = Constant<value = int64[4] {0, 0, 0, 5}>()\n" if "Pad(b, p)" in text else ""
    module = module_of(f"g (float[N,8] x) => (float[N,8] y) {{ {pads}{text} }}")
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    (wanted,) = run_plain(module, {"x": x})
    canonicalize(module)
    assert ops(module) == left
    np.testing.assert_array_equal(run_plain(module, {"x": x})[0], wanted)


@pytest.mark.parametrize(
    "text",
    [
        # A multiplication by one that broadcasts makes the result larger.
        "t = Constant<value = float[2,1] {1.0, 1.0}>()\n y = Mul(x, t)",
        # A slice with a negative step keeps every extent and reverses.
        "s = Constant<value = int64[1] {7}>()\n e = Constant<value = int64[1] {-9}>()\n"
        " a = Constant<value = int64[1] {1}>()\n t = Constant<value = int64[1] {-1}>()\n"
        " y = Slice(x, s, e, a, t)",
        # Float16 in the middle loses digits.
        "a = Cast<to = 10>(x)\n y = Cast<to = 1>(a)",
        # The mean is over more than one element.
        "y = ReduceMean<axes = [1], keepdims = 1>(x)",
    ],
)
def test_what_does_something_stays(text: str) -> None:
    module = module_of(f"g (float[1,8] x) => (float[R,C] y) {{ {text} }}")
    x = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    (wanted,) = run_plain(module, {"x": x})
    before = [op for op in ops(module) if op != "Constant"]
    canonicalize(module)
    assert ops(module) == before
    np.testing.assert_array_equal(run_plain(module, {"x": x})[0], wanted)


def test_unnamed_extents_are_not_taken_for_equal() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["b"], ["s"]),
            helper.make_node("Expand", ["a", "s"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["?", "?"]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, ["?", "?"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["?", "?"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    module = Module(ir.from_proto(model))
    canonicalize(module)
    assert ops(module) == ["Shape", "Expand"]
    feed = {"a": np.ones((1, 3), np.float32), "b": np.ones((4, 3), np.float32)}
    assert run_plain(module, feed)[0].shape == (4, 3)


@pytest.mark.parametrize(("trips", "left"), [(0, ["Identity"]), (1, ["Add"]), (2, ["Loop"])])
def test_short_loops_are_inlined(trips: int, left: list[str]) -> None:
    module = module_of(
        """g (float[4] x) => (float[4] y) {
            n = Constant<value = int64 {TRIPS}>()
            t = Constant<value = bool {1}>()
            y = Loop(n, t, x) <body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w) {
                d = Identity(c)
                w = Add(v, v)
            }>
        }""".replace("TRIPS", str(trips))
    )
    x = np.arange(4, dtype=np.float32)
    canonicalize(module)
    assert [node.op_type for node in module.graph] == left
    np.testing.assert_array_equal(run_plain(module, {"x": x})[0], x * 2**trips)


@pytest.mark.parametrize(
    "text",
    [
        # Of two scans each would need an Unsqueeze; the Loop is one node.
        """g (float[4] x) => (float[1, 4] y, float[1, 4] z) <int64 n = {1}, bool t = {1}> {
            y, z = Loop(n, t) <body = b (int64 i, bool c) => (bool c, float[4] v, float[4] w) {
                v = Abs(x)
                w = Neg(x)
            }>
        }""",
        # Of two constants each would need an Identity; the Split is one node.
        """g (float[4] x) => (float[1] y, float[1] z, float[4] u) <float[2] w = {1, 2}> {
            y, z = Split <axis = 0> (w)
            u = Exp(x)
        }""",
    ],
)
def test_what_would_take_more_nodes_stays(text: str) -> None:
    module = module_of(text, opset=13)
    before = ops(module)
    canonicalize(module)
    assert ops(module) == before


def test_branches_with_equal_names_can_both_be_inlined() -> None:
    branch = """If (t) <then_branch = a () => (float[4] v) { k = Exp(x) v = Neg(k) },
                        else_branch = b () => (float[4] v) { v = Abs(x) }>"""
    module = module_of(
        f"g (float[4] x) => (float[4] y) {{ t = Constant<value = bool {{1}}>()\n"
        f" p = {branch}\n q = {branch}\n y = Sub(p, q) }}"
    )
    canonicalize(module)
    assert ops(module) == ["Exp", "Neg", "Sub"]


def test_unused_functions_go_and_used_ones_are_simplified() -> None:
    module = module_of(
        """g (float[4] x) => (float[4] y) { y = local.f(x) }
        <domain: "local", opset_import: ["" : 17]>
        f (v) => (w) { a = Identity(v)\n b = Neg(a)\n c = Neg(b)\n w = Exp(c) }
        <domain: "local", opset_import: ["" : 17]>
        unused (v) => (w) { w = Exp(v) }"""
    )
    module.import_opset("local", 1)
    canonicalize(module)
    (function,) = module.model.functions.values()
    assert [node.op_type for node in function] == ["Exp"]


def test_an_initializer_that_a_feed_can_override_is_no_constant() -> None:
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    graph = helper.make_graph([helper.make_node("Neg", ["w"], ["y"])], "g", [info], [out], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    module = Module(ir.from_proto(model))
    assert not canonicalize(module).changed
    (found,) = run_plain(module, {"w": np.full(3, 2, np.float32)})
    np.testing.assert_array_equal(found, [-2, -2, -2])


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("p = 11", "h = Cast<to: int = @p>(x)\n y = Cast<to=1>(h)"),
        ("p = 1", "a, b = Split<axis: int = @p>(x)\n y = Concat<axis=1>(a, b)"),
        ("p = 1", "h = Concat<axis: int = @p>(x, x)\n k = Concat<axis=1>(h, x)\n y = Relu(k)"),
        (
            "p = 0",
            """i = Constant<value_int=0>() a = Constant<value_ints=[0]>()
            h = Gather<axis: int = @p>(x, i) k = Unsqueeze(h, a) y = Add(k, x)""",
        ),
        (
            "p = float[1] {2}",
            "s = Shape(x)\n h = ConstantOfShape<value: tensor = @p>(s)\n y = Add(h, x)",
        ),
    ],
)
def test_what_a_call_decides_is_left_to_it(call: str, body: str) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
    g (float[2, 4] x) => (float[r, c] y) {{ y = d.f<{call}>(x) }}
    <domain: "d", opset_import: ["" : 17]> f<p>(x) => (y) {{ {body} }}"""
    module = Module(ir.from_proto(onnx.parser.parse_model(text)))
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    (wanted,) = run_plain(module, {"x": x})
    canonicalize(module)
    np.testing.assert_array_equal(run_plain(module, {"x": x})[0], wanted)


def test_old_opsets_are_refused() -> None:
    module = module_of("g (float[4] x) => (float[4] y) { y = Exp(x) }")
    module.graph.opset_imports[""] = 12
    with pytest.raises(PassError, match="opset 12"):
        run_pass(Canonicalize(), module)


def test_nothing_to_do_is_said() -> None:
    module = module_of("g (float[4] x) => (float[4] y) { y = Exp(x) }")
    assert not canonicalize(module).changed
    assert any("nothing to simplify" in each.message for each in module.remarks)


def agree(text: str, *feeds: dict[str, Array], opset: int = 18) -> Module:
    """Canonicalize a graph and compare its outputs bit by bit with those it had."""
    module = module_of(text, opset)
    wanted = [run_plain(module, feed) for feed in feeds]
    canonicalize(module)
    for feed, outputs in zip(feeds, wanted, strict=True):
        for found, output in zip(run_plain(module, feed), outputs, strict=True):
            np.testing.assert_array_equal(found, output)
            np.testing.assert_array_equal(np.signbit(found), np.signbit(output))
    return module


def test_an_empty_list_of_axes_squeezes_all() -> None:
    agree(
        """g (float[1,1,3] x) => (float[3] y, float[3] z)
        <int64[1] first = {0}, int64[0] all = {}, float[1,3] c = {1, 2, 3}> {
            t = Squeeze(x, first)
            y = Squeeze(t, all)
            s = Squeeze(c, all)
            z = Add(s, y)
        }""",
        {"x": np.ones((1, 1, 3), np.float32)},
    )


def test_zeros_of_both_signs_are_not_one_number() -> None:
    agree(
        """g (float[2] x) => (float[2] y) <float[2] zeros = {-0.0, 0.0}> {
            y = Add(x, zeros)
        }""",
        {"x": np.array([-0.0, -0.0], np.float32)},
    )


@pytest.mark.parametrize("bounds", [(2, 2**63 - 2), (2**63 - 2, 2**63 - 1)])
def test_slices_to_the_end_of_everything_are_merged(bounds: tuple[int, int]) -> None:
    start, end = bounds
    module = agree(
        f"""g (float[n] x) => (float[m] y) <
            int64[1] two = {{2}}, int64[1] far = {{{2**63 - 1}}},
            int64[1] start = {{{start}}}, int64[1] end = {{{end}}}> {{
            a = Slice(x, two, far)
            y = Slice(a, start, end)
        }}""",
        {"x": np.arange(9, dtype=np.float32)},
    )
    assert ops(module) == ["Slice"]


def test_a_backward_slice_to_the_largest_number_is_left_to_the_runtime() -> None:
    agree(
        """g (int64[1] x) => (int64[m] y) <int64[2] c = {5, 6}, int64[1] far = {2147483647},
        int64[1] axis = {0}, int64[1] back = {-1}> {
            s = Slice(c, far, far, axis, back)
            y = Concat<axis = 0>(s, x)
        }""",
        {"x": np.array([1])},
    )


def test_a_length_cast_to_a_byte_wraps() -> None:
    agree(
        """g (float[n] x) => (bool[1] y) {
            length = Shape(x)
            byte = Cast<to = 3>(length)
            again = Cast<to = 7>(byte)
            y = Equal(again, length)
        }""",
        {"x": np.zeros(200, np.float32)},
        {"x": np.zeros(3, np.float32)},
    )


def test_a_loop_body_that_hands_on_its_parameters_is_inlined() -> None:
    def typed(*names: str) -> list[onnx.ValueInfoProto]:
        kinds: dict[str, tuple[int, list[int]]] = {
            "i": (TensorProto.INT64, []),
            "go": (TensorProto.BOOL, []),
        }
        return [
            helper.make_tensor_value_info(name, *kinds.get(name[:2], (TensorProto.FLOAT, [3])))
            for name in names
        ]

    go_on = helper.make_node("Identity", ["go"], ["go_on"])
    body = helper.make_graph([go_on], "body", typed("i", "go", "a", "b"), typed("go_on", "b", "a"))
    loop = helper.make_node("Loop", ["once", "", "x", "z"], ["u", "v"], body=body)
    once = numpy_helper.from_array(np.array(1), "once")
    graph = helper.make_graph([loop], "g", typed("x", "z"), typed("u", "v"), [once])
    opset = [helper.make_opsetid("", 18)]
    module = Module(ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=8)))
    feed = {"x": np.zeros(3, np.float32), "z": np.ones(3, np.float32)}
    wanted = run_plain(module, feed)
    canonicalize(module)
    assert ops(module) == ["Identity", "Identity"]
    np.testing.assert_array_equal(run_plain(module, feed), wanted)


def test_dropout_in_training_is_random() -> None:
    module = module_of(
        """g (float[4] x) => (float[4] y) <float[4] c = {1, 1, 1, 1}, float half = {0.5},
        bool training = {1}> {
            kept = Dropout(c, half, training)
            y = Add(kept, x)
        }"""
    )
    assert not canonicalize(module).changed
    assert ops(module) == ["Dropout", "Add"]


def test_an_absent_output_replaces_none() -> None:
    text = """g (float[1,1,4,4] x) => (float[1,1,2,2] y, int64[1,1,2,2] z) {
        y, unused = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        again, places = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        z = Neg(places)
    }"""
    module = module_of(text, 18)
    first = module.graph[0]
    first.outputs[1].name = ""
    feed = {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)}
    wanted = run_plain(module, feed)
    canonicalize(module)
    for found, output in zip(run_plain(module, feed), wanted, strict=True):
        np.testing.assert_array_equal(found, output)


def test_what_a_loop_changes_is_not_equal_to_what_it_started_from() -> None:
    agree(
        """g (float[n] x, int64 trips) => (bool[k,1] same, float[p] z) <bool go = {1}> {
            found = NonZero(x)
            axis = Constant<value = int64[1] {0}>()
            places = Squeeze(found, axis)
            start = Cast<to = 1>(places)
            z, same = Loop(trips, go, start) <body = b (int64 i, bool go_in, float[q] v)
                => (bool go_out, float[r] longer, bool[1] equal) <float[1] one = {1}> {
                go_out = Identity(go_in)
                now = Shape(v)
                before = Shape(start)
                equal = Equal(now, before)
                longer = Concat<axis = 0>(v, one)
            }>
        }""",
        {"x": np.array([1, 0, 2], np.float32), "trips": np.array(3)},
    )


def test_attributes_that_calls_decide_are_not_their_defaults() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "c" : 1]>
    g (float[2,3,4] x) => (float[a,b,c] u, int64[3] y, float[d,e,f] v, int64[3] z) {
        u, y = c.F<p = [0, 2, 1]>(x)
        v, z = c.F<p = [1, 0, 2]>(x)
    }
    <opset_import: ["" : 18], domain: "c">
    F <p> (x) => (turned, s) {
        same = Identity(x)
        turned = Transpose<perm: ints = @p>(same)
        s = Shape(turned)
    }"""
    module = Module(ir.from_onnx_text(text))
    feed = {"x": np.zeros((2, 3, 4), np.float32)}
    wanted = run_plain(module, feed)
    canonicalize(module)
    for found, output in zip(run_plain(module, feed), wanted, strict=True):
        np.testing.assert_array_equal(found, output)


def chain(op: str, length: int, rest: str) -> Module:
    steps = "\n".join(f"v{i + 1} = {op}(v{i}, {rest})" for i in range(length))
    return module_of(
        f"""g (float[n,3] v0, float[1,3] z) => (float[a,b] v{length})
        <int64[1] one = {{1}}, int64[1] far = {{{2**63 - 1}}}> {{ {steps} }}"""
    )


def test_a_deep_tree_of_concatenations_is_merged_at_its_root() -> None:
    module = chain("Concat<axis = 0>", 400, "z")
    result = canonicalize(module)
    assert ops(module) == ["Concat"]
    assert result.rewrites["concat-of-concat"] == 1


def test_a_long_chain_of_slices_has_a_short_shape() -> None:
    module = chain("Slice", 60, "one, far")
    canonicalize(module)
    assert ops(module) == ["Slice"]
    feed = {"v0": np.zeros((70, 3), np.float32), "z": np.zeros((1, 3), np.float32)}
    assert run_plain(module, feed)[0].shape == (10, 3)


def test_keepdims_is_only_one() -> None:
    """Runtimes keep the axes at 1 only; 2 once read as true, and the rank was inferred wrongly."""
    module = module_of(
        """g (float[N, S, 2] x) => (int64[1] y) <int64[1] last = {-1}, int64[1] end = {99}>
        { m = ReduceMean<axes = [-1], keepdims = 2>(x) s = Shape(m) y = Slice(s, last, end) }""",
        opset=13,
    )
    run_pass(Canonicalize(), module)
    (found,) = run_plain(module, {"x": np.ones((3, 5, 2), np.float32)})
    assert found.tolist() == [5]


@pytest.mark.parametrize("order", ["a, b", "b, a"])
def test_equal_constants_become_the_one_that_leaves_the_graph(order: str) -> None:
    """Whichever comes first: results do not depend on the order of initializers."""
    numbers = {"a": "int64[2] a = {2, 4}", "b": "int64[2] b = {2, 4}"}
    constants = ", ".join(numbers[name] for name in order.split(", "))
    module = module_of(f"""
    g (float[8] x, float[8] z) => (float[2, 4] y, float[2, 4] w, int64[2] b) <{constants}> {{
        y = Reshape(x, a)
        w = Reshape(z, b)
    }}""")
    canonicalize(module)
    assert list(module.graph.initializers) == ["b"]


@pytest.mark.parametrize(
    ("kind", "left"), [("float", ["Relu"]), ("float16", ["Cast", "Relu"]), ("int64", ["Cast"])]
)
def test_casts_to_the_type_of_a_value_name_it(kind: str, left: list[str]) -> None:
    end = "y = Relu(c)" if "Relu" in left else "y = Identity(c)"
    module = module_of(
        f"g (float[n] x, {kind}[m] z) => ({kind}[n] y) {{ c = CastLike(x, z) {end} }}", 21
    )
    like = np.ones(3, {"float": "float32"}.get(kind, kind))
    feed = {"x": np.array([-1.5, 2.5], np.float32), "z": like}
    (wanted,) = run_plain(module, feed)
    assert canonicalize(module).changed
    assert ops(module) == left
    (found,) = run_plain(module, feed)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


SEQUENCES = {
    "chunks": ("s = SplitToSequence<axis = 1>(x, two)", ["Split"]),
    "parts": ("s = SplitToSequence<axis = -1>(x, parts)", ["Split"]),
    "slices-kept": ("s = SplitToSequence<axis = 1>(x)", ["Split"]),
    "slices": ("s = SplitToSequence<axis = 1, keepdims = 0>(x)", ["Gather", "Gather"]),
    "made": ("u = Neg(x) v = Abs(x) s = SequenceConstruct(u, x, v)", ["Neg", "Abs"]),
    "free-axis": ("s = SplitToSequence(x, two)", ["SplitToSequence", "SequenceAt", "SequenceAt"]),
}


@pytest.mark.parametrize("spelling", SEQUENCES)
def test_elements_of_sequences_are_tensors(spelling: str) -> None:
    """The last of unequal chunks is smaller; places may count from the end."""
    text, left = SEQUENCES[spelling]
    shapes = ("[b]", "[d]") if spelling == "slices" else ("[b, c]", "[d, e]")
    module = agree(
        f"""g (float[a, 5] x) => (float{shapes[0]} y, float{shapes[1]} z)
        <int64 two = {{2}}, int64[3] parts = {{1, 3, 1}}, int64 first = {{0}}, int64 last = {{-1}}>
        {{
            {text} p = SequenceAt(s, first) q = SequenceAt(s, last)
            y = Identity(p) z = Identity(q)
        }}""",
        {"x": np.arange(20, dtype=np.float32).reshape(4, 5) - 7},
    )
    assert ops(module) == left


def test_a_sequence_that_is_put_together_again() -> None:
    module = agree(
        """g (float[a] x) => (float[b] y, float[c, d] z) {
            u = Neg(x) s = SequenceConstruct(u, x)
            y = ConcatFromSequence<axis = 0>(s) z = ConcatFromSequence<axis = 0, new_axis = 1>(s)
        }""",
        {"x": np.arange(3, dtype=np.float32)},
    )
    assert sorted(ops(module)) == ["Concat", "ConcatFromSequence", "Neg", "SequenceConstruct"]


def test_an_element_that_is_asked_for_twice_and_one_that_is_not_there() -> None:
    module = agree(
        """g (float[4] x) => (float[2] y, float[2] z) <int64 two = {2}, int64 one = {1}> {
            s = SplitToSequence(x, two) y = SequenceAt(s, one) z = SequenceAt(s, one)
        }""",
        {"x": np.arange(4, dtype=np.float32)},
    )
    assert sorted(ops(module)) == ["Identity", "Split"]
    module = module_of(
        """g (float[4] x) => (float[2] y) <int64 two = {2}> {
            s = SplitToSequence(x, two) y = SequenceAt(s, two)
        }"""
    )
    canonicalize(module)
    assert "SequenceAt" in ops(module)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s = SplitToSequence<keepdims = 0>(x) y = SequenceAt(s, ones)", "SequenceAt"),
        ("s = SplitToSequence<keepdims = 0>(x, one) y = SequenceAt(s, one)", "SequenceAt"),
        ("s = SplitToSequence<keepdims = 0>(x, halves) y = SequenceAt(s, ones)", "Split"),
        ("s = SplitToSequence<keepdims = 0>(x, fours) y = SequenceAt(s, one)", "Split"),
    ],
    ids=["place-of-one", "scalar-one", "halves", "vector-of-ones"],
)
def test_axes_of_elements_are_those_that_the_runtime_gives(text: str, left: str) -> None:
    module = agree(
        f"""g (float[4, 3] x) => (float y) <int64 one = {{1}}, int64[1] ones = {{1}},
            int64[2] halves = {{2, 2}}, int64[4] fours = {{1, 1, 1, 1}}> {{ {text} }}""",
        {"x": np.arange(12, dtype=np.float32).reshape(4, 3)},
    )
    assert left in ops(module)


@pytest.mark.parametrize(
    "body",
    [
        # Another graph reads an element, which a Split there could not give.
        """s = SplitToSequence(x, two)
        y = If (c) <then_branch = t () => (float[2] p) { p = SequenceAt(s, one) },
                    else_branch = e () => (float[2] q) { q = SequenceAt(s, one) }>""",
        "y = SplitToSequence(x, two) z = SequenceAt(y, one)",
        "s = SplitToSequence(x, short) y = SequenceAt(s, zero)",
        "r = Unsqueeze(x, none) s = SequenceConstruct(x, r) y = ConcatFromSequence<axis = 0>(s)",
    ],
    ids=["branches", "an-output", "parts-too-short", "ranks"],
)
def test_sequences_that_stay(body: str) -> None:
    """In the second, the sequence leaves the graph; the last two fail where they are run."""
    result = "seq(float[n]) y, float[2] z" if "z =" in body else "float[n] y"
    module = module_of(
        f"""g (bool c, float[4] x) => ({result}) <int64 zero = {{0}}, int64 one = {{1}},
            int64 two = {{2}}, int64[1] short = {{2}}, int64[1] none = {{0}}> {{ {body} }}"""
    )
    before = sorted(ops(module))
    canonicalize(module)
    assert sorted(ops(module)) == before


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("w = Unsqueeze(i, last) y = GatherND(x, w)", ["Gather"]),
        ("y = GatherND(x, rows)", ["Gather"]),
        ("w = Unsqueeze(i, first) y = GatherND(x, w)", ["Unsqueeze", "GatherND"]),
        ("w = Unsqueeze(k, last) y = GatherND<batch_dims = 1>(x, w)", ["Unsqueeze", "GatherND"]),
        ("y = GatherND(x, pairs)", ["GatherND"]),
    ],
    ids=["unsqueezed", "constant", "coordinates", "batch", "pairs"],
)
def test_rows_by_their_places(body: str, left: list[str]) -> None:
    module = agree(
        f"""g (float[3, 4] x, int64[a] i, int64[3] k) => (float y) <int64[1] last = {{-1}},
            int64[1] first = {{0}}, int64[2, 1] rows = {{-1, 0}}, int64[1, 2] pairs = {{1, 2}}>
            {{ {body} }}""",
        {
            "x": np.arange(12, dtype=np.float32).reshape(3, 4),
            "i": np.array([2, -2]),
            "k": np.array([0, 3, 1]),
        },
    )
    assert ops(module) == left
