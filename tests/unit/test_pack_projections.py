"""pack-projections: what becomes one operator, what stays apart and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import strategies as st
from support import ops, run_pass, run_pass_to_the_end, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.target import Table, Target
from lwc.core.module import Module
from lwc.core.weights import SpilledTensor
from lwc.passes.attention.pack_projections import PackProjections, When
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.fusion.fuse_epilogue import FuseEpilogue
from lwc.passes.quantization.dialect_ops import variant_of
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import PassContext
from lwc.verify import GRAMMAR, Motif, Sketch, check_pass, sketches

Array = np.ndarray[Any, Any]

WIDTH, HEADS, GROUPS, SIZE = 64, 4, 2, 16
QUERY, KEY = HEADS * SIZE, GROUPS * SIZE
RTOL, ATOL = 1e-4, 1e-5
"""float32 rounding over sums of 64 products, in another order at most."""

HEADER = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>\n'
GATE = f"""
    g (float[batch, length, {WIDTH}] x) => (float[batch, length, {WIDTH}] y)
    <float[{WIDTH}, {WIDTH}] a, float[{WIDTH}, {WIDTH}] b> {{
        gate = MatMul (x, a)
        opened = Sigmoid (gate)
        up = MatMul (x, b)
        y = Mul (opened, up)
    }}"""
ATTENTION = f"""
    g (float[batch, length, {WIDTH}] x, int32[batch] last, int32 total)
        => (float[batch, length, {QUERY}] y)
    <float[{WIDTH}, {QUERY}] wq, float[{WIDTH}, {KEY}] wk, float[{WIDTH}, {KEY}] wv> {{
        v = MatMul (x, wv)
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        y = com.microsoft.GroupQueryAttention <num_heads = {HEADS}, kv_num_heads = {GROUPS}>
            (q, k, v, , , last, total)
    }}"""


def module_of(text: str, *, spelled: dict[str, Array] | None = None) -> Module:
    """Parse; values declared in the header become initializers of random numbers."""
    proto = onnx.parser.parse_model(HEADER + text)
    random = np.random.default_rng(7)
    for declared in proto.graph.value_info:
        array = (spelled or {}).get(declared.name)
        if array is None:
            kind = declared.type.tensor_type
            shape = [dim.dim_value for dim in kind.shape.dim]
            dtype = ir.DataType(kind.elem_type).numpy()
            array = _numbers(random, shape, np.dtype(dtype))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, declared.name))
    del proto.graph.value_info[:]
    return Module(ir.from_proto(proto))


def _numbers(random: np.random.Generator, shape: list[int], dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu":
        return random.integers(0, 60, shape).astype(dtype)
    return (random.standard_normal(shape) / 8).astype(dtype)


def feed(module: Module, batch: int = 2, length: int = 3) -> dict[str, Array]:
    random = np.random.default_rng(3)
    made: dict[str, Array] = {
        "last": np.full(batch, length - 1, np.int32), "total": np.array(length, np.int32)
    }  # fmt: skip
    for value in module.graph.inputs:
        if value.name not in made:
            assert value.shape is not None
            assert value.dtype is not None
            extents = {"batch": batch, "length": length, "rows": batch * length}
            shape = [d if isinstance(d, int) else extents[str(d.value)] for d in value.shape]
            made[value.name or ""] = random.standard_normal(shape).astype(value.dtype.numpy())
    return {value.name or "": made[value.name or ""] for value in module.graph.inputs}


def packed(module: Module, when: When = "always", rtol: float = RTOL) -> list[str]:
    """Pack, compare outputs, check that a second run changes nothing; return the operators."""
    given = feed(module)
    wanted = run_plain(module, given)
    run_pass_to_the_end(PackProjections(when), module)
    for a, b in zip(run_plain(module, given), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=ATOL)
    return ops(module)


def missed(module: Module) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


def test_gate_and_up_become_one_and_a_split() -> None:
    module = module_of(GATE)
    packed(module)
    text = str(module).partition("{\n")[2]
    assert re.sub(r"  # .*", "", text) == (
        "  %sizes: i64[2] = [64, 64]\n"
        "  %a_packed: f32[64, 128] = ...\n"
        "  %gate_lwc1: f32[...] = MatMul(%x, %a_packed)\n"
        "  %gate: f32[...], %up: f32[...] = Split(%gate_lwc1, %sizes) {axis=-1}\n"
        "  %opened: ? = Sigmoid(%gate)\n"
        f"  %y: f32[batch, length, {WIDTH}] = Mul(%opened, %up)\n"
        f"  return %y: f32[batch, length, {WIDTH}]\n}}\n"
    )


def test_query_key_and_value_go_into_attention_whole_in_its_order() -> None:
    module = module_of(ATTENTION)
    assert packed(module, "auto") == ["MatMul", "GroupQueryAttention"]
    product, attention = module.graph
    assert attention.inputs[1] is attention.inputs[2] is None
    (weight,) = module.graph.initializers.values()
    assert product.inputs[1] is weight
    assert isinstance(weight.const_value, SpilledTensor)


NBITS = "com.microsoft.MatMulNBits <K = 64, N = 64, bits = {bits}, block_size = {block}{more}>"


def linears(first: str, second: str, weights: str, kind: str = "float") -> str:
    """Two operators on `[rows, 64]` and their results."""
    return f"""
        g ({kind}[rows, {WIDTH}] x) => ({kind}[rows, columns] y, {kind}[rows, other] z)
        <{weights}> {{ {first} {second} y = Relu (p) z = Tanh (r) }}"""


def nbits(
    bits: tuple[int, int] = (4, 4),
    block: tuple[int, int] = (32, 32),
    zeros: tuple[bool, bool] = (False, False),
    biases: tuple[bool, bool] = (False, False),
    more: str = "",
) -> str:
    """Two quantized operators."""
    lines, weights = [], []
    for name, place in (("p", 0), ("r", 1)):
        blocks, size = WIDTH // block[place], block[place] * bits[place] // 8
        weights.append(f"uint8[64, {blocks}, {size}] w{name}, float[64, {blocks}] s{name}")
        weights.append(f"uint8[64, {-(-blocks * bits[place] // 8)}] z{name}, float[64] b{name}")
        op = NBITS.format(bits=bits[place], block=block[place], more=more)
        zero, bias = (f"z{name}" if zeros[place] else ""), (f"b{name}" if biases[place] else "")
        inputs = re.sub("[, ]+$", "", f"x, w{name}, s{name}, {zero}, , {bias}")
        lines.append(f"{name} = {op} ({inputs})")
    return linears(lines[0], lines[1], ", ".join(weights))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("biases", [(False, False), (True, True), (False, True)])
def test_quantized_weights(bits: int, level: int, zeros: bool, biases: tuple[bool, bool]) -> None:
    text = nbits(
        (bits, bits), zeros=(zeros, zeros), biases=biases, more=f", accuracy_level={level}"
    )
    module = module_of(text)
    assert packed(module) == ["MatMulNBits", "Split", "Relu", "Tanh"]
    node = module.graph[0]
    assert node.attributes["N"].as_int() == 2 * 64
    assert len(node.inputs) == (6 if any(biases) else 4 if zeros else 3)


def dynamic(scales: tuple[str, str], zeros: tuple[str, str]) -> str:
    weights = ", ".join(
        f"int8[64, 64] w{name}, float{scale} s{name}, int8{zero} z{name}"
        for name, scale, zero in zip("pr", scales, zeros, strict=True)
    )
    lines = [
        f"{name} = com.microsoft.DynamicQuantizeMatMul (x, w{name}, s{name}, z{name})"
        for name in "pr"
    ]
    return linears(lines[0], lines[1], weights)


@pytest.mark.parametrize(("first", "second"), [("[64]", "[64]"), ("", ""), ("[64]", "")])
def test_weights_of_dynamic_quantization(first: str, second: str) -> None:
    module = module_of(dynamic((first, second), (first, second)))
    assert packed(module) == ["DynamicQuantizeMatMul", "Split", "Relu", "Tanh"]


@pytest.mark.parametrize("attributes", ["", "transB = 1", "alpha = 0.5", "alpha = 2.0, beta = 0.5"])
@pytest.mark.parametrize("rows", [("", ""), ("", "[64]"), ("[1, 64]", "[64]"), ("[1]", "[64]")])
def test_gemm(attributes: str, rows: tuple[str, str]) -> None:
    lines, weights = [], []
    for name, row in zip("pr", rows, strict=True):
        bias = f", b{name}" if row else ""
        lines.append(f"{name} = Gemm <{attributes}> (x, w{name}{bias})".replace(" <>", ""))
        weights.append(f"float[64, 64] w{name}" + (f", float{row} b{name}" if row else ""))
    module = module_of(linears(lines[0], lines[1], ", ".join(weights)))
    assert packed(module) == ["Gemm", "Split", "Relu", "Tanh"]
    assert len(module.graph[0].inputs) == 2 + any(rows)


def test_biases_behind_products_are_joined_with_zeros_where_there_is_none() -> None:
    module = module_of(
        linears(
            "m = MatMul (x, w) p = Add (b, m)", "r = MatMul (x, v)",
            f"float[{WIDTH}, 8] w, float[{WIDTH}, 3] v, float[1, 8] b",
        )
    )  # fmt: skip
    assert packed(module) == ["MatMul", "Add", "Split", "Relu", "Tanh"]
    tensors = [value.const_value for value in module.graph.initializers.values()]
    (bias,) = [each.numpy() for each in tensors if each is not None and each.shape == (11,)]
    assert np.all(bias[8:] == 0)
    assert np.all(bias[:8] != 0)


def test_a_sum_with_more_axes_than_the_product_stays_behind_it() -> None:
    text = linears(
        "m = MatMul (x, w) p = Add (m, b)", "r = MatMul (x, v)",
        f"float[{WIDTH}, 8] w, float[{WIDTH}, 3] v, float[1, 1, 8] b",
    ).replace("float[rows, columns] y", "float[1, rows, columns] y")  # fmt: skip
    assert packed(module_of(text)) == ["MatMul", "Split", "Add", "Relu", "Tanh"]


def test_products_that_leave_the_graph() -> None:
    module = module_of(
        f"""g (float[rows, {WIDTH}] x) => (float[rows, 8] p, float[rows, 3] r)
        <float[{WIDTH}, 8] w, float[{WIDTH}, 3] v> {{ p = MatMul (x, w) r = MatMul (x, v) }}"""
    )
    assert packed(module) == ["MatMul", "Split"]
    assert [value.name for value in module.graph.outputs] == ["p", "r"]


def product(name: str, attributes: str = "") -> str:
    return f"{name} = Gemm <{attributes}> (x, w{name})"


GEMMS = "float[64, 64] wp, float[64, 64] wr"

NEAR_MISSES = {
    "bits": (nbits((4, 8)), "bits 4 against 8"),
    "blocks": (nbits(block=(32, 16)), "block_size 32 against 16"),
    "zero points": (nbits(zeros=(True, False)), "zero points of"),
    "transB": (linears(product("p", "transB = 1"), product("r", "transB = 0"), GEMMS), "transB"),
    "alpha": (linears(product("p", "alpha = 2.0"), product("r", "alpha = 1.0"), GEMMS), "alpha"),
    "beta": (linears(product("p", "beta = 2.0"), product("r", "beta = 1.0"), GEMMS), "beta"),
    "transA": (
        linears(product("p", "transA = 1"), product("r", "transA = 0"), GEMMS)
        .replace("rows", str(WIDTH)),
        "transA",
    ),
    "g_idx": (
        nbits().replace("(x, wp, sp)", "(x, wp, sp, , order)")
        .replace("uint8[64, 2, 16] wp", "int32[64] order, uint8[64, 2, 16] wp"),
        "an order of their own",
    ),
    "operators": (linears(product("p"), "r = MatMul (x, wr)", GEMMS), "operators"),
    "shared": (
        linears("p = MatMul (x, w)", "m = MatMul (x, v) s = MatMul (p, v) r = Add (m, s)",
                "float[64, 64] w, float[64, 64] v"),
        "its weight is shared",
    ),
    "moving bias": (
        linears("p = Gemm (x, wp, x)", "r = Gemm (x, wr)", GEMMS), "no constant row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    text, reason = NEAR_MISSES[name]
    module = module_of(text.replace(" <>", ""))
    assert not run_pass(PackProjections("always"), module).changed
    assert reason in missed(module)


def test_weights_that_are_fed_and_other_activations_are_no_near_miss() -> None:
    module = module_of(
        f"""g (float[rows, {WIDTH}] x, float[{WIDTH}, 8] w) => (float[rows, 8] y)
        <float[{WIDTH}, 8] v, float[8, 8] u> {{
            p = MatMul (x, w) r = MatMul (x, v) s = MatMul (r, u) y = Sum (p, r, s)
        }}"""
    )
    assert not run_pass(PackProjections("always"), module).changed


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("(q, k, v,", "(q, k, k,", ["MatMul", "Split", "GroupQueryAttention"]),
        ("(q, k, v,", "(q, v, k,", ["MatMul", "GroupQueryAttention"]),
        ("k = MatMul (x, wk)", "m = MatMul (x, wk) k = Tanh (m)",
         ["MatMul", "Split", "Tanh", "GroupQueryAttention"]),
    ],
)  # fmt: skip
def test_other_consumers_of_projections(old: str, new: str, expected: list[str]) -> None:
    text = ATTENTION.replace(old, new)
    if "(q, k, k," in new:
        text = text.replace("v = MatMul (x, wv)", "")
    assert packed(module_of(text)) == expected


def test_heads_of_different_sizes_stay() -> None:
    text = ATTENTION.replace(f"num_heads = {HEADS},", f"num_heads = {2 * HEADS},")
    module = module_of(text)
    assert not run_pass(PackProjections("auto"), module).changed
    assert "its heads differ in size" in missed(module)


def test_what_else_reads_keys_keeps_attention_as_it_is() -> None:
    text = ATTENTION.replace("y)", "y, float[batch, length, other] k)", 1)
    assert packed(module_of(text)) == ["MatMul", "Split", "GroupQueryAttention"]
    module = module_of(text)
    assert packed(module, "auto") == [*["MatMul"] * 3, "GroupQueryAttention"]
    assert "reads its query, key or value too" in missed(module)


@pytest.mark.parametrize(
    ("order", "kept"), [("(q, k, v,", False), ("(q, v, k,", True), ("(q, k, k,", True)]
)
def test_what_is_cut_before_attention_goes_in_whole(order: str, kept: bool) -> None:
    text = ATTENTION.replace("v = MatMul (x, wv)", "p = MatMul (x, w)")
    text = text.replace("q = MatMul (x, wq)", "q, k, v = Split <axis = 2> (p, sizes)")
    text = text.replace("k = MatMul (x, wk)", "").replace("(q, k, v,", order)
    text = re.sub(r"<float.*wv>", f"<float[{WIDTH}, {QUERY + 2 * KEY}] w, int64[3] sizes = "
                  f"{{{QUERY}, {KEY}, {KEY}}}>", text)  # fmt: skip
    expected = ["MatMul", *["Split"] * kept, "GroupQueryAttention"]
    assert packed(module_of(text), "auto") == expected


LENGTHS = """
    extents = Shape (q)
    length = Gather (extents, second)
    whole = Cast <to = 6> (length)
    one = Constant <value = int32 {1}> ()
    end = Sub (whole, one)
    batch = Gather (extents, first)
    lasts = Expand (end, batch)
