"""Operators at the edges of what they take, in PyTorch beside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from fx_agreement import assert_agrees, one_node, run_fx
from support import module_of, run_plain
from torch.fx.experimental.proxy_tensor import make_fx

from lwc.backends.fx.convert import to_fx
from lwc.core.errors import LwcError

X = np.arange(15, dtype=np.float32).reshape(5, 3)


def heads(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("start", "stop", "step"),
    [
        (-100, -200, -1),  # from before the first element on: that is still taken
        (-100, 2, -1),
        (1, 3, -1),
        (2, -100, -2),
        (2**63 - 1, -(2**63), -1),
        (-(2**63), 2**63 - 1, 2),
        (3, 1, 1),
    ],
)
def test_slices(start: int, stop: int, step: int, constant: bool) -> None:
    cut = {"s": [start], "e": [stop], "a": [-2], "t": [step]}
    arrays = {name: np.array(value) for name, value in cut.items()}
    assert_agrees(*one_node("Slice", {"x": X, **arrays}, constant=list(cut) if constant else ()))


def test_a_slice_backwards_of_nothing() -> None:
    cut = {"s": np.array([-1]), "e": np.array([-9]), "a": np.array([0]), "t": np.array([-1])}
    assert_agrees(*one_node("Slice", {"x": X[:0], **cut}))


def test_a_slice_of_extents_from_before_the_first() -> None:
    module = module_of(
        """g (float[a, b] x) => (int64[m] y) <int64[1] s = {-9}, int64[1] e = {-9},
            int64[1] a = {0}, int64[1] t = {-1}> { n = Shape(x) y = Slice(n, s, e, a, t) }"""
    )
    assert_agrees(module, {"x": X})


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize(
    ("op", "inputs", "opset"),
    [
        ("Clip", {"x": [1, 50, 90], "a": 4, "b": 60}, 21),
        ("Abs", {"x": [1, 50, 90]}, 21),
        ("Sign", {"x": [0, 50, 90]}, 21),
    ],
)
def test_unsigned_integers(op: str, inputs: Any, opset: int, dtype: Any) -> None:
    given = {name: np.array(value, dtype) for name, value in inputs.items()}
    module, feed = one_node(op, given, opset=opset)
    (found,) = run_fx(module, feed)
    wanted = {"Clip": [4, 50, 60], "Abs": [1, 50, 90], "Sign": [0, 1, 1]}[op]
    assert (found.dtype, found.tolist()) == (dtype, wanted)


REVERSED = {"s": [4], "e": [-9], "a": [0], "t": [-1]}


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize(
    ("op", "given", "attributes"),
    [
        *(
            (
                op,
                {"i": [[1], [-1]] if op == "ScatterND" else [1, -1], "u": [3, 6]},
                {"reduction": r},
            )
            for op in ("ScatterND", "ScatterElements")
            for r in ("none", "add", "mul", "max", "min")
        ),
        ("GatherElements", {"i": [1, -2]}, {}),
        ("Compress", {"c": [True, False, True, True]}, {}),
        ("Slice", REVERSED, {}),
    ],
)
def test_choices_from_unsigned_integers(op: str, given: Any, attributes: Any, dtype: Any) -> None:
    places = {
        name: np.array(value, dtype if name == "u" else None) for name, value in given.items()
    }
    module, feed = one_node(op, {"x": np.arange(6, dtype=dtype) + 200, **places}, **attributes)
    assert_agrees(module, feed)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_sequences_and_caches_of_unsigned_integers(dtype: Any) -> None:
    x = np.arange(6, dtype=dtype)
    lengths = np.array([2, 3])
    assert_agrees(*one_node("ReverseSequence", {"x": x.reshape(3, 2), "lengths": lengths}))
    given = {"past": x.reshape(1, 6, 1), "update": x[4:].reshape(1, 2, 1)}
    assert_agrees(*one_node("TensorScatter", given, opset=24, axis=1))


def test_a_sum_of_nothing_before_each() -> None:
    given = {"x": X[:0], "axis": np.array(0)}
    assert_agrees(*one_node("CumSum", given, exclusive=1))
    assert_agrees(*one_node("CumSum", {"x": X, "axis": np.array(0)}, exclusive=1, reverse=1))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_hardmax_of_rows(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert_agrees(*one_node("Hardmax", {"x": x}, axis=axis, opset=11))


@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest_of_places_in_the_middle(coordinates: str, nearest: str) -> None:
    x = np.random.default_rng(0).normal(size=(1, 1, 5, 6)).astype(np.float32)
    given = {"x": x, "roi": None, "scales": np.array([1, 1, 1.6, 0.7], np.float32)}
    attributes: dict[str, Any] = {
        "coordinate_transformation_mode": coordinates,
        "nearest_mode": nearest,
    }
    assert_agrees(*one_node("Resize", given, constant=["scales"], **attributes))


@pytest.mark.parametrize("scales", [[1.7, 0.6], [2, 3], [0.5, 0.35]], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_places_as_tensorflow_had_them(mode: str, scales: list[float]) -> None:
    factors = np.array([1, 1, *scales], np.float32)
    given = {"x": heads(1, 2, 7, 8), "roi": np.zeros(0, np.float32), "scales": factors}
    places: dict[str, Any] = {"coordinate_transformation_mode": "tf_half_pixel_for_nn"}
    for nearest in ("floor", "round_prefer_floor", "ceil"):
        assert_agrees(
            *one_node(
                "Resize", given, opset=11, constant=["roi", "scales"],
                mode=mode, nearest_mode=nearest, **places,
            )
        )  # fmt: skip


def test_non_zero_of_a_scalar() -> None:
    assert_agrees(*one_node("NonZero", {"x": np.float32(3)}))
    assert_agrees(*one_node("NonZero", {"x": X[:0]}))


def test_an_output_of_a_type_that_is_not_declared() -> None:
    x = np.array([0.07, 1e6, -3.1], np.float32)
    module, feed = one_node("Cast", {"x": x}, to=int(ir.DataType.FLOAT8E4M3FN))
    (found,) = run_fx(module, feed)
    assert found.dtype == ml_dtypes.float8_e4m3fn
    assert found.astype(np.float32).tolist() == [0.0703125, 448, -3.0]


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "NOTSET"])
@pytest.mark.parametrize("extent", [7, 8, 13])
def test_transposed_convolutions_of_a_given_extent(auto_pad: str, extent: int) -> None:
    """Smaller than the whole one, of 11 or 12 numbers, or larger."""
    drawn = np.random.default_rng(0)
    for size in (2, 3):
        given = {name: drawn.normal(size=(1, 1, n)).astype(np.float32)
                 for name, n in (("x", 4), ("w", size))}  # fmt: skip
        module, feed = one_node(
            "ConvTranspose", given, auto_pad=auto_pad, strides=[3], output_shape=[extent]
        )
        assert_agrees(module, feed)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_transposed_convolutions_whose_steps_are_longer_than_what_they_write(auto_pad: str) -> None:
    given = {"x": X[None, None, 0], "w": np.ones((1, 1, 1), np.float32)}
    module, feed = one_node("ConvTranspose", given, auto_pad=auto_pad, strides=[2])
    assert run_fx(module, feed)[0].shape == (1, 1, 5)
    assert_agrees(module, feed)


def test_no_axes_to_squeeze_are_all() -> None:
    """ONNX's own inference reads it as none, so it gets an output of any rank."""
    module = module_of(
        "g (float[1, a, 1] x) => (float[n] y) <int64[0] axes = {}> { y = Squeeze(x, axes) }"
    )
    assert_agrees(module, {"x": X[None, :, :1]})


