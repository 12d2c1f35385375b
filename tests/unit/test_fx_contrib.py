"""The operators of com.microsoft and of lwc in PyTorch, beside ONNX Runtime and their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from dialect import draw_case, expected, variants
from dialect import module_of as dialect_module
from fx_agreement import assert_agrees, one_node, run_fx
from support import run_plain

import lwc
from lwc.backends.fx.registry import known_operators
from lwc.core.errors import LwcError

MS = "com.microsoft"
RANDOM = np.random.default_rng(5)


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def integers(low: int, high: int, *shape: int, dtype: Any = np.uint8) -> Any:
    return RANDOM.integers(low, high, shape).astype(dtype)


def check(op: str, inputs: dict[str, Any], atol: float = 1e-5, **options: Any) -> None:
    assert_agrees(*one_node(op, inputs, domain=MS, **options), atol=atol)


@pytest.mark.parametrize("op", ["Gelu", "QuickGelu", "FastGelu"])
def test_activations(op: str) -> None:
    check(op, {"x": normal(3, 8)})


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_activations_of_a_sum(op: str) -> None:
    check(op, {"x": normal(2, 3, 8), "bias": normal(8)})


def test_norms_of_sums() -> None:
    x = {"x": normal(2, 3, 8), "skip": normal(2, 3, 8), "gamma": normal(8)}
    check("SkipLayerNormalization", {**x, "beta": normal(8), "bias": normal(8)}, epsilon=1e-5)
    check("SkipSimplifiedLayerNormalization", {**x, "bias": normal(8)}, epsilon=1e-5)


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_matmul(trans_a: int, trans_b: int) -> None:
    a, b = normal(2, 3, 4), normal(2, 4, 5)
    a = a.swapaxes(1, 2).copy() if trans_a else a
    b = b.swapaxes(1, 2).copy() if trans_b else b
    for op in ("FusedMatMul", "TransposeMatMul"):
        check(op, {"a": a, "b": b}, transA=trans_a, transB=trans_b, alpha=0.5)


@pytest.mark.parametrize(
    "activation",
    ["Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "Selu", "Softplus", "Softsign",
     "ThresholdedRelu", "ScaledTanh"],
)  # fmt: skip
def test_fused_gemm(activation: str) -> None:
    given = {"a": normal(4, 3), "b": normal(5, 4), "c": normal(5)}
    factors = {"activation_alpha": 0.3, "activation_beta": 0.4, "activation_gamma": 1.5}
    turned = {"transA": 1, "transB": 1, "alpha": 0.7, "beta": 1.3}
    check("FusedGemm", given, activation=activation, **factors, **turned)


def test_older_names() -> None:
    check("GatherND", {"x": normal(3, 4, 5), "at": np.array([[0, 1], [2, 3]], np.int32)})
    check("Trilu", {"x": normal(3, 4, 5), "k": np.array(1)}, constant=["k"], upper=0)


@pytest.mark.parametrize(
    ("bits", "zeros"),
    [(bits, zeros) for bits in (2, 4, 8) for zeros in ("none", "packed")] + [(4, "float")],
)
def test_matmul_nbits(bits: int, zeros: str) -> None:
    inputs, outputs, block = 40, 6, 16
    blocks = -(-inputs // block)
    weights = {
        "b": integers(0, 256, outputs, blocks, block * bits // 8),
        "scales": np.abs(normal(outputs, blocks)),
    }
    if zeros == "packed":
        weights["zeros"] = integers(0, 256, outputs, -(-blocks * bits // 8))
    elif zeros == "float":
        weights["zeros"] = normal(outputs, blocks)
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
    given = {"a": normal(2, 3, inputs), **weights}
    check("MatMulNBits", given, atol=1e-3, constant=list(weights), **attributes)


@pytest.mark.parametrize("kind", [0, 1])
def test_matmul_bnb4(kind: int) -> None:
    given = {"a": normal(3, 64), "b": integers(0, 256, 160), "scales": np.abs(normal(20))}
    attributes = {"K": 64, "N": 5, "block_size": 16, "quant_type": kind}
    check("MatMulBnb4", given, atol=1e-4, constant=["b", "scales"], **attributes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_gather_block_quantized(bits: int, zeros: bool) -> None:
    rows, width, block = 7, 64, 32
    weights = {
        "data": integers(0, 256, rows, width * bits // 8),
        "indices": integers(0, rows, 2, 3, dtype=np.int64),
        "scales": np.abs(normal(rows, width // block)),
    }
    if zeros:
        weights["zeros"] = integers(0, 256, rows, width // block * bits // 8)
    check(
        "GatherBlockQuantized",
        weights,
        constant=[name for name in weights if name != "indices"],
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )


def test_dynamic_quantize_matmul() -> None:
    # Codes within 64: pairs of products of larger ones saturate in ONNX Runtime.
    weights = {
        "b": integers(-60, 60, 16, 5, dtype=np.int8),
        "scales": np.abs(normal(5)) / 50,
    }
    given = {"a": normal(3, 16), **weights, "zeros": None, "bias": normal(5)}
    check("DynamicQuantizeMatMul", given, atol=1e-4, constant=list(weights))


def test_dynamic_quantize_matmul_of_nothing() -> None:
    given = {"a": normal(0, 8), "b": integers(0, 60, 8, 5), "scales": np.array([0.1], np.float32)}
    check("DynamicQuantizeMatMul", given)


def test_matmul_integer_to_float() -> None:
    given = {
        "a": integers(0, 255, 3, 16),
        "b": integers(-60, 60, 16, 5, dtype=np.int8),
        "a_scale": np.float32(0.03),
        "b_scale": np.abs(normal(5)),
        "a_zero": np.uint8(120),
    }
    check("MatMulIntegerToFloat", given, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_quantized_convolution_with_a_bias(channels: int) -> None:
    given = {
        "x": integers(0, 255, 1, 2, 5, 5), "x_scale": np.float32(0.05), "x_zero": np.uint8(120),
        "w": integers(-90, 90, 3, 2, 3, 3, dtype=np.int8),
        "w_scale": np.abs(normal(channels)) * 0.02 + 0.01, "w_zero": np.zeros(channels, np.int8),
        "y_scale": np.float32(0.5), "y_zero": np.uint8(128),
        "bias": integers(-900, 900, 3, dtype=np.int32),
    }  # fmt: skip
    module, feed = one_node(
        "QLinearConv", given, constant=[name for name in given if name != "x"], pads=[1, 1, 1, 1]
    )
    assert_agrees(module, feed)


@pytest.mark.parametrize(
    ("op", "more", "options"),
    [
        ("InstanceNormalization", {"scale": (3,), "bias": (3,)}, {}),
        ("BatchNormalization", dict.fromkeys(("scale", "bias", "mean", "var"), (3,)),
         {"training_mode": 1, "outputs": 3}),
        ("MeanVarianceNormalization", {}, {}),
        ("LpNormalization", {}, {}),
        ("LRN", {}, {"size": 3}),
        ("LpPool", {}, {"kernel_shape": [2, 2]}),
        ("GlobalLpPool", {}, {}),
        ("AveragePool", {}, {"kernel_shape": [8, 8]}),
        ("ReduceLogSum", {}, {}),
        ("ReduceProd", {}, {}),
        ("Sum", {"minus": (1, 3, 8, 8)}, {}),
        ("Mean", {"minus": (1, 3, 8, 8)}, {}),
    ],
)  # fmt: skip
def test_what_float16_adds_up_does_not_overflow(
    op: str, more: dict[str, Any], options: dict[str, Any]
) -> None:
    """Squares of hundreds, sums of 64 thousands, and sums that return below the largest."""
    x = RANDOM.normal(size=(1, 3, 8, 8)) * 500
    given = {"x": x, **{name: abs(normal(*shape)) for name, shape in more.items()}}
    if op in ("AveragePool", "ReduceLogSum"):
        given["x"] = abs(x) + 1000
    elif op == "ReduceProd":  # 1e6 on the way
        given["x"] = np.array([1000, 1000, 1e-3, 1e-3])
    elif "minus" in given:
        given = {"x": abs(x) + 4e4, "again": abs(x) + 4e4, "minus": -abs(x) - 4e4}
    wide, feed = one_node(op, {k: v.astype(np.float32) for k, v in given.items()}, **options)
    half, feed16 = one_node(op, {k: v.astype(np.float16) for k, v in given.items()}, **options)
    found = run_fx(half, feed16)
    # Inputs, and results, are rounded to 11 bits.
    for results in (run_fx(wide, feed), run_plain(half, feed16)):
        for a, b in zip(found, results, strict=True):
            assert a.dtype == np.float16
            np.testing.assert_allclose(a, b, rtol=0, atol=4 * 2**-11 * np.abs(b).max())


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"ids": [[1, -1, 3]]}, "tokens are from -1 to 3, and tables of 6 rows have 0 to 5"),
        ({"ids": [[1, 6, 3]]}, "tokens are from 1 to 6, and tables of 6 rows have 0 to 5"),
        ({"segments": [[0, 1, -1]]}, "segments are from -1 to 1, and tables of 2 rows have 0 to 1"),
        ({"places": [[0, 1, -1]]}, "positions are from -1 to 1, and tables of 5 rows have 0 to 4"),
        ({"places": [[4, 5, 3]]}, "positions are from 3 to 5, and tables of 5 rows have 0 to 4"),
        ({"places": [[3]]}, r"position_ids has shape \[1, 1\], not \[1, 3\]"),
        ({"places": [[3, 4, 3]]}, None),
    ],
)
def test_embeddings_are_rows_of_their_tables(odd: dict[str, Any], told: str | None) -> None:
    given = {"ids": [[1, 2, 3]], "segments": [[0, 1, 0]], "places": [[2, 1, 0]]} | odd
    ids, segments, places = (np.array(each, np.int32) for each in given.values())
    tables = {"word": normal(6, 4), "position": normal(5, 4), "segment": normal(2, 4)}
    rest = {"gamma": normal(4), "beta": normal(4), "mask": None, "places": places}
    whole = {"ids": ids, "segments": segments, **tables, **rest}
    module, feed = one_node("EmbedLayerNormalization", whole, domain=MS, outputs=2)
    if told is None:
        assert_agrees(module, feed)
        return
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run_plain(module, feed)
    with pytest.raises(LwcError, match=f"EmbedLayerNormalization 'n': {told}$"):
        run_fx(module, feed)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary(interleaved: int) -> None:
    angles = normal(12, 4)
    given = {
        "x": normal(2, 3, 16),
        "at": integers(0, 12, 2, 3, dtype=np.int64),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    check("RotaryEmbedding", given, interleaved=interleaved)
    check("RotaryEmbedding", given | {"at": np.array([4])}, interleaved=interleaved)
    # ONNX Runtime's kernel for the CPU does not read the attribute.
    check("RotaryEmbedding", given, interleaved=interleaved, scale=2.0)


@pytest.mark.parametrize("mask", ["none", "lengths", "keys", "all"])
@pytest.mark.parametrize("causal", [0, 1])
def test_multi_head_attention(mask: str, causal: int) -> None:
    masks = {
        "none": None,
        "lengths": np.array([5, 2], np.int32),
        "keys": integers(0, 2, 2, 5, dtype=np.int32),
        "all": integers(0, 2, 2, 5, 5, dtype=np.int32),
    }
    given = {
        "q": normal(2, 5, 16),
        "k": normal(2, 5, 16),
        "v": normal(2, 5, 24),
        "bias": normal(16 + 16 + 24),
        "mask": masks[mask],
        "attention_bias": normal(1, 2, 5, 5),
    }
    check("MultiHeadAttention", given, num_heads=2, unidirectional=causal)


MASKS = [
    [3, 4, 1, 9],  # ends, then starts
    [5, 2, 0, 5, 10, 0, 5, 10],  # lengths added up, of which the kernels for the CPU read the ends
    [2],
    [1, 2, 3],
    [[1, 1]],
    [[1, 1, 0, 1, 0]],
    [[[1, 1, 0, 1, 0]]] * 2,
    [[[[1, 1, 0, 1, 0]] * 5]] * 2,
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("op", ["Attention", "MultiHeadAttention"])
def test_masks_that_attention_takes_or_refuses(op: str, mask: list[Any]) -> None:
    """As ONNX Runtime, also a mask of one sequence for two."""
    if op == "Attention":
        given = {"x": normal(2, 5, 8), "weights": normal(8, 24), "bias": normal(24)}
    else:
        given = {name: normal(2, 5, 8) for name in "qkv"} | {"bias": None}
    given["mask"] = np.array(mask, np.int32)
    module, feed = one_node(op, given, domain=MS, num_heads=2)
    if len(mask) in ((4, 8) if op == "Attention" else (8,)):
        assert_agrees(module, feed)
        return
    with pytest.raises(Exception, match=r"shape|shall|not supported"):
        run_plain(module, feed)
    with pytest.raises(LwcError, match=rf"{op} 'n': the mask has shape .* with a batch of 2"):
        run_fx(module, feed)


@pytest.mark.parametrize("mask", [[3, 1], [4, 0, 5, 0, 5]], ids=str)
def test_masks_of_more_numbers_than_sequences(mask: list[int]) -> None:
    given = {"x": normal(1, 5, 8), "weights": normal(8, 24), "bias": normal(24)}
    check("Attention", given | {"mask": np.array(mask, np.int32)}, num_heads=2)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_attention_of_nothing(batch: int, queries: int, keys: int) -> None:
    given = {"q": normal(batch, queries, 8)}
    given |= {name: normal(batch, keys, 8) for name in "kv"}
    check("MultiHeadAttention", given, num_heads=2)
    if queries == keys:
        packed = {"x": normal(batch, 3, 8), "weights": normal(8, 24), "bias": normal(24)}
        check("Attention", packed, num_heads=2)


def test_multi_head_attention_with_a_past() -> None:
    given = {name: normal(2, 3, 16) for name in "qkv"}
    past = {"past_k": normal(2, 2, 4, 8), "past_v": normal(2, 2, 4, 8)}
    whole = {**given, "bias": None, "mask": None, "attention_bias": None, **past}
    check("MultiHeadAttention", whole, num_heads=2, outputs=3)


@pytest.mark.parametrize(
    ("queries", "keys", "past"),
    [(3, 5, 0), (5, 3, 0), (1, 4, 0), (2, 2, 3), (4, 2, 1), (1, 3, 2), (3, 3, 2)],
)
def test_causal_attention_of_other_lengths(queries: int, keys: int, past: int) -> None:
    """ONNX Runtime counts keys from the end of the past, and hides none from the last query."""
    given = {"q": normal(2, queries, 8), "k": normal(2, keys, 8), "v": normal(2, keys, 8)}
    if past:
        given |= dict.fromkeys(("bias", "mask", "more"))
        given |= {"past_k": normal(2, 2, past, 4), "past_v": normal(2, 2, past, 4)}
    outputs = 3 if past else 1
    check("MultiHeadAttention", given, num_heads=2, unidirectional=1, outputs=outputs)


@pytest.mark.parametrize("causal", [0, 1])
def test_packed_attention(causal: int) -> None:
    given = {
        "x": normal(2, 5, 8),
        "weights": normal(8, 48),
        "bias": normal(48),
        "mask": integers(0, 2, 2, 5, dtype=np.int32),
    }
    check("Attention", given, atol=1e-4, num_heads=2, unidirectional=causal)


def grouped(new: int, past: int, batch: int, **attributes: Any) -> dict[str, Any]:
    """Return the inputs of a GroupQueryAttention of 4 heads of 16 and 2 of keys."""
    total = new + past
    given = {
        "q": normal(batch, new, 64),
        "k": normal(batch, new, 32),
        "v": normal(batch, new, 32),
        "past_k": normal(batch, 2, past, 16),
        "past_v": normal(batch, 2, past, 16),
        "seqlens": np.full(batch, total - 1, np.int32),
        "total": np.array(total, np.int32),
    }
    if attributes.get("do_rotary"):
        angles = normal(16, 8)
        given |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    return given


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"do_rotary": 1},
        {"do_rotary": 1, "rotary_interleaved": 1},
        {"local_window_size": 3},
        {"local_window_size": 1},
        {"local_window_size": 0},
        {"local_window_size": 0, "smooth_softmax": 1},
        {"softcap": 2.0, "scale": 0.2},
        {"smooth_softmax": 1},
        {"causal": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("new", "past", "batch"), [(5, 0, 2), (1, 6, 2), (3, 4, 1)])
def test_grouped_attention(attributes: Any, new: int, past: int, batch: int) -> None:
    given = grouped(new, past, batch, **attributes)
    check("GroupQueryAttention", given, outputs=3, num_heads=4, kv_num_heads=2, **attributes)


@pytest.mark.parametrize(
    ("new", "past", "places"),
    [(3, 0, [[2, 0, 1], [7, 7, 7]]), (1, 0, [[3], [5]]), (1, 4, [[3], [5]]), (3, 4, [[3, 1, 5]])],
)
def test_positions_of_grouped_attention(new: int, past: int, places: list[list[int]]) -> None:
    """Of a first prompt, the operator is said to use the first element only."""
    given = grouped(new, past, len(places), do_rotary=1) | {"places": np.array(places)}
    options = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "outputs": 3}
    check("GroupQueryAttention", given, **options)


def test_grouped_attention_that_sees_no_key() -> None:
    given = grouped(5, 0, 2) | dict.fromkeys(("cos", "sin", "position_ids"))
    bias = np.zeros((1, 1, 5, 5), np.float32)
    bias[:, :, 3] = -np.inf
    check("GroupQueryAttention", given | {"bias": bias}, outputs=3, num_heads=4, kv_num_heads=2)


def test_inputs_that_are_not_lowered_are_refused_before_a_run() -> None:
    absent = dict.fromkeys(f"absent{number}" for number in range(9))
    given = grouped(3, 0, 2) | absent | {"query_seqlens": np.array([3, 2], np.int32)}
    module, _ = one_node("GroupQueryAttention", given, domain=MS, num_heads=4, kv_num_heads=2)
    with pytest.raises(LwcError, match=r"GroupQueryAttention 'n': .* with an input 16, counted"):
        lwc.to_fx(module)


def test_grouped_attention_of_sequences_of_other_lengths() -> None:
    given = grouped(1, 6, 2)
    given["seqlens"] = np.array([6, 3], np.int32)
    module, feed = one_node(
        "GroupQueryAttention", given, domain=MS, outputs=3, num_heads=4, kv_num_heads=2
    )
    assert_agrees(module, feed)


@pytest.mark.parametrize(
    ("activation", "params"),
    [("", []), ("Relu", []), ("LeakyRelu", [0.2]), ("Clip", [-0.3, 0.4])],
)
def test_fused_conv(activation: str, params: list[float]) -> None:
    given = {"x": normal(1, 2, 5, 5), "w": normal(3, 2, 3, 3), "b": normal(3)}
    attributes: dict[str, Any] = {"activation": activation} if activation else {}
    attributes |= {"activation_params": params} if params else {}
    check("FusedConv", given, pads=[1, 1, 1, 1], atol=1e-4, **attributes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["PER_TENSOR", "PER_CHANNEL"])
def test_grouped_attention_with_a_cache_of_integers(bits: int, kind: str) -> None:
    given = grouped(1, 6, 2)
    shape = (2, 2, 6, 16 * bits // 8)
    for name in ("past_k", "past_v"):
        given[name] = (
            integers(-100, 100, *shape, dtype=np.int8) if bits == 8 else integers(0, 256, *shape)
        )
    scale = np.full((1, 2, 1, 16) if kind == "PER_CHANNEL" else 1, 0.05, np.float32)
    absent = dict.fromkeys(("cos", "sin", "position_ids", "attention_bias", "head_sink"))
    module, feed = one_node(
        "GroupQueryAttention",
        given | absent | {"k_scale": scale, "v_scale": scale * 2},
        domain=MS,
        outputs=3,
        num_heads=4,
        kv_num_heads=2,
        k_quant_type=kind,
        v_quant_type=kind,
        kv_cache_bit_width=bits,
    )
    assert_agrees(module, feed, atol=1e-4)


def test_the_dialect() -> None:
    random = np.random.default_rng(9)
    for variant in variants(random, 40):
        case = draw_case(random, variant, (np.float16, np.float32)[random.integers(2)])
        x = random.normal(size=(3, variant.K)).astype(np.float32)
        (found,) = run_fx(dialect_module(case), {"x": x})
        wanted = expected(case, x)
        # A rounding that falls to the other side, at a half, is one step of one input.
        np.testing.assert_allclose(found, wanted, 1e-3, 1e-3 * np.abs(wanted).max() + 1e-6)


def test_the_page_lists_what_is_lowered() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fx.md").read_text()
    listed = page.partition("these are lowered, and no other: ")[2].partition(".\n")[0]
    known = {name.removeprefix(f"{MS}::") for name in known_operators() if name.startswith(MS)}
    assert set(listed.replace("\n", " ").split(", ")) == known
