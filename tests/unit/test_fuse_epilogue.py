"""fuse-epilogue: bias, activation and gate become part of a quantized product; near misses stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantized import feed_of, missed, module_of, outputs, quantized
from support import run_pass, run_pass_to_the_end

from lwc.core.module import Module
from lwc.passes.fusion.fuse_epilogue import FuseEpilogue
from lwc.passes.quantization.dialect_ops import variant_of

INPUTS = "float[B,S,64] x"


def fuse(
    body: str,
    weights: str,
    *,
    inputs: str = INPUTS,
    result: str = "float[B,S,96] y",
    **options: Any,
) -> tuple[list[str], Module]:
    """Quantize, fuse, compare, check that a second run changes nothing; return what is left."""
    module = module_of(
        f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g ({inputs}) => ({result}) <{weights}> {{{body}}}"""
    )
    quantized(module, **{"bits": 4, "format": "lwc", **options})
    feed = feed_of(module)
    wanted = outputs(module, feed)
    run_pass_to_the_end(FuseEpilogue(), module)
    # Float32 rounding of sums taken in another order, through an activation of slope below 1.2.
    for found, before in zip(outputs(module, feed), wanted, strict=True):
        np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-4)
    return [node.op_type for node in module.graph], module


def variants(module: Module) -> list[tuple[str, int, int]]:
    """Return activation, bias and gate of each product."""
    found = [variant_of(node) for node in module.graph]
    return [(each.activation, each.bias, each.gated) for each in found if each is not None]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("y = Relu(p)", "relu"),
        ("y = Gelu(p)", "gelu"),
        ('y = Gelu<approximate = "tanh">(p)', "gelu_tanh"),
        ("y = com.microsoft.Gelu(p)", "gelu"),
        ("y = com.microsoft.FastGelu(p)", "gelu_tanh"),
        ("y = com.microsoft.QuickGelu<alpha = 1.0>(p)", "silu"),
    ],
)
@pytest.mark.parametrize("bits", [3, 8])
def test_activations(line: str, kind: str, bits: int) -> None:
    left, module = fuse(f"p = MatMul(x, w) {line}", "float[64,96] w", bits=bits)
    assert left == ["DynamicQuantMatMul"]
    assert variants(module) == [(kind, 0, 0)]


@pytest.mark.parametrize("line", ["s = Add(p, b) y = Relu(s)", "s = Add(b, p) y = Relu(s)"])
def test_bias_then_activation(line: str) -> None:
    left, module = fuse(f"p = MatMul(x, w) {line}", "float[64,96] w, float[96] b")
    assert left == ["DynamicQuantMatMul"]
    assert variants(module) == [("relu", 1, 0)]


def test_a_bias_inside_the_activation() -> None:
    left, module = fuse(
        "p = MatMul(x, w) y = com.microsoft.BiasGelu(p, b)", "float[64,96] w, float[96] b"
    )
    assert left == ["DynamicQuantMatMul"]
    assert variants(module) == [("gelu", 1, 0)]


GATED = """g = MatMul(x, a) o = com.microsoft.QuickGelu<alpha = 1.0>(g) u = MatMul(x, b)
y = Mul({0}, {1})"""


@pytest.mark.parametrize("order", [("o", "u"), ("u", "o")])
@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"bits": 8, "block_size": 0}])
def test_gate(order: tuple[str, str], options: dict[str, Any]) -> None:
    left, module = fuse(
        GATED.format(*order), "float[64,96] a, float[64,96] b", symmetric=order[0] == "o", **options
    )
    assert left == ["DynamicQuantMatMul"]
    assert variants(module) == [("silu", 0, 1)]