"""


@pytest.mark.parametrize("axis", [1, 2])
def test_lengths_are_asked_of_what_is_projected(axis: int) -> None:
    """Where the last extent is among them, the query must stay."""
    text = ATTENTION.replace("y = com", f"{LENGTHS} y = com").replace(
        "last, total)", "lasts, whole)"
    )
    text = text.replace(", int32[batch] lasts, int32 whole)", ")")
    text = text.replace(", int32[batch] last, int32 total)", ")")
    text = text.replace("wv> {", f"wv, int64 second = {{{axis}}}, int64[1] first = {{0}}> {{")
    module = module_of(text)
    if axis == 1:
        assert packed(module, "auto").count("MatMul") == 1
    else:
        assert not run_pass(PackProjections("auto"), module).changed


def test_projections_with_biases_and_quantized_ones_go_into_attention() -> None:
    text = ATTENTION.replace("k = MatMul (x, wk)", "m = MatMul (x, wk) k = Add (m, bk)")
    text = text.replace("float[64, 32] wv", "float[64, 32] wv, float[32] bk")
    assert packed(module_of(text), "auto") == ["MatMul", "Add", "GroupQueryAttention"]
    for name, columns in (("q", QUERY), ("k", KEY), ("v", KEY)):
        op = NBITS.format(bits=4, block=32, more=", accuracy_level = 4").replace("64, b", "N, b")
        op = op.replace("N = N", f"N = {columns}")
        text = text.replace(f"MatMul (x, w{name})", f"{op} (x, w{name}, s{name})")
        text = text.replace(
            f"float[64, {columns}] w{name}",
            f"uint8[{columns}, 2, 16] w{name}, float[{columns}, 2] s{name}",
        )
    assert packed(module_of(text), "auto") == ["MatMulNBits", "GroupQueryAttention"]


def quantize(module: Module, *options: Mapping[str, Any]) -> Module:
    """Write products as lwc::DynamicQuantMatMul, one pass after the other."""
    for each in options:
        ctx = PassContext(AnalysisManager(module))
        QuantizeWeights(format="lwc", **each).run(module, ctx)
    return module


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 0), (8, 32)])
@pytest.mark.parametrize("biased", ["", "p", "pr"])
def test_products_of_the_dialect(symmetric: bool, bits: int, block: int, biased: str) -> None:
    """Of the two, one has three tiles, and both have rows of three blocks."""
    lines, weights = [], ["float[96, 48] wp", "float[96, 64] wr"]
    for name, columns in (("p", 48), ("r", 64)):
        lines.append(f"m{name} = MatMul (x, w{name})")
        lines.append(
            f"{name} = " + (f"Add (m{name}, b{name})" if name in biased else f"Identity (m{name})")
        )
        weights += [f"float[{columns}] b{name}"] * (name in biased)
    text = linears("".join(lines[:2]), "".join(lines[2:]), ", ".join(weights))
    module = module_of(text.replace(f"[rows, {WIDTH}]", "[rows, 96]"))
    quantize(module, {"bits": bits, "block_size": block, "symmetric": symmetric})
    run_pass(Canonicalize(), module)
    packed(module)
    assert [node.op_type for node in module.graph] == [
        "DynamicQuantMatMul",
        "Split",
        "Relu",
        "Tanh",
    ]
    variant = variant_of(module.graph[0])
    assert variant is not None
    assert (variant.N, variant.bits, variant.block_size) == (112, bits, block)
    assert (variant.bias, variant.zero_points) == (bool(biased), not symmetric)


def test_products_of_the_dialect_go_into_attention() -> None:
    module = quantize(module_of(ATTENTION), {"bits": 4})
    packed(module, "auto")
    assert [node.op_type for node in module.graph] == ["DynamicQuantMatMul", "GroupQueryAttention"]


TILED = linears("p = MatMul (x, wp)", "r = MatMul (x, wr)", "float[64, 64] wp, float[64, 64] wr")


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (TILED, [{"bits": 4, "exclude": ("wp",)}, {"bits": 8}], "bits 4 against 8"),
        (TILED, [{"block_size": 64, "exclude": ("wp",)}, {}], "block_size 32 against 64"),
        (TILED, [{"symmetric": True, "exclude": ("wp",)}, {}], "zero points"),
        (TILED.replace("[64, 64]", "[64, 20]"), [{}], "its 20 columns are no whole tiles of 16"),
    ],
)  # fmt: skip
def test_near_misses_of_the_dialect(text: str, options: list[dict[str, Any]], reason: str) -> None:
    module = quantize(module_of(text), *options)
    assert not run_pass(PackProjections("always"), module).changed
    assert reason in missed(module)


def test_scales_of_another_type_stay_apart() -> None:
    """Those of a weight beyond float16 are float32."""
    large = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32) * 1e7
    module = quantize(module_of(TILED, spelled={"wr": large}), {"bits": 4})
    assert not run_pass(PackProjections("always"), module).changed
    assert "scales of float16 against float" in missed(module)


def test_a_product_with_its_activation_stays_apart() -> None:
    module = quantize(module_of(TILED), {})
    run_pass(FuseEpilogue(), module)
    assert not run_pass(PackProjections("always"), module).changed
    assert "it holds an activation" in missed(module)


def target(matmul: float, copy: float) -> Target:
    """A machine on which products take seconds by node, and copies by byte."""
    tables = {
        "matmul": Table(((1.0,), (1.0,), (1.0,)), (matmul,)), "copy": Table(((1.0,),), (copy,))
    }  # fmt: skip
    return Target("cpu", "runtime", 1, 1e9, 1e9, 1e-6, 0.0, tables)


def run_on(machine: Target, when: When) -> tuple[list[str], str]:
    module = module_of(GATE)
    ctx = PassContext(AnalysisManager(module), find_target=lambda: machine)
    PackProjections(when).run(module, ctx)
    return ops(module), missed(module)


def test_the_measured_machine_decides() -> None:
    """A copy of a kilobyte takes 1 microsecond here; so a Split costs more than a node's 1 us."""
    apart, together = ["MatMul", "Sigmoid", "MatMul", "Mul"], ["MatMul", "Split", "Sigmoid", "Mul"]
    slow = target(1e-12, 1e-9)
    assert run_on(slow, "auto")[0] == run_on(slow, "decode")[0] == apart
    assert "at 1 token" in run_on(slow, "auto")[1]
    assert "microseconds as predicted" in run_on(slow, "auto")[1]
    assert run_on(slow, "always")[0] == together