@pytest.mark.parametrize(
    ("op", "attributes", "wanted"),
    [
        (
            "Gelu",
            {"approximate": "foo"},
            r"Gelu has no approximate 'foo' \(it may be 'none', 'tanh'",
        ),
        ("DepthToSpace", {"blocksize": 1, "mode": "RCD"}, "DepthToSpace has no mode 'RCD'"),
        ("MaxPool", {"kernel_shape": [1], "auto_pad": "SAME"}, "it may be 'NOTSET', 'SAME_UPPER'"),
    ],
)
def test_words_that_an_attribute_does_not_know(
    op: str, attributes: dict[str, Any], wanted: str
) -> None:
    module, _ = one_node(op, {"x": X[None, None]}, opset=20, **attributes)
    with pytest.raises(LwcError, match=wanted):
        to_fx(module)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_rules_of_linear_attention(rule: str) -> None:
    """By the formulas of ONNX, each token after the other; inputs of other rules count nothing."""
    drawn = np.random.default_rng(0)
    q, k, v = (drawn.normal(size=(1, 5, 4)).astype(np.float32) for _ in range(3))
    decay = -drawn.random(size=(1, 5, 4)).astype(np.float32)
    beta = drawn.random(size=(1, 5, 1)).astype(np.float32)
    given = {"q": q, "k": k, "v": v, "past": None, "decay": decay, "beta": beta}
    heads: dict[str, Any] = {"q_num_heads": 1, "kv_num_heads": 1}
    module, feed = one_node(
        "LinearAttention", given, opset=26, update_rule=rule, scale=1.0, **heads
    )
    state, rows = np.zeros((4, 4), np.float32), []
    for t in range(5):
        if "gated" in rule:
            state = state * np.exp(decay[0, t])[:, None]
        told = beta[0, t] * (v[0, t] - k[0, t] @ state) if "delta" in rule else v[0, t]
        state = state + np.outer(k[0, t], told)
        rows.append(q[0, t] @ state)
    np.testing.assert_allclose(run_fx(module, feed)[0][0], rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.3, 0.3])