@pytest.mark.parametrize(("biased", "rows"), [("g", 1), ("u", 1), ("gu", 1)])
def test_gate_with_biases(biased: str, rows: int) -> None:
    gate = "p = MatMul(x, a) g = Add(p, c)" if "g" in biased else "g = MatMul(x, a)"
    up = "q = MatMul(x, b) u = Add(q, d)" if "u" in biased else "u = MatMul(x, b)"
    given = ["float[64,96] a", "float[64,96] b"]
    given += ["float[96] c"] * ("g" in biased) + ["float[96] d"] * ("u" in biased)
    left, module = fuse(f"{gate} o = Relu(g) {up} y = Mul(o, u)", ", ".join(given))
    assert left == ["DynamicQuantMatMul"]
    assert variants(module) == [("relu", 1, 1)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_halves_of_one_product(first: bool, bias: bool) -> None:
    product = "m = MatMul(x, w) p = Add(m, c)" if bias else "p = MatMul(x, w)"
    gate, other = ("h", "k") if first else ("k", "h")
    left, module = fuse(
        f"""{product} h, k = Split<axis = -1, num_outputs = 2>(p)
        o = com.microsoft.QuickGelu<alpha = 1.0>({gate}) y = Mul(o, {other})""",
        "float[64,192] w" + (", float[192] c" if bias else ""),
    )
    assert left == ["DynamicQuantMatMul"]
    assert variants(module) == [("silu", int(bias), 1)]


@pytest.mark.parametrize(
    ("body", "weights", "extra", "reason"),
    [
        ("p = MatMul(x, w) y = Relu(p) z = Neg(p)", "float[64,96] w", "float[B,S,96] z", None),
        ("p = MatMul(x, w) y = Tanh(p)", "float[64,96] w", None, None),
        (
            "p = MatMul(x, w) y = com.microsoft.QuickGelu<alpha = 1.702>(p)", "float[64,96] w",
            None, "no such activation",
        ),
        ("p = MatMul(x, w) y = Add(p, b)", "float[64,96] w, float[2,1,96] b", None, "no row"),
        ("p = MatMul(x, w) y = Add(p, b)", "float[64,96] w, float[1] b", None, "no row"),
        (
            "p = MatMul(x, a) g = Relu(p) u = MatMul(g, b) y = Mul(g, u)",
            "float[64,96] a, float[96,96] b", None, None,
        ),
        (
            "p = MatMul(x, a) g = Relu(p) u = MatMul(x, b) y = Mul(g, u) z = Neg(u)",
            "float[64,96] a, float[64,96] b", "float[B,S,96] z", None,
        ),
        (
            "p = MatMul(x, a) u = MatMul(x, b) y = Mul(p, u)",
            "float[64,96] a, float[64,96] b", None, None,
        ),
    ],
)  # fmt: skip
def test_near_misses(body: str, weights: str, extra: str | None, reason: str | None) -> None:
    result = "float[B,S,96] y" + (f", {extra}" if extra else "")
    _, module = fuse(body, weights, result=result)
    assert all(not gated for _, _, gated in variants(module))
    if reason is not None:
        assert any(reason in each for each in missed(module)), missed(module)


def test_columns_that_are_no_whole_tiles() -> None:
    left, module = fuse(
        GATED.format("o", "u"), "float[64,90] a, float[64,90] b", result="float[B,S,90] y"
    )
    assert sorted(left) == ["DynamicQuantMatMul", "DynamicQuantMatMul", "Mul"]
    assert any("no whole tiles" in each for each in missed(module))


def test_products_of_different_sources() -> None:
    left, _ = fuse(
        "g = MatMul(x, a) o = Relu(g) u = MatMul(z, b) y = Mul(o, u)",
        "float[64,96] a, float[64,96] b",
        inputs=f"{INPUTS}, float[B,S,64] z",
    )
    assert left.count("DynamicQuantMatMul") == 2


def test_a_row_with_more_axes_than_the_product() -> None:
    left, module = fuse(
        "p = MatMul(x, w) y = Add(p, b)", "float[64,96] w, float[1,1,1,96] b",
        result="float[1,B,S,96] y",
    )  # fmt: skip
    assert left == ["DynamicQuantMatMul", "Add"]
    assert any("more axes than the product" in each for each in missed(module))


def test_halves_of_another_axis() -> None:
    left, module = fuse(
        """p = MatMul(x, w) h, k = Split<axis = 1, num_outputs = 2>(p)
        o = com.microsoft.QuickGelu<alpha = 1.0>(h) y = Mul(o, k)""",
        "float[64,96] w", inputs="float[B,4,64] x", result="float[B,2,96] y",
    )  # fmt: skip
    assert left == ["DynamicQuantMatMul", "Split", "QuickGelu", "Mul"]
    assert variants(module) == [("none", 0, 0)]


def test_products_of_different_bits() -> None:
    module = module_of(
        f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g ({INPUTS}) => (float[B,S,96] y) <float[64,96] a, float[64,96] b>
        {{ {GATED.format("o", "u")} }}"""
    )
    quantized(module, bits=4, format="lwc", exclude=("b",))
    quantized(module, bits=8, format="lwc")
    run_pass_to_the_end(FuseEpilogue(), module)
    assert sorted(variants(module)) == [("none", 0, 0), ("silu", 0, 0)]
    assert "both products are quantized in different ways" in missed(module)


def test_what_is_gated_already_is_not_gated_again() -> None:
    left, module = fuse(
        GATED.format("o", "u").replace("y =", "m =") + " v = MatMul(x, c) y = Mul(m, v)",
        "float[64,96] a, float[64,96] b, float[64,96] c",
    )
    assert left == ["DynamicQuantMatMul", "DynamicQuantMatMul", "Mul"]
    assert sorted(variants(module)) == [("none", 0, 0), ("silu", 0, 1)]
    assert not missed(module)


def test_a_function_body_stays() -> None:
    module = module_of(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g ({INPUTS}) => (float[B,S,96] y) <float[64,96] w> {{ p = MatMul(x, w) y = Relu(p) }}"""
    )
    quantized(module, bits=4, format="lwc")
    product, relu = module.graph
    given = [ir.Value(name=f"in{place}") for place in range(len(product.inputs))]
    inner = ir.Node(
        product.domain, product.op_type, given, list(product.attributes.values()),
        overload=product.overload,
    )  # fmt: skip
    outer = ir.Node("", "Relu", inner.outputs)
    body = ir.Graph(
        given, outer.outputs, nodes=[inner, outer], opset_imports={"": 20, product.domain: 1}
    )
    layer = ir.Function("own", "Layer", graph=body, attributes=[])
    module.model.functions[layer.identifier()] = layer
    module.import_opset("own", 1)
    call = ir.Node("own", "Layer", product.inputs)
    module.graph.insert_before(relu, call)
    ir.convenience.replace_all_uses_with(
        relu.outputs[0], call.outputs[0], replace_graph_outputs=True
    )
    call.outputs[0].name, call.outputs[0].type = "y", relu.outputs[0].type
    module.graph.remove([relu, product], safe=True)
    module.forget_names()
    assert not run_pass(FuseEpilogue(), module).changed
    assert [node.op_type for node in layer] == ["DynamicQuantMatMul", "Relu"]