def parallel(sketch: Sketch) -> list[ir.Value]:
    """Linear operators on one value: of one kind or nearly, with biases, results used apart."""
    width = 8
    matrix = sketch.flip()
    x = sketch.pick(
        2 if matrix else 3,
        where=lambda shape: shape[-1] == width,
        otherwise=["N", width] if matrix else ["N", "S", width],
    )
    made = []
    shared = sketch.weight(width, width)
    turned = sketch.flip()
    for _ in range(sketch.integer(2, 4)):
        count = sketch.choose(width, 4, 1)
        form = sketch.choose("plain", "plain", "gemm", "shared", "nbits", "dynamic")
        if form == "gemm" and matrix:
            turned = not turned if sketch.rarely() else turned
            weight = sketch.weight(count, width) if turned else sketch.weight(width, count)
            bias = sketch.choose(None, (count,), (1, count), ())
            rest = [] if bias is None else [sketch.weight(*bias, name="bias")]
            alpha = sketch.choose(1.0, 1.0, 0.5)
            made.append(sketch.emit("Gemm", x, weight, *rest, transB=int(turned), alpha=alpha))
        elif form == "nbits":
            made.append(_nbits(sketch, x, width, count))
        elif form == "dynamic":
            made.append(_dynamic(sketch, x, width, count))
        else:
            weight = shared if form == "shared" else sketch.weight(width, count)
            y = sketch.emit("MatMul", x, weight)
            if sketch.flip():
                y = sketch.emit("Add", y, sketch.weight(sketch.shape(y)[-1], name="bias"))
            made.append(y)
    return made