def test_attention_by_a_negative_scale(scale: float) -> None:
    """ONNX Runtime takes its root and gives NaN, so the formula is the judge."""
    drawn = np.random.default_rng(0)
    q, k, v = (drawn.normal(size=(1, 2, 3, 4)).astype(np.float32) for _ in range(3))
    module, feed = one_node("Attention", {"q": q, "k": k, "v": v}, opset=23, scale=scale)
    shares = np.exp(scale * q @ k.transpose(0, 1, 3, 2))
    wanted = shares / shares.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(run_fx(module, feed)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x", [X * 0, X[:0], X[:, :0], X, -X], ids=["0", "rows", "columns", "+", "-"]
)
def test_dynamic_quantization_of_nothing_and_of_zeros(x: Any) -> None:
    assert_agrees(*one_node("DynamicQuantizeLinear", {"x": x}, outputs=3))


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceLogSum", "ReduceLogSumExp", "ReduceL2"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_of_integers_and_of_nothing(op: str, dtype: Any, keepdims: int) -> None:
    rows = np.array([[5, 4, 4, 4, 4, 4], [3, 3, 3, 3, 3, 3], [2**30, 2**30, 0, 0, 1, 1]], dtype)
    axes = {"a": np.array([1])}
    for x in (rows, rows[:, :0], np.tile(rows[:, :0], (7, 1))):
        module, feed = one_node(op, {"x": x, **axes}, constant=["a"], keepdims=keepdims)
        assert_agrees(module, feed)


@pytest.mark.parametrize("mode", ["wrap", "edge", "constant", "reflect"])
@pytest.mark.parametrize("pads", [[-1, 2], [2, -1], [-2, -1], [-3, 1], [0, -2], [1, -1]])
def test_pads_that_take_away_do_so_first(mode: str, pads: list[int]) -> None:
    x = np.arange(5, dtype=np.float32)
    assert_agrees(*one_node("Pad", {"x": x, "pads": np.array(pads)}, mode=mode))


