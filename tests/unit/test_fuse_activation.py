"""fuse-activation: each spelling becomes one operator that computes the same; near misses stay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from support import module_of, ops, run_pass, run_pass_to_the_end, run_plain

from lwc.core.module import Module
from lwc.core.printer import print_module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.fusion.fuse_activation import FuseActivation
from lwc.verify import GRAMMAR, Motif, Sketch, check_pass, sketches, with_near_misses
from lwc.verify.generate.motifs.activations import gate, gelu
from lwc.verify.generate.motifs.common import WIDTH, either, hidden, row

RTOL, ATOL = 1e-5, 2e-6
"""float32: a few products, and an erf or tanh of two units in the last place."""

CONSTANTS = f"""<float half = {{0.5}}, float one = {{1}}, float two = {{2}}, float three = {{3}},
 int64 whole_three = {{3}}, float[1] wide_half = {{0.5}}, float root = {{{math.sqrt(2)}}},
 float over_root = {{{math.sqrt(0.5)}}}, float quick = {{1.702}}, float c = {{0.044715}},
 float k = {{{math.sqrt(2 / math.pi)}}}, float double_k = {{{math.sqrt(8 / math.pi)}}},
 float rough_root = {{1.4142}}, float rough_c = {{0.0447}}, float third = {{0.3}},
 float[8] b = {{1, 0.5, 2, -1, 3, 1.5, 0.25, 1}}, float[4] twos = {{2, 2, 2, 2}}>"""


def feed_of(module: Module, rows: int) -> dict[str, Any]:
    """Draw inputs up to 10 in size; `B` is 2 and `S` is `rows`."""
    random = np.random.default_rng(rows)
    extents = {"B": 2, "S": rows}
    feed = {}
    for value in module.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else extents[str(d.value)] for d in value.shape]
        assert value.name is not None
        feed[value.name] = np.asarray(random.standard_normal(shape) * 4, np.float32)
    return feed


def fuse(
    body: str,
    *,
    inputs: str = "float[B, S, 8] x",
    outputs: str = "float[B, S, 8] y",
    opset: int = 17,
    **options: Any,
) -> tuple[list[str], Module]:
    """Fuse, compare at two extents, check that a second run changes nothing."""
    module = module_of(f"g ({inputs}) => ({outputs})\n{CONSTANTS}\n{{{body}}}", opset)
    feeds = [feed_of(module, rows) for rows in (3, 5)]
    wanted = [run_plain(module, feed) for feed in feeds]
    run_pass_to_the_end(FuseActivation(**options), module)
    for feed, expected in zip(feeds, wanted, strict=True):
        for a, b in zip(run_plain(module, feed), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL)
    return [op for op in ops(module) if op != "Constant"], module


def missed(module: Module) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


ERF = "s = Div(x, root) e = Erf(s) g = Add(e, one) "
GELU_ENDS = (
    "f = Mul(x, g) y = Mul(f, half)",
    "f = Mul(half, x) y = Mul(f, g)",
    "f = Mul(g, wide_half) y = Mul(f, x)",
    "f = Mul(g, x) y = Div(f, two)",
    "f = Div(g, two) y = Mul(x, f)",
    "f = Div(x, two) y = Mul(g, f)",
)


@pytest.mark.parametrize("end", GELU_ENDS)
@pytest.mark.parametrize("scale", ["Div(x, root)", "Mul(over_root, x)"])
@pytest.mark.parametrize("opset", [13, 20])
def test_spellings_of_gelu(end: str, scale: str, opset: int) -> None:
    found, module = fuse(f"s = {scale} e = Erf(s) g = Add(one, e) {end}", opset=opset)
    assert found == ["Gelu"]
    (node,) = module.graph
    assert node.domain == ("" if opset >= 20 else "com.microsoft")
    assert not module.graph.initializers


def test_the_half_distributed() -> None:
    body = "s = Div(x, root) e = Erf(s) h = Mul(e, half) g = Add(h, half) y = Mul(x, g)"
    assert fuse(body)[0] == ["Gelu"]


CUBICS = (
    "q = Pow(x, three) t = Mul(q, c) u = Add(x, t) i = Mul(u, k)",
    "q = Pow(x, whole_three) t = Mul(c, q) u = Add(t, x) i = Mul(k, u)",
    "p = Mul(x, x) q = Mul(p, x) t = Mul(q, c) u = Add(x, t) i = Mul(u, k)",
    "p = Mul(x, x) t = Mul(p, c) u = Add(t, one) v = Mul(x, u) i = Mul(v, k)",
    "p = Pow(x, two) t = Mul(p, c) u = Add(one, t) v = Mul(x, k) i = Mul(v, u)",
)


@pytest.mark.parametrize("cubic", CUBICS)
@pytest.mark.parametrize("end", GELU_ENDS[:3])
@pytest.mark.parametrize("opset", [17, 20])
def test_spellings_of_gelu_by_tanh(cubic: str, end: str, opset: int) -> None:
    body = f"{cubic} e = Tanh(i) g = Add(e, one) {end}"
    found, module = fuse(body, opset=opset)
    assert found == ["Gelu" if opset >= 20 else "FastGelu"]
    if opset >= 20:
        assert module.graph.node(0).attributes["approximate"].as_string() == "tanh"


def test_gelu_by_tanh_spelled_with_a_sigmoid() -> None:
    body = "q = Pow(x, three) t = Mul(q, c) u = Add(x, t) i = Mul(u, double_k) s = Sigmoid(i)"
    assert fuse(f"{body} y = Mul(x, s)")[0] == ["FastGelu"]


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", 1.0),
        ("s = Sigmoid(x) y = Mul(s, x)", 1.0),
        ("i = Mul(quick, x) s = Sigmoid(i) y = Mul(x, s)", 1.702),
        ("i = Div(x, two) s = Sigmoid(i) y = Mul(x, s)", 0.5),
        ("n = Neg(x) s = Sigmoid(n) y = Mul(x, s)", -1.0),
    ],
)
@pytest.mark.parametrize("form", ["auto", "contrib", "standard"])
def test_swish(body: str, alpha: float, form: str) -> None:
    found, module = fuse(body, opset=24 if form == "standard" else 17, form=form)
    assert found == ["Swish" if form == "standard" else "QuickGelu"]
    assert module.graph.node(0).attributes["alpha"].as_float() == np.float32(alpha)


def test_before_and_after() -> None:
    _, module = fuse(f"a = Add(x, b) {ERF.replace('(x', '(a')} p = Mul(a, g) y = Mul(p, half)")
    assert [line.split("  #")[0] for line in print_module(module).splitlines()[3:]] == [
        "  %y: f32[B, S, 8] = com.microsoft::BiasGelu(%x, %b)",
        "  return %y: f32[B, S, 8]",
        "}",
    ]


def test_a_gated_network_keeps_its_product() -> None:
    found, _ = fuse(
        "s = Sigmoid(x) a = Mul(x, s) y = Mul(a, up)",
        inputs="float[B, S, 8] x, float[B, S, 8] up",
    )
    assert found == ["QuickGelu", "Mul"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{ERF} y = Mul(x, g)", "its constant factors are 1 and 1, not 0.5"),
        (f"{ERF} p = Mul(x, g) y = Mul(p, third)", "not 0.5"),
        (f"{ERF} p = Mul(x, g) y = Mul(p, b)", "not 0.5"),
        ("s = Div(x, rough_root) e = Erf(s) g = Add(e, one) p = Mul(x, g) y = Mul(p, half)",
         "another polynomial"),
        ("s = Div(x, root) e = Erf(s) g = Add(e, two) p = Mul(x, g) y = Mul(p, half)",
         "its constant factors are 1 and 0.5"),
        ("n = Abs(x) s = Div(n, root) e = Erf(s) g = Add(e, one) p = Mul(x, g) y = Mul(p, half)",
         "no polynomial of x"),
        ("q = Pow(x, three) t = Mul(q, rough_c) u = Add(x, t) i = Mul(u, k) e = Tanh(i) "
         "g = Add(e, one) p = Mul(x, g) y = Mul(p, half)", "another polynomial"),
        ("q = Pow(x, two) t = Mul(q, c) u = Add(x, t) i = Mul(u, k) e = Tanh(i) "
         "g = Add(e, one) p = Mul(x, g) y = Mul(p, half)", "another polynomial"),
        ("i = Mul(x, b) s = Sigmoid(i) y = Mul(x, s)", ""),
        ("i = Add(x, one) s = Sigmoid(i) y = Mul(x, s)", ""),
        ("n = Abs(x) s = Sigmoid(n) y = Mul(x, s)", ""),
        ("s = Sigmoid(x) p = Mul(x, s) q = Neg(s) y = Add(p, q)", "other consumers"),
    ],
)  # fmt: skip
def test_near_misses_stay(body: str, reason: str) -> None:
    found, module = fuse(body)
    assert "Gelu" not in "".join(found)
    assert reason in missed(module)


@pytest.mark.parametrize("inner", ["s", "e", "g", "p"])
@pytest.mark.parametrize("as_output", [False, True])
def test_values_inside_that_others_read_stay(inner: str, as_output: bool) -> None:
    reader = "" if as_output else f"z = Neg({inner})"
    found, module = fuse(
        f"{ERF} p = Mul(x, g) y = Mul(p, half) {reader}",
        outputs=f"float[B, S, 8] y, float[B, S, 8] {inner if as_output else 'z'}",
    )
    assert "Erf" in found
    assert missed(module)


def test_a_constant_that_widens_stays() -> None:
    found, module = fuse(
        "i = Mul(x, twos) s = Sigmoid(i) y = Mul(x, s)",
        inputs="float[B, S, 1] x",
        outputs="float[B, S, 4] y",
    )
    assert "Sigmoid" in found
    assert "a constant widens the result" in missed(module)


def test_half_precision_stays() -> None:
    module = module_of("g (float16[B, 8] x) => (float16[B, 8] y)\n{s = Sigmoid(x) y = Mul(x, s)}")
    run_pass_to_the_end(FuseActivation(), module)
    assert ops(module) == ["Sigmoid", "Mul"]
    assert "this is float16" in missed(module)


@pytest.mark.parametrize("body", [f"{ERF} {GELU_ENDS[0]}", "s = Sigmoid(x) y = Mul(x, s)"])
def test_the_standard_form_needs_its_opset(body: str) -> None:
    found, module = fuse(body, form="standard")
    assert "Gelu" not in "".join(found)
    assert "on, this is 17" in missed(module)


def test_fast_gelu_takes_no_single_number() -> None:
    body = f"{CUBICS[0]} e = Tanh(i) g = Add(e, one) f = Mul(x, g) y = Mul(f, half)"
    found, module = fuse(body, inputs="float x", outputs="float y")
    assert "Tanh" in found
    assert "no single number" in missed(module)
    assert fuse(body, inputs="float x", outputs="float y", opset=20)[0] == ["Gelu"]


# Operators that are there


@pytest.mark.parametrize(
    ("operator", "fused"),
    [
        ("Gelu(a)", "BiasGelu"),
        ('Gelu<approximate = "tanh">(a)', "FastGelu"),
        ("com.microsoft.Gelu(a)", "BiasGelu"),
        ("com.microsoft.FastGelu(a)", "FastGelu"),
    ],
)
@pytest.mark.parametrize("add", ["Add(x, b)", "Add(b, x)"])
def test_operators_take_the_bias_along(operator: str, fused: str, add: str) -> None:
    found, module = fuse_with_contrib(f"a = {add} y = {operator}")
    assert found == [fused]
    assert [value.name for value in module.graph.node(0).inputs if value is not None] == ["x", "b"]


def fuse_with_contrib(body: str, **options: Any) -> tuple[list[str], Module]:
    """Fuse a graph that has operators of ONNX Runtime."""
    header = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
    text = f"{header}g (float[B, S, 8] x) => (float[B, S, 8] y)\n{CONSTANTS}\n{{{body}}}"
    module = Module(ir.from_proto(onnx.parser.parse_model(text)))
    feed = feed_of(module, 3)
    (wanted,) = run_plain(module, feed)
    run_pass_to_the_end(FuseActivation(**options), module)
    np.testing.assert_allclose(run_plain(module, feed)[0], wanted, rtol=RTOL, atol=ATOL)
    return ops(module), module


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, x) y = Gelu(a)",
        "a = Add(x, half) y = Gelu(a)",
        "y = com.microsoft.BiasGelu(x, b)",
    ],
)
def test_what_is_no_bias_stays(body: str) -> None:
    assert fuse_with_contrib(body)[0][-1] == ("BiasGelu" if "BiasGelu" in body else "Gelu")


def test_a_bias_that_others_read_stays() -> None:
    found, module = fuse(
        "a = Add(x, b) y = Gelu(a) z = Neg(a)",
        outputs="float[B, S, 8] y, float[B, S, 8] z",
        opset=20,
    )
    assert found == ["Add", "Gelu", "Neg"]
    assert "the sum has other consumers" in missed(module)


def test_the_standard_form_has_no_bias() -> None:
    assert fuse("a = Add(x, b) y = Gelu(a)", opset=20, form="standard")[0] == ["Add", "Gelu"]


@pytest.mark.parametrize("attributes", ["", "<alpha = 1.702>"])
def test_swish_becomes_what_runs_faster(attributes: str) -> None:
    body = f"y = Swish{attributes}(x)"
    assert fuse(body, opset=24)[0] == ["QuickGelu"]
    assert fuse(body, opset=24, form="standard")[0] == ["Swish"]


def test_after_canonicalize() -> None:
    body = f"n = Constant<value_float = 0.5>() {ERF} p = Mul(x, g) y = Mul(p, n)"
    module = module_of(f"g (float[B, 8] x) => (float[B, 8] y)\n{CONSTANTS}\n{{{body}}}")
    run_pass(Canonicalize(), module)
    run_pass_to_the_end(FuseActivation(), module)
    assert ops(module) == ["Gelu"]


# Graphs that hypothesis draws


def biased(sketch: Sketch) -> ir.Value:
    """Add an operator of ONNX Runtime or of the newest opset, a bias before it or not."""
    x = hidden(sketch, None)
    if sketch.flip():
        x = either(sketch, "Add", x, row(sketch, WIDTH, "bias"))
        sketch.keep(x)
    if sketch.opset >= 24 and sketch.flip():
        return sketch.emit("Swish", x, alpha=sketch.choose(1.0, None, 1.702))
    return sketch.emit(sketch.choose("Gelu", "FastGelu"), x, domain="com.microsoft")


def test_drawn_graphs() -> None:
    report = check_pass(FuseActivation(), examples=150)
    assert {"gelu", "gelu-tanh", "swish"} <= set(report.rewrites)


@pytest.mark.parametrize("opset", [None, 24])
def test_drawn_operators(opset: int | None) -> None:
    motifs = [
        *[Motif("biased", biased), Motif("gelu", gelu), Motif("gate", gate)] * 2,
        *GRAMMAR[:3],
    ]
    grown = sketches(motifs, steps=(1, 4), opset=opset, evenly=True)
    report = check_pass(FuseActivation(), graphs=with_near_misses(grown, evenly=True), examples=100)
    assert report.rewrites["gelu-bias"] > 5
    assert report.rewrites["swish-operator"] > 5 or opset is None
