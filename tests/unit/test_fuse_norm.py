"""fuse-norm: each spelling becomes one operator that computes the same; near misses stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of, ops, run_pass, run_pass_to_the_end, run_plain

from lwc.core.module import Module
from lwc.core.printer import print_module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.fusion.fuse_norm import FuseNorm
from lwc.verify import GRAMMAR, Motif, Sketch, check_pass, sketches, with_near_misses
from lwc.verify.generate.motifs.common import WIDTH, either, hidden, row, weighted

Array = np.ndarray[Any, Any]

RTOL, ATOL = 1e-5, 2e-6
"""float32 rounding of means of eight numbers; results are of the order of one."""

HALF_TOLERANCE = 4e-3
"""float16 results up to 4 are rounded to 2**-9, twice where a weight is multiplied apart."""

ROW = "{1, 0.5, 2, -1, 3, 1.5, 0.25, 1}"
CONSTANTS = f"""<float two = {{2}}, int64 whole_two = {{2}}, float half = {{0.5}},
 float one = {{1}}, float minus_half = {{-0.5}}, float eps = {{0.001}},
 float[1, 1] wide_eps = {{0.001}}, float count = {{8}}, float share = {{0.125}},
 int64[1] last = {{-1}}, float[8] w = {ROW}, float[8] b = {ROW}, float[1, 1, 8] wide_w = {ROW},
 float[1] scalar = {{3}}>"""


def feed_of(module: Module, rows: int) -> dict[str, Array]:
    """Draw inputs; `B` is 2 and `S` is `rows`."""
    random = np.random.default_rng(rows)
    extents = {"B": 2, "S": rows}
    feed = {}
    for value in module.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else extents[str(d.value)] for d in value.shape]
        assert value.name is not None
        assert value.dtype is not None
        feed[value.name] = (random.standard_normal(shape) + 0.5).astype(value.dtype.numpy())
    return feed


def fuse(
    body: str,
    *,
    inputs: str = "float[B, S, 8] x",
    outputs: str = "float[B, S, 8] y",
    opset: int = 17,
    tolerance: float = 0.0,
    **options: Any,
) -> tuple[list[str], Module]:
    """Fuse, compare at two extents, check that a second run changes nothing."""
    module = module_of(f"g ({inputs}) => ({outputs})\n{CONSTANTS}\n{{{body}}}", opset)
    feeds = [feed_of(module, rows) for rows in (3, 5)]
    wanted = [run_plain(module, feed) for feed in feeds]
    run_pass_to_the_end(FuseNorm(**options), module)
    for feed, expected in zip(feeds, wanted, strict=True):
        for a, b in zip(run_plain(module, feed), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance or RTOL, atol=tolerance or ATOL)
    return [op for op in ops(module) if op != "Constant"], module


def missed(module: Module) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


SQUARES = ("Pow(x, two)", "Pow(x, whole_two)", "Mul(x, x)")
MEANS = (
    ("m = ReduceMean<axes = [-1]>(q)", 17),
    ("m = ReduceMean<axes = [2], keepdims = 1>(q)", 13),
    ("m = ReduceMean(q, last)", 18),
    ("t = ReduceSum(q, last) m = Div(t, count)", 17),
    ("t = ReduceSum(q, last) m = Mul(share, t)", 18),
)
ROOTS = (
    "r = Sqrt(v) n = Div(x, r)",
    "r = Sqrt(v) i = Reciprocal(r) n = Mul(x, i)",
    "r = Sqrt(v) i = Div(one, r) n = Mul(i, x)",
    "i = Pow(v, minus_half) n = Mul(x, i)",
    "r = Pow(v, half) n = Div(x, r)",
    "o = Reciprocal(v) i = Sqrt(o) n = Mul(x, i)",
)
RMS = "SimplifiedLayerNormalization"


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize(("mean", "opset"), MEANS)
def test_squares_and_means_of_rms_norm(square: str, mean: str, opset: int) -> None:
    body = f"q = {square} {mean} v = Add(m, eps) {ROOTS[0]} y = Mul(n, w)"
    assert fuse(body, opset=opset)[0] == [RMS]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("epsilon", ["Add(m, eps)", "Add(eps, m)", "Add(m, wide_eps)"])
def test_roots_of_rms_norm(root: str, epsilon: str) -> None:
    found, module = fuse(
        f"q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = {epsilon} {root} y = Mul(w, n)"
    )
    assert found == [RMS]
    (norm,) = module.graph
    assert norm.inputs[1] is module.graph.initializers["w"]
    assert norm.attributes["epsilon"].as_float() == np.float32(0.001)
    assert list(module.graph.initializers) == ["w"]


@pytest.mark.parametrize(
    "end",
    [
        "y = Identity(n)",
        "y = Mul(n, wide_w)",
        "y = Mul(n, scalar)",
        "k = Add(w, one) y = Mul(k, n)",
    ],
)
def test_weights_of_rms_norm(end: str) -> None:
    found, _ = fuse(
        f"q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) {ROOTS[0]} {end}"
    )
    assert RMS in found
    assert "Mul" not in found


@pytest.mark.parametrize(
    "end",
    ["k = Mul(i, w) y = Mul(x, k)", "k = Mul(w, i) y = Mul(k, x)", "k = Mul(w, x) y = Mul(k, i)"],
)
def test_weights_multiplied_before(end: str) -> None:
    start = "q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v)"
    assert fuse(f"{start} i = Reciprocal(r) {end}")[0] == [RMS]


LAYER = "c = ReduceMean<axes = [-1]>(x) d = Sub(x, c)"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("opset", [13, 17])
def test_spellings_of_layer_norm(again: bool, square: str, root: str, opset: int) -> None:
    other = "c2 = ReduceMean<axes = [-1]>(x) d2 = Sub(x, c2)" if again else ""
    body = (
        f"{LAYER} {other} q = {square.replace('x', 'd2' if again else 'd')} "
        f"m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) {root.replace('x', 'd')} "
        "s = Mul(w, n) y = Add(s, b)"
    )
    assert fuse(body, opset=opset)[0] == ["LayerNormalization"]


@pytest.mark.parametrize("end", ["y = Identity(n)", "y = Mul(n, w)", "y = Add(b, n)"])
def test_layer_norm_without_weight_or_bias(end: str) -> None:
    body = f"{LAYER} q = Mul(d, d) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps)"
    found, _ = fuse(f"{body} r = Sqrt(v) n = Div(d, r) {end}")
    assert set(found) <= {"LayerNormalization", "Identity"}


def test_before_and_after() -> None:
    _, module = fuse(
        f"{LAYER} q = Pow(d, two) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) "
        "r = Sqrt(v) n = Div(d, r) s = Mul(n, w) y = Add(s, b)"
    )
    assert [line.split("  #")[0] for line in print_module(module).splitlines()[4:]] == [
        "  %y: f32[B, S, 8] = LayerNormalization(%x, %w, %b) {axis=-1, epsilon=0.001}",
        "  return %y: f32[B, S, 8]",
        "}",
    ]


@pytest.mark.parametrize("factor", ["i = Reciprocal(r) k = Mul(i, w)", "k = Div(one, r)"])
def test_layer_norm_in_the_form_of_batch_norm(factor: str) -> None:
    body = f"{LAYER} q = Mul(d, d) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v)"
    body = f"{body} {factor} s = Mul(x, k) t = Mul(c, k) h = Sub(b, t) y = Add(s, h)"
    assert fuse(body)[0] == ["LayerNormalization"]


def test_several_last_axes() -> None:
    norm = "m = ReduceMean<axes = [1, 2]>(q) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)"
    found, module = fuse(
        f"q = Mul(x, x) {norm}", inputs="float[B, 3, 8] x", outputs="float[B, 3, 8] y"
    )
    assert found == [RMS]
    (node,) = module.graph
    assert node.attributes["axis"].as_int() == -2


@pytest.mark.parametrize("form", ["auto", "standard", "contrib"])
def test_forms(form: str) -> None:
    body = "q = Mul(x, x) m = ReduceMean(q, last) v = Add(m, eps) r = Sqrt(v) n = Div(x, r)"
    wanted = RMS if form == "contrib" else "RMSNormalization"
    assert fuse(f"{body} y = Mul(n, w)", opset=23, form=form)[0] == [wanted]


def test_the_standard_form_needs_its_opset() -> None:
    body = "q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)"
    found, module = fuse(body, form="standard")
    assert "Sqrt" in found
    assert "from opset 23 on, this is 17" in missed(module)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, w) r = Sqrt(v) y = Div(x, r)",
         "epsilon is not one positive constant"),
        ("q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) r = Sqrt(m) y = Div(x, r)",
         "no epsilon"),
        ("q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) s = Sqrt(m) r = Add(s, eps) y = Div(x, r)",
         "after the root"),
        ("q = Mul(x, x) m = ReduceMean<axes = [1]>(q) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)",
         "not over the last axes"),
        ("q = Mul(x, x) m = ReduceMean<axes = [0, 2]>(q) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)",
         "not over the last axes"),
        ("a = Abs(x) q = Mul(a, a) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) "
         "y = Div(x, r)", "not what the root was taken of"),
        (f"{LAYER} q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) "
         "y = Div(d, r)", "not what the root was taken of"),
        ("q = Mul(x, x) p = ReduceMean<axes = [-1]>(q) c = ReduceMean<axes = [-1]>(x) "
         "e = Mul(c, c) m = Sub(p, e) v = Add(m, eps) d = Sub(x, c) r = Sqrt(v) y = Div(d, r)",
         "difference of two means"),
        ("q = Mul(x, x) t = ReduceSum(q, last) m = Div(t, two) v = Add(m, eps) r = Sqrt(v) "
         "y = Div(x, r)", ""),
        ("q = Pow(x, half) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) "
         "y = Div(x, r)", ""),
    ],
)  # fmt: skip
def test_near_misses_stay(body: str, reason: str) -> None:
    found, module = fuse(body)
    assert "Sqrt" in found
    assert reason in missed(module)


RMS_BODY = "q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) n = Div(x, r) "


@pytest.mark.parametrize("inner", ["q", "m", "v", "r"])
def test_values_inside_that_others_read_stay(inner: str) -> None:
    found, module = fuse(
        f"{RMS_BODY} y = Mul(n, w) z = Neg({inner})", outputs="float[B, S, 8] y, float[B, S, U] z"
    )
    assert "Sqrt" in found
    assert "other consumers" in missed(module)


@pytest.mark.parametrize("inner", ["q", "m", "v", "r"])
def test_graph_outputs_inside_stay(inner: str) -> None:
    found, module = fuse(
        f"{RMS_BODY} y = Mul(n, w)", outputs=f"float[B, S, 8] y, float[B, S, U] {inner}"
    )
    assert "Sqrt" in found
    assert "other consumers" in missed(module)


def test_a_normalized_value_that_others_read_keeps_its_weight_apart() -> None:
    found, _ = fuse(
        f"{RMS_BODY} y = Mul(n, w) z = Neg(n)", outputs="float[B, S, 8] y, float[B, S, 8] z"
    )
    assert found == [RMS, "Mul", "Neg"]


def test_a_factor_along_another_axis_stays_apart() -> None:
    found, module = fuse(f"{RMS_BODY} y = Mul(n, u)", inputs="float[B, S, 8] x, float[S, 8] u")
    assert found == [RMS, "Mul"]
    assert "does not vary along the normalized axes alone" in missed(module)


def test_a_factor_that_widens_stays_apart() -> None:
    found, _ = fuse(
        f"{RMS_BODY} y = Mul(n, wide)", inputs="float[B, S, 8] x, float[2, 1, 1, 8] wide",
        outputs="float[2, B, S, 8] y",
    )  # fmt: skip
    assert found == [RMS, "Mul"]


def test_an_unknown_extent_stays() -> None:
    module = module_of(
        f"g (float[B, S] x) => (float[B, S] y)\n{CONSTANTS}\n{{{RMS_BODY} y = Identity(n)}}"
    )
    run_pass_to_the_end(FuseNorm(), module)
    assert "Sqrt" in ops(module)
    assert "extent" in missed(module)


@pytest.mark.parametrize(("name", "number"), [("double", 11), ("float16", 10)])
def test_other_types_stay(name: str, number: int) -> None:
    constants = "<float wide_two = {2}, float wide_eps = {0.001}>"
    casts = f"two = Cast<to = {number}>(wide_two) eps = Cast<to = {number}>(wide_eps)"
    module = module_of(
        f"g ({name}[B, 8] x) => ({name}[B, 8] y)\n{constants}\n{{{casts} q = Pow(x, two) "
        "m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) y = Div(x, r)}"
    )
    run_pass(Canonicalize(), module)
    run_pass_to_the_end(FuseNorm(), module)
    assert "Sqrt" in ops(module)
    assert f"it computes in {name}" in missed(module)


# Half precision around single precision


def half(body: str) -> tuple[list[str], Module]:
    constants = f"<float two = {{2}}, float eps = {{0.001}}, float[8] b = {ROW}>"
    inputs = "float16[B, S, 8] x, float16[8] w"
    module = module_of(f"g ({inputs}) => (float16[B, S, 8] y)\n{constants}\n{{{body}}}")
    feed = feed_of(module, 3)
    (wanted,) = run_plain(module, feed)
    run_pass_to_the_end(FuseNorm(), module)
    (found,) = run_plain(module, feed)
    np.testing.assert_allclose(found, wanted, rtol=HALF_TOLERANCE, atol=HALF_TOLERANCE)
    return ops(module), module


HALF_BODY = (
    "x32 = Cast<to = 1>(x) q = Pow(x32, two) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) "
    "r = Sqrt(v) i = Reciprocal(r) "
)


def test_casts_around_a_norm_of_half_precision() -> None:
    found, module = half(f"{HALF_BODY} n = Mul(x32, i) h = Cast<to = 10>(n) y = Mul(w, h)")
    assert found == [RMS]
    (norm,) = module.graph
    assert norm.inputs[0] is module.graph.inputs[0]


def test_the_input_cast_twice() -> None:
    body = f"{HALF_BODY} again = Cast<to = 1>(x) n = Mul(again, i) h = Cast<to = 10>(n)"
    assert half(f"{body} y = Mul(w, h)")[0] == [RMS]


def test_a_weight_in_single_precision() -> None:
    assert half(f"{HALF_BODY} n = Mul(x32, i) s = Mul(n, b) y = Cast<to = 10>(s)")[0] == [RMS]


def test_a_weight_that_half_precision_would_round_keeps_the_casts() -> None:
    body = f"{HALF_BODY} n = Mul(x32, i) s = Mul(n, uneven) y = Cast<to = 10>(s)"
    uneven = "float[8] uneven = {0.1, 0.2, 0.3, 1, 1, 1, 1, 1}"
    constants = f"<float two = {{2}}, float eps = {{0.001}}, {uneven}>"
    module = module_of(f"g (float16[B, S, 8] x) => (float16[B, S, 8] y)\n{constants}\n{{{body}}}")
    run_pass_to_the_end(FuseNorm(), module)
    assert ops(module) == ["Cast", RMS, "Cast"]
    assert "not exact in half precision" in missed(module)


# The operators that are there already


def test_operators_take_over_weight_and_bias() -> None:
    ones = "<float[8] ones = {1, 1, 1, 1, 1, 1, 1, 1}>"
    module = module_of(
        f"g (float[B, 8] x, float[8] w, float[8] b) => (float[B, 8] y)\n{ones}\n"
        "{n = LayerNormalization(x, ones) s = Mul(n, w) y = Add(b, s)}"
    )
    run_pass_to_the_end(FuseNorm(), module)
    assert ops(module) == ["LayerNormalization"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("y = LayerNormalization(x, w, b)", ["LayerNormalization"]),
        (f"y = {RMS}(x, w)", [RMS]),
        ("n = LayerNormalization(x, w, b) y = Mul(n, w)", ["LayerNormalization", "Mul"]),
        (f"n = {RMS}(x, w) y = Add(n, b)", [RMS, "Add"]),
        (
            "n, c = LayerNormalization(x, w) s = Add(n, c) y = Add(s, b)",
            ["LayerNormalization", "Add", "Add"],
        ),
    ],
)
def test_what_operators_cannot_take_over_stays(body: str, left: list[str]) -> None:
    assert fuse(body)[0] == left


# The sum before


SUM = "a = Add(x, u) "
TWO = "float[B, S, 8] x, float[B, S, 8] u"
NORMS = {"layer": "LayerNormalization(a, w, b)", "rms": f"{RMS}<epsilon = 0.01>(a, w)"}
SKIPS = {"layer": "SkipLayerNormalization", "rms": "SkipSimplifiedLayerNormalization"}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("rows", ["B, S, ", "S, "])
def test_a_residual_sum_goes_into_the_norm(kind: str, rows: str) -> None:
    inputs = TWO.replace("B, S, ", rows)
    found, module = fuse(
        f"{SUM} y = {NORMS[kind]}", inputs=inputs, outputs=f"float[{rows}8] y", skip="all"
    )
    assert found == [SKIPS[kind]]
    assert [len(node.outputs) for node in module.graph] == [1]


@pytest.mark.parametrize("kind", NORMS)
def test_the_sum_is_given_where_others_read_it(kind: str) -> None:
    found, module = fuse(
        f"{SUM} early = Neg(a) y = {NORMS[kind]} late = Sub(a, y)",
        inputs=TWO,
        outputs="float[B, S, 8] y, float[B, S, 8] early, float[B, S, 8] late, float[B, S, 8] a",
        skip="all",
    )
    assert found == [SKIPS[kind], "Neg", "Sub"]
    assert [value.name for value in module.graph.node(0).outputs] == ["y", "", "", "a"]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", ["p = Add(x, b) a = Add(p, u)", "p = Add(b, u) a = Add(x, p)"])
def test_a_bias_before_the_sum(kind: str, bias: str) -> None:
    found, module = fuse(f"{bias} y = {NORMS[kind]}", inputs=TWO, skip="all")
    assert found == [SKIPS[kind]]
    assert module.graph.node(0).inputs[-1] is module.graph.initializers["b"]


def test_a_spelled_norm_of_a_sum() -> None:
    body = RMS_BODY.replace("(x, ", "(a, ").replace(", x)", ", a)")
    found, _ = fuse(f"{SUM} {body} y = Mul(n, w)", inputs=TWO)
    assert found == ["SkipSimplifiedLayerNormalization"]


@pytest.mark.parametrize("other", ["1, S, 8", "S, 8"])
def test_the_same_rows_for_the_whole_batch(other: str) -> None:
    found, module = fuse(
        f"a = Add(u, x) y = {NORMS['rms']}", inputs=f"float[B, S, 8] x, float[{other}] u"
    )
    assert found == ["SkipSimplifiedLayerNormalization"]
    assert module.graph.node(0).inputs[0] is module.graph.inputs[0]


def test_weights_behind_the_sum() -> None:
    body = f"{SUM} z = Neg(a) k = Add(w, b) y = {RMS}(a, k)"
    found, module = fuse(body, inputs=TWO, outputs="float[B, S, 8] y, float[B, S, 8] z")
    assert "Skip" not in "".join(found)
    assert "its weight is computed after the sum" in missed(module)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ("float[B, S, 8] x, float[B, 1, 8] u", "float[B, S, 8] y", "differ in more than the batch"),
        ("float[B, 1, 8] x, float[1, S, 8] u", "float[B, S, 8] y", "differ in more than the batch"),
        ("float[B, 2, S, 8] x, float[B, 2, S, 8] u", "float[B, 2, S, 8] y", "rank 4"),
        ("float[8] x, float[8] u", "float[8] y", "rank 1"),
    ],
)
def test_sums_that_the_kernel_refuses(inputs: str, outputs: str, reason: str) -> None:
    found, module = fuse(f"{SUM} y = {NORMS['rms']}", inputs=inputs, outputs=outputs)
    assert found == ["Add", RMS]
    assert reason in missed(module)


def test_skip_is_for_rms_norm_by_default_and_never_standard() -> None:
    assert fuse(f"{SUM} y = {NORMS['layer']}", inputs=TWO)[0] == ["Add", "LayerNormalization"]
    body = f"{SUM} y = {NORMS['rms']}"
    assert fuse(body, inputs=TWO, skip="none")[0] == ["Add", RMS]
    assert fuse(body, inputs=TWO, form="standard")[0] == ["Add", RMS]


def test_bodies() -> None:
    module = module_of(
        "g (float[2, 8] x, bool c) => (float[2, 8] y)\n<float eps = {0.001}>\n{"
        "y = If (c) <then_branch = yes () => (float[2, 8] o) {"
        "q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) v = Add(m, eps) r = Sqrt(v) o = Div(x, r)"
        "}, else_branch = no () => (float[2, 8] p) {p = Neg(x)}>}"
    )
    feed = {"x": np.arange(16, dtype=np.float32).reshape(2, 8), "c": np.array(True)}
    (wanted,) = run_plain(module, feed)
    run_pass_to_the_end(FuseNorm(), module)
    assert sorted(ops(module)) == ["If", "Neg", RMS]
    np.testing.assert_allclose(run_plain(module, feed)[0], wanted, rtol=RTOL, atol=ATOL)


# Graphs that hypothesis draws


def residual(sketch: Sketch) -> ir.Value:
    """Add a norm of a sum: some rows, a bias, other shapes; the sum read again or not."""
    x = hidden(sketch, None)
    if sketch.flip():
        x = either(sketch, "Add", weighted(sketch, x), row(sketch, WIDTH, "bias"))
    shape = sketch.shape(x)
    other = sketch.pick(None, where=lambda s: s[-1:] == (WIDTH,) and sketch.broadcasts(shape, s))
    total = either(sketch, "Add", x, other)
    if sketch.flip():
        sketch.keep(total)
    weights = [row(sketch, WIDTH, "weight")]
    if sketch.flip():
        return sketch.emit(RMS, total, *weights, axis=-1, epsilon=sketch.choose(1e-5, None))
    if sketch.opset < 17:
        return sketch.emit("Relu", total)
    weights += [row(sketch, WIDTH, "bias")] if sketch.flip() else []
    return sketch.emit("LayerNormalization", total, *weights, axis=sketch.choose(-1, None))


def test_drawn_graphs() -> None:
    report = check_pass(FuseNorm(), examples=150)
    assert {"layer-norm", "rms-norm", "norm-weight", "norm-bias"} <= set(report.rewrites)


def test_drawn_sums() -> None:
    grown = sketches([*[Motif("residual", residual)] * 3, *GRAMMAR[:4]], steps=(1, 3), evenly=True)
    report = check_pass(
        FuseNorm(skip="all"), graphs=with_near_misses(grown, evenly=True), examples=100
    )
    assert report.rewrites["skip-norm"] > 20