@pytest.mark.parametrize("pads", [[-4, 2], [-3, 9], [7, -4]])
def test_what_is_left_wraps_more_than_once(pads: list[int]) -> None:
    x = np.arange(5, dtype=np.float32)
    assert_agrees(*one_node("Pad", {"x": x, "pads": np.array(pads)}, mode="wrap"))


@pytest.mark.parametrize("mode", ["wrap", "edge", "reflect"])
def test_nothing_left_to_repeat(mode: str) -> None:
    given = {"x": np.arange(5, dtype=np.float32), "pads": np.array([-5, 2])}
    module, feed = one_node("Pad", given, mode=mode)
    with pytest.raises(Exception, match="zero effective input extent"):
        run_plain(module, feed)
    with pytest.raises(LwcError, match=f"axis 0 has nothing left to repeat by mode '{mode}'"):
        run_fx(module, feed)


# Attention


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_to_no_keys_is_zero(causal: int) -> None:
    """ONNX Runtime refuses it; the standard adds nothing up."""
    given = {"q": heads(2, 2, 3, 4), "k": heads(2, 2, 0, 4), "v": heads(2, 2, 0, 5)}
    (y,) = run_fx(*one_node("Attention", given, opset=23, is_causal=causal))
    assert y.shape == (2, 2, 3, 5)
    assert not y.any()


