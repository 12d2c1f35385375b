"""Modules lowered to kernels, in the interpreter, against the fx backend: one node or a few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dialect import draw_case, expected
from dialect import module_of as dialect_module
from fx_agreement import one_node, parsed
from interpreted_lowering import MS, agree, check, integers, normal, reasons, run

from lwc.backends.triton import launch
from lwc.backends.triton.lower import placements
from lwc.backends.triton.lowerings.registry import KERNELS, Results, Site, kernel
from lwc.backends.triton.session import TritonBackend
from lwc.core.dialect import DynamicQuantMatMul

# Norms


@pytest.mark.parametrize(
    ("op", "domain"),
    [("RMSNormalization", ""), ("SimplifiedLayerNormalization", MS), ("LayerNormalization", "")],
)
def test_norms(op: str, domain: str) -> None:
    given = {"x": normal(2, 3, 40), "w": normal(40)}
    if op == "LayerNormalization":
        given["b"] = normal(40, seed=1)
    check(op, given, domain=domain, opset=23, epsilon=0.5)  # seen in a row of numbers around 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_norms_of_sums(op: str, outputs: int, *, bias: bool) -> None:
    given = {"x": normal(2, 3, 40), "skip": normal(2, 3, 40, seed=1), "gamma": normal(40)}
    if op == "SkipLayerNormalization":
        given["beta"] = normal(40, seed=2)
    if bias:
        given["bias"] = normal(40, seed=3)
    module, feed = one_node(op, given, domain=MS, outputs=outputs, epsilon=0.5)
    for value in module.graph.outputs[1:3]:
        value.name = ""
    del module.graph.outputs[1:3]
    agree(module, feed)


def test_what_norms_refuse() -> None:
    x, w = normal(2, 3, 8), normal(8)
    module, _ = one_node("LayerNormalization", {"x": x, "w": normal(3, 8)}, axis=1)
    assert reasons(module) == ["it spans several axes"]
    module, _ = one_node("LayerNormalization", {"x": x, "w": w}, outputs=2)
    assert reasons(module) == ["its output 1 is read"]
    given = {"x": x, "skip": x, "gamma": w}
    for op, outputs in (("SkipLayerNormalization", 2), ("SkipSimplifiedLayerNormalization", 3)):
        module, _ = one_node(op, given, domain=MS, outputs=outputs)
        for value in module.graph.outputs[1:-1]:
            value.name = ""
        del module.graph.outputs[1:-1]
        assert reasons(module) == [f"its output {outputs - 1} is read"]
    module, _ = one_node("LayerNormalization", {"x": x.astype(np.float64), "w": w})
    assert reasons(module) == ["x is double, not float16, bfloat16 or float32"]
    module, _ = one_node(
        "SkipLayerNormalization", {"x": x, "skip": normal(3, 8), "gamma": w}, domain=MS
    )
    assert reasons(module) == ["x and skip are not known to have one shape"]
    module, _ = one_node("LayerNormalization", {"x": normal(1, 20000), "w": normal(20000)})
    assert reasons(module) == ["rows are longer than 16384"]
    module = parsed("""<ir_version: 9, opset_import: ["" : 17]>
        g (float[n, m] x, float[1] w) => (float[n, m] y) { y = LayerNormalization (x, w) }""")
    assert reasons(module) == ["the length of rows is not known, and scale is a single number"]


@pytest.mark.parametrize(
    ("x", "w", "axis", "reason"),
    [
        ("float[n, m]", "float[m]", -1, "the length of rows is not known"),
        ("float[n, 8]", "float[m]", -1, "the length of scale is not known"),
        ("float[n, 8]", "float[4]", -1, "scale is not as long as a row"),
        ("float[n, 8]", "float", -1, "scale is no vector"),
        ("float[n, 8]", "unknown", -1, "the rank of scale is not known"),
        ("unknown", "float[8]", 1, "the rank of x is not known"),
    ],
)
def test_norms_of_what_is_not_known(x: str, w: str, axis: int, reason: str) -> None:
    declared = [f"{kind} {name}" for kind, name in ((x, "x"), (w, "w")) if kind != "unknown"]
    made = "".join(
        f"{name} = Reshape(flat, to)" for kind, name in ((x, "x"), (w, "w")) if kind == "unknown"
    )
    module = parsed(f"""<ir_version: 10, opset_import: ["" : 23]>
        g ({", ".join(declared)}, float[k] flat, int64[r] to) => (float[n, m] y)
        {{ {made} y = RMSNormalization <axis = {axis}> (x, w) }}""")
    assert reasons(module) == [reason]


# Rotary embeddings


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", ["none", "each", "first"])
def test_rotary(positions: str, interleaved: int, rank: int) -> None:
    x = normal(2, 5, 3 * 16) if rank == 3 else normal(2, 3, 5, 16)
    rows = normal(2, 5, 8) if positions == "none" else normal(20, 8)
    given = {"cos": np.cos(rows), "sin": np.sin(rows)}
    heads = {"num_heads": 3} if rank == 3 else {}
    if positions == "first":
        places = {"places": np.array([4], np.int64)}
        given = {"x": x, **places, **given}
        check("RotaryEmbedding", given, domain=MS, interleaved=interleaved, scale=2.0, **heads)
        return
    if positions == "each":
        given["places"] = integers(0, 20, 2, 5, dtype=np.int64)
    check("RotaryEmbedding", {"x": x, **given}, opset=23, interleaved=interleaved, **heads)


def test_rotary_of_a_part_of_a_head() -> None:
    rows = normal(20, 4)
    given = {"x": normal(2, 3, 5, 16), "cos": np.cos(rows), "sin": np.sin(rows)}
    given["places"] = integers(0, 20, 2, 5, dtype=np.int64)
    check("RotaryEmbedding", given, opset=23, rotary_embedding_dim=8)


# Activations


@pytest.mark.parametrize(
    "activation",
    [
        "com.microsoft.QuickGelu <alpha = 1.0>", "Relu", "Gelu", 'Gelu <approximate = "tanh">',
        "com.microsoft.Gelu", "com.microsoft.FastGelu",
    ],
)  # fmt: skip
def test_gates(activation: str) -> None:
    module = parsed(f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[n, 48] x, float[n, 48] up) => (float[n, 48] y)
        {{ gate = {activation} (x)  y = Mul(up, gate) }}""")
    agree(module, {"x": normal(5, 48), "up": normal(5, 48, seed=1)})
    with TritonBackend().compile(module) as executable:
        assert [each.kernels for each in placements(executable.graph_module)] == [
            ("activation_kernel",), ("activation_kernel",),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("gate = Relu(x) y = Mul(gate, row)", "the branches are not known to have one shape"),
        ("gate = Relu(x) y = Mul(gate, gate)", "the activation is multiplied by itself"),
        (
            "gate = Relu(x) z = Mul(gate, x) y = Add(z, gate)",
            "the activation is read elsewhere too",
        ),
    ],
)
def test_gates_that_stay(body: str, reason: str) -> None:
    module = parsed(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 8] x, float[8] row) => (float[n, 8] y) {{ {body} }}""")
    assert reasons(module) == [reason]


def test_gates_given_apart() -> None:
    given = {"x": normal(5, 48), "up": normal(5, 48, seed=1)}
    check("SwiGLU", given, opset=28)
    module, _ = one_node("SwiGLU", given, opset=28, alpha=2.0)
    assert reasons(module) == ["its sigmoid is not SiLU's"]


# Products


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_nbits(*, bias: bool, zeros: bool) -> None:
    blocks = 3
    given = {
        "x": normal(2, 3, 80),
        "codes": integers(0, 256, 40, blocks, 16),
        "scales": np.exp2(integers(-6, -3, 40 * blocks, dtype=np.float32)),  # float16 holds them
        "zeros": integers(0, 256, 40 * 2) if zeros else None,
        "groups": None,
    }
    if bias:
        given["bias"] = normal(40)
    constant = [name for name in given if name != "x"]
    check("MatMulNBits", given, domain=MS, constant=constant, K=80, N=40, bits=4, block_size=32)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"bits": 8, "block_size": 32}, "weights have 8 bits, the kernel takes 4"),
        ({"bits": 4, "block_size": 16}, "blocks of 16 inputs are not among (32, 64, 128)"),
    ],
)
def test_what_matmul_nbits_refuses(more: Any, reason: str) -> None:
    block = more["block_size"]
    shape = (8, 64 // block, block * more["bits"] // 8)
    given = {"x": normal(2, 64), "codes": integers(0, 256, *shape), "scales": normal(8 * shape[1])}
    constant = ["codes", "scales"]
    module, _ = one_node("MatMulNBits", given, domain=MS, constant=constant, K=64, N=8, **more)
    assert reasons(module) == [reason]
    given["scales"] *= 1e6
    module, _ = one_node(
        "MatMulNBits", given, domain=MS, constant=["scales"], K=64, N=8, bits=4, block_size=32
    )
    assert reasons(module) == ["codes is not constant"]
    given |= {"scales": normal(16), "zeros": normal(8, 2)}
    constant = ["codes", "scales", "zeros"]
    module, _ = one_node(
        "MatMulNBits", given, domain=MS, constant=constant, K=64, N=8, bits=4, block_size=32
    )
    assert reasons(module) == ["its zero points are no integers"]


@pytest.mark.parametrize(
    ("factor", "told"), [(1e6, "too large"), (1e-6, "too small"), (1e-9, "too small")]
)
def test_scales_that_float16_does_not_hold_are_refused(factor: float, told: str) -> None:
    scales = normal(16) * np.float32(factor)
    given = {"x": normal(2, 64), "codes": integers(0, 256, 8, 2, 16), "scales": scales}
    constant = ["codes", "scales"]
    module, _ = one_node(
        "MatMulNBits", given, domain=MS, constant=constant, K=64, N=8, bits=4, block_size=32
    )
    (found,) = reasons(module)
    assert f"a scale of 4-bit weights is {told} for float16" in found


VARIANTS = [
    DynamicQuantMatMul(K=70, N=35, bits=8),
    DynamicQuantMatMul(K=70, N=35, bits=8, bias=1, activation="gelu_tanh"),
    DynamicQuantMatMul(K=64, N=96, bits=8, bias=1, activation="silu", gated=1),
    DynamicQuantMatMul(K=64, N=64, bits=8, gated=1),
    DynamicQuantMatMul(K=70, N=35, bits=4),
    DynamicQuantMatMul(K=70, N=35, bits=4, block_size=32, x_block=1, zero_points=1),
    DynamicQuantMatMul(K=300, N=64, bits=4, block_size=256, bias=1, activation="relu", gated=1),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: str(variant.overload))
def test_the_dialect(variant: DynamicQuantMatMul) -> None:
    """8 bits: sums are exact, so that only roundings at a half differ; 4 bits: of weights only."""
    case = draw_case(np.random.default_rng(3), variant, np.float16)
    x = normal(3, variant.K)
    module = dialect_module(case)
    assert reasons(module) == []
    (found,) = run(module, {"x": x})
    wanted = expected(case, x)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    # The reference rounds activations to 8 bits: by up to half a step of max|x| / 127, uniformly,
    # which is 1 / (127 * sqrt(12)) of the maximum, about 3 times the root mean square.
    assert error < (1e-5 if variant.bits == 8 else 3 * 3 / (127 * 12**0.5))


def test_what_the_dialect_refuses() -> None:
    for variant, reason in (
        (DynamicQuantMatMul(K=64, N=32, bits=2), "weights have 2 bits, kernels take 4 or 8"),
        (
            DynamicQuantMatMul(K=64, N=32, bits=8, block_size=32),
            "8-bit weights have a scale for each block, not each column",
        ),
        (DynamicQuantMatMul(K=64, N=32, bits=8, zero_points=1), "8-bit weights have zero points"),
    ):
        case = draw_case(np.random.default_rng(3), variant, np.float16)
        assert reasons(dialect_module(case)) == [reason]


# What the user sees


def test_remarks_tell_of_every_node_that_a_kernel_may_compute() -> None:
    module = parsed("""<ir_version: 10, opset_import: ["" : 23]>
        g (float[n, 8] x, float[8] w) => (float[n, 8] y, float[n, 8] z)
        { a = Abs(x)  y = RMSNormalization(a, w)  z = RMSNormalization <stash_type = 11> (a, w)
        }""")
    with TritonBackend().compile(module):
        told = [str(remark) for remark in module.remarks]
    assert told == [
        "applied: triton at RMSNormalization -> 'y': runs in norm_kernel",
        "missed: triton at RMSNormalization -> 'z': stays in PyTorch: its statistics are not taken "
        "in float32",
    ]


def test_remarks_tell_that_bodies_stay() -> None:
    module = parsed("""<ir_version: 10, opset_import: ["" : 20]>
        g (bool c, float[n] x) => (float[n] y)
        { y = If (c) <then_branch = t () => (float[n] a) { a = Abs(x) },
                      else_branch = e () => (float[n] b) { b = Neg(x) }> }""")
    assert reasons(module) == ["no kernel is looked for in its bodies"]


def test_a_kernel_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/triton.md tells, with an operator that the fx backend knows."""
    monkeypatch.delitem(KERNELS, "SimplifiedLayerNormalization")

    @kernel("SimplifiedLayerNormalization", runs="norm_kernel")
    def root_mean_square(site: Site) -> Results:
        site.need_one_type("x", "scale")
        site.need(site.given("axis") == -1, "it spans other axes than the last")
        return {0: site.call(launch.rms_norm, site.given("x"), site.given("scale"), eps=1e-5)}

    given = {"x": normal(3, 8), "w": normal(8)}
    check("SimplifiedLayerNormalization", given)
    module, _ = one_node("SimplifiedLayerNormalization", given, axis=1)
    assert reasons(module) == ["it spans other axes than the last"]
    with pytest.raises(ValueError, match="has two kernels"):
        kernel("SimplifiedLayerNormalization", runs="norm_kernel")(root_mean_square)
    with pytest.raises(ValueError, match=r"no kernel 'norm_kernl' \(did you mean 'norm_kernel'"):
        kernel("com.example::Own", runs="activation_kernel norm_kernl")(root_mean_square)
    with pytest.raises(ValueError, match=r"no kernel is said to compute 'com.example::Own'"):
        kernel("com.example::Own", runs="")(root_mean_square)
    assert "com.example::Own" not in KERNELS