def _nbits(sketch: Sketch, x: ir.Value, width: int, count: int) -> ir.Value:
    random = np.random.default_rng(sketch.integer(0, 7))
    bits = sketch.choose(4, 4, 8)
    codes = sketch.constant(random.integers(0, 256, (count, 1, 16 * bits // 8), dtype=np.uint8))
    scales = sketch.weight(count, 1, name="scale")
    rest = []
    if sketch.flip():
        rest.append(sketch.constant(random.integers(0, 9, (count, 1), dtype=np.uint8)))
    return sketch.emit(
        "MatMulNBits", x, codes, scales, *rest,
        domain="com.microsoft", K=width, N=count, bits=bits, block_size=16,
    )  # fmt: skip


def _dynamic(sketch: Sketch, x: ir.Value, width: int, count: int) -> ir.Value:
    random = np.random.default_rng(sketch.integer(0, 7))
    extents: tuple[int, ...] = sketch.choose((), (count,))
    codes = sketch.constant(random.integers(-60, 60, (width, count)).astype(np.int8))
    scales = sketch.constant((random.random(extents) / 64).astype(np.float32))
    return sketch.emit("DynamicQuantizeMatMul", x, codes, scales, domain="com.microsoft")


def attention(sketch: Sketch) -> ir.Value:
    """GroupQueryAttention on projections, some of them in a form that it cannot take whole."""
    heads, groups, size = 2, 1, 8
    x = sketch.input(["N", "S", 8])
    parts = []
    for columns in (heads * size, groups * size, groups * size):
        y = sketch.emit("MatMul", x, sketch.weight(8, columns))
        if sketch.rarely():
            y = sketch.emit("Add", y, sketch.weight(columns, name="bias"))
        parts.append(sketch.emit("Tanh", y) if sketch.rarely() else y)
    if sketch.rarely():
        sketch.emit("Relu", parts[1])
    shape = sketch.emit("Shape", x)
    batch = sketch.emit("Gather", shape, sketch.ints(0), axis=0)
    length = sketch.emit("Gather", shape, sketch.ints(1), axis=0)
    total = sketch.cast(length, ir.DataType.INT32)
    last = sketch.emit("Sub", total, sketch.constant(np.array([1], np.int32)))
    lengths = sketch.emit("Expand", last, batch)
    return sketch.emit(
        "GroupQueryAttention", *parts, None, None, lengths, total, domain="com.microsoft",
        num_heads=heads, kv_num_heads=groups, causal=sketch.choose(None, 0),
    )  # fmt: skip


def graphs() -> st.SearchStrategy[Module]:
    """Graphs of these motifs among others."""
    own = [Motif("parallel", parallel), Motif("attention", attention)]
    return sketches([*own * 8, *GRAMMAR], steps=(1, 4), evenly=True)


@pytest.mark.parametrize("when", ["always", "auto"])
def test_it_keeps_its_contract(when: When) -> None:
    report = check_pass(PackProjections(when), examples=60, graphs=graphs())
    assert report.rewrites["into-attention"] > 5
    assert when == "auto" or report.rewrites["with-split"] > 10