@pytest.mark.parametrize(
    ("of_q", "of_v"), [(np.float32, np.float16), (np.float16, np.float32), (np.float32, float)]
)
def test_attention_to_values_of_another_type(of_q: Any, of_v: Any) -> None:
    """ONNX Runtime refuses it; the standard gives a result of the type of the queries."""
    q, k = (heads(1, 2, n, 4, dtype=of_q) for n in (3, 5))
    v = heads(1, 2, 5, 4, dtype=of_v)
    y, keys, values = run_fx(*one_node("Attention", {"q": q, "k": k, "v": v}, opset=23, outputs=3))
    assert [each.dtype for each in (y, keys, values)] == [of_q, of_q, of_v]
    alike = {"q": q, "k": k, "v": v.astype(of_q)}
    (wanted,) = run_plain(*one_node("Attention", alike, opset=23))
    # A few roundings to half precision, of numbers below 4.
    atol = 1e-5 if np.float16 not in (of_q, of_v) else 4 * 4 * 2**-11
    np.testing.assert_allclose(y, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("lengths", [[6, 2], [5, -1]])
def test_attention_to_more_keys_than_there_are(lengths: list[int], causal: int) -> None:
    given = {"q": heads(2, 2, 3, 4), "k": heads(2, 2, 5, 4), "v": heads(2, 2, 5, 4)}
    given |= {**dict.fromkeys(("mask", "past_k", "past_v")), "lengths": np.array(lengths)}
    module, feed = one_node("Attention", given, opset=24, is_causal=causal)
    with pytest.raises(Exception, match="nonpad_kv_seqlen"):
        run_plain(module, feed)
    with pytest.raises(
        LwcError, match=r"nonpad_kv_seqlen is from -?\d to \d, and there are 5 keys"
    ):
        run_fx(module, feed)


# Loops


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(op: str, steps: int, lengths: Any = None, **attributes: Any) -> Any:
    """Return a layer of two sequences, which starts from what is not zero."""
    gates, states = GATES[op], {"h": heads(1, 2, 4)}
    if op == "LSTM":
        states["c"] = heads(1, 2, 4) / 2
    given = {
        "x": 3 * heads(steps, 2, 3),
        **{"w": heads(1, 4 * gates, 3), "r": heads(1, 4 * gates, 4), "b": heads(1, 8 * gates)},
        "lengths": None if lengths is None else np.array(lengths, np.int32),
        **states,
    }
    if attributes.pop("peepholes", False):
        given["p"] = heads(1, 12)
    return one_node(op, given, hidden_size=4, outputs=1 + len(states), **attributes)


@pytest.mark.parametrize("op", GATES)
def test_sequences_without_a_step_end_in_zeros(op: str) -> None:
    assert_agrees(*recurrent(op, 3, [0, 2]))
    # Of no steps at all ONNX Runtime says so of an RNN, ends the program at a GRU, and leaves an
    # LSTM's cell as memory was.
    module, feed = recurrent(op, 0)
    if op == "RNN":
        assert_agrees(module, feed)
    y, *states = run_fx(module, feed)
    assert y.shape == (0, 1, 2, 4)
    for state in states:
        assert state.shape == (1, 2, 4)
        assert not state.any()


@pytest.mark.parametrize("clip", [0.2, 1.0])
@pytest.mark.parametrize("op", GATES)
def test_clips(op: str, clip: float) -> None:
    assert_agrees(*recurrent(op, 4, clip=clip))
    if op == "LSTM":
        assert_agrees(*recurrent(op, 4, clip=clip, peepholes=True))
        large = ["Relu", "Relu", "Relu"]  # so that the cell outgrows what is clipped
        assert_agrees(*recurrent(op, 4, clip=clip, activations=large))


@pytest.mark.parametrize("op", GATES)
def test_an_affine_activation_has_a_shift(op: str) -> None:
    names = {"RNN": ["Affine"], "GRU": ["Affine", "Tanh"], "LSTM": ["Affine", "Tanh", "Tanh"]}[op]
    module, feed = recurrent(
        op, 2, activations=names, activation_alpha=[0.3], activation_beta=[0.4]
    )
    assert_agrees(module, feed)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scan_over_nothing(axis: int) -> None:
    """ONNX Runtime refuses it; the standard leaves the state, and outputs without rows."""
    module = module_of(
        f"""g (float[2] s, float[n, 2] x) => (float[2] e, float[a, b] y) {{
        e, y = Scan<num_scan_inputs = 1, scan_output_axes = [{axis}],
            body = b (float[2] t, float[2] i) => (float[2] o, float[2] z)
                {{ o = Add(t, i)  z = Mul(o, i) }}>(s, x) }}"""
    )
    assert_agrees(module, {"s": heads(2), "x": heads(3, 2)})
    e, y = run_fx(module, {"s": heads(2), "x": heads(0, 2)})
    np.testing.assert_array_equal(e, heads(2))
    assert y.shape == ((0, 2) if axis == 0 else (2, 0))


def test_masks_of_dropout() -> None:
    assert_agrees(*one_node("Dropout", {"x": X}, opset=13, outputs=2))


def test_lengths_that_are_mapped_are_not_asked_for_their_numbers() -> None:
    given = {"q": heads(2, 2, 3, 4), "k": heads(2, 2, 5, 4), "v": heads(2, 2, 5, 4)}
    given |= {**dict.fromkeys(("mask", "past_k", "past_v")), "lengths": np.array([5, 2])}
    module, feed = one_node("Attention", given, opset=24)
    lowered, fed = to_fx(module), [torch.from_numpy(each) for each in feed.values()]
    stacked = torch.func.vmap(lowered)(*(torch.stack([each, each]) for each in fed))
    torch.testing.assert_close(stacked[1], lowered(*fed))
    assert torch.equal(make_fx(lowered)(*fed)(*fed), lowered(*fed))


@pytest.mark.parametrize("op", ["Sum", "Mean"])
def test_an_exported_program_changes_its_type(op: str) -> None:
    module, feed = one_node(op, {"x": heads(2, 3), "z": heads(2, 3)})
    fed = [torch.from_numpy(each) for each in feed.values()]
    program = torch.export.export(to_fx(module), tuple(fed)).module()
    assert program.double()(*(each.double() for each in fed)).dtype == torch.float64
