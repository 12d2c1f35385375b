"""Which activations come out divided: the conditions, one by one, without running anything."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.passes.quantization.migration import Pair, find_pairs
from lwc.pipeline.passes import PassContext

WEIGHTS = {
    "w8": (8,), "w1": (1,), "w": (8, 6), "v": (8, 8), "u1": (8, 1), "d": (16, 6), "wide": (8, 16),
    "half": (8, 4), "b24": (24,), "one": (6,), "four": (4, 6),
}  # fmt: skip
QKV = "q = MatMul (x, v) k = MatMul (x, v2) s = MatMul (x, v3) "
SHARED = "q = MatMul (x, v) k = MatMul (x, half) s = MatMul (x, half2) "
GQA = "com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>"
MHA = "com.microsoft.MultiHeadAttention <num_heads = 2>"


def found(body: str, outputs: str = "float[1, 5, 6] y", opset: int = 17) -> tuple[list[Pair], str]:
    """Return the pairs of a graph and what was missed; weights have the names of `WEIGHTS`."""
    names = [*WEIGHTS, "v2", "v3", "half2"]
    listed = ", ".join(f"float[1] {name} = {{0}}" for name in names)
    module = module_of(
        f"g (float[1, 5, 8] x, float[1, 5, 8] z, float[1, 2, 3, 4] past, float[1, 5, 8] scale) => "
        f"({outputs}) <{listed}> {{ {body} }}",
        opset=opset,
        ir_version=10,
    )
    module.import_opset("com.microsoft", 1)
    random = np.random.default_rng(0)
    for name in names:
        shape = WEIGHTS[name.rstrip("23") if name not in WEIGHTS else name]
        tensor = ir.Tensor(random.standard_normal(shape).astype(np.float32))
        module.replace_initializer(module.graph.initializers[name], tensor)
    ctx = PassContext(AnalysisManager(module), source="p")
    pairs = [
        pair for pair in find_pairs(module, ctx.editor(), ctx) if pair.value.name not in ("x", "z")
    ]
    missed = [each.message for each in module.remarks if each.kind == "missed"]
    return pairs, "\n".join(each for each in missed if "of 'x'" not in each)


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ("n = Mul (x, w8) y = MatMul (n, w)", ["w8"]),
        ("n = LayerNormalization <axis = 2> (x, w8) y = MatMul (n, w)", ["w8"]),
        ("n = LayerNormalization <axis = -1> (x, w8) y = MatMul (n, w)", ["w8"]),
        ("m = Mul (x, w8) n = Flatten <axis = 2> (m) y = MatMul (n, w)", ["w8"]),
        ("m = Mul (x, w8) n = Identity (m) y = MatMul (n, w)", ["w8"]),
        ("u = MatMul (x, v) s = Sigmoid (z) n = Mul (u, s) y = MatMul (n, w)", ["v"]),
        ("u = MatMul (x, v) s = Sigmoid (z) n = Mul (s, u) y = MatMul (n, w)", ["v"]),
        (f"{QKV} a = {MHA} (q, k, s) y = MatMul (a, w)", ["v3"]),
        (f"{QKV} a, pk, pv = {MHA} (q, k, s) y = MatMul (a, w)", ["v3"]),
        (f"{SHARED} a = {GQA} (q, k, s) y = MatMul (a, w)", ["half2"]),
    ],
)
def test_what_is_divided(body: str, places: list[str]) -> None:
    pairs, missed = found(body)
    assert missed == ""
    assert [[place.source.name for place in pair.source.places] for pair in pairs] == [places]


def test_attention_of_the_standard() -> None:
    body = f"{QKV} a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, s) y = MatMul (a, w)"
    pairs, _ = found(body, opset=23)
    assert [pair.source.places[0].source.name for pair in pairs] == ["v3"]
    for extra in (", , past, past", ", , past", ", , , past"):
        pairs, missed = found(body.replace("q, k, s", f"q, k, s{extra}"), opset=23)
        assert not pairs
        assert "has a bias, or keys and values of before" in missed


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{QKV} a = {MHA} (q, k, s, b24) y = MatMul (a, w)", "has a bias"),
        (f"{QKV} a = {MHA} (q, k, s, , , , past) y = MatMul (a, w)", "keys and values of before"),
        (f"{QKV} a = {MHA} (q, k, s, , , , , past) y = MatMul (a, w)", "keys and values of before"),
        (f"{SHARED} a = {GQA} (q, k, s, past) y = MatMul (a, w)", "keys and values of before"),
        (f"{SHARED} a = {GQA} (q, k, s, , past) y = MatMul (a, w)", "keys and values of before"),
        (f"{QKV} a, pk = {MHA} (q, k, s) e = Abs (pk) y = MatMul (a, w)", "read elsewhere"),
        (f"{QKV} a = {MHA} (q) y = MatMul (a, w)", "are not [batch, length, channels]"),
        (f"{QKV} t = Mul (z, w8) a = {MHA} (q, k, t) y = MatMul (a, w)", "from no linear layer"),
        (f"{SHARED} a = {GQA} (q, k, s) n = Add (a, w8) y = MatMul (n, w)", "added to attention"),
        ("n = LayerNormalization <axis = 1> (x, w8) y = MatMul (n, w)", "over several axes"),
        ("n = LayerNormalization <axis = -1> (x, scale) y = MatMul (n, w)", "is no constant"),
        ("u = MatMul (x, u1) s = Abs (z) n = Mul (u, s) y = MatMul (n, w)", "different shapes"),
        ("a = Abs (x) s = Relu (z) n = Mul (a, s) y = MatMul (n, w)", "comes from Relu"),
        ("m = Mul (x, w8) e = Abs (m) n = Identity (m) y = MatMul (n, w)", "read elsewhere"),
        (
            "two = Constant <value_ints = [10, 4]> () m = Mul (x, w8) n = Reshape (m, two) "
            "y = MatMul (n, four)",
            "comes from Reshape",
        ),
        ("f = Flatten <axis = 2> (x) n = Gemm (f, v, f) y = MatMul (n, w)", "no constant row"),
        ("n = Mul (x, w8) y = MatMul (n, z)", ""),
    ],
)
def test_what_is_not(body: str, reason: str) -> None:
    pairs, missed = found(body)
    assert not pairs
    assert reason in missed
    assert bool(missed) == bool(reason)


def test_an_output_of_the_graph_is_not_divided() -> None:
    outputs = "float[1, 5, 6] y, float[1, 5, 8] n"
    pairs, missed = found("n = Mul (x, w8) y = MatMul (n, w)", outputs)
    assert not pairs
    assert "'n' stay: it is an output of the graph" in missed


def test_a_gemm_that_turns_its_input_sums_over_something_else() -> None:
    body = "f = Flatten <axis = 2> (x) n = Mul (f, w8) y = Gemm <transA = 1> (n, big)"
    pairs, missed = found(body.replace("big", "w"), "float[8, 6] y")
    assert not pairs
    assert "its Gemm transposes the left operand" in missed
