"""fuse-attention: each spelling before and after, near misses with their reason, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import module_of, ops, run_pass_to_the_end, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.cli.opt import main
from lwc.core.module import Module
from lwc.passes.attention.fuse_attention import FuseAttention
from lwc.passes.attention.lowering import MASKS_PAD_RIGHT
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]
RTOL, ATOL = 1e-5, 1e-6
"""float32 sums of at most a dozen terms, in another order."""

LOWEST = float(np.finfo(np.float32).min)
HEADS = "float[N, 2, S, 8] q, float[N, 2, S, 8] k, float[N, 2, S, 8] v"
CAUSAL = """
    shape = Shape (q)
    length = Gather (shape, two)
    keys = Range (zero, length, one)
    rows = Unsqueeze (keys, one1)
    causal = LessOrEqual (keys, rows)
"""
NUMBERS = "int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] one1 = {1}"


def attend(
    masked: str = "shares = Softmax <axis = -1> (scores)",
    *,
    inputs: str = HEADS,
    scores: str = "raw = MatMul (q, kt)\n scores = Mul (raw, scale)",
    constants: str = "",
    kt: str = "kt = Transpose <perm = [0, 1, 3, 2]> (k)",
    value: str = "v",
    opset: int = 18,
) -> Module:
    """Read attention of heads, its parts given as text."""
    more = f", {constants}" if constants else ""
    module: Module = module_of(
        f"g ({inputs}) => (float[N, heads, S, width] y) "
        f"<float scale = {{0.3}}, float fill = {{{LOWEST}}}, float nothing = {{0}}, "
        f"{NUMBERS}{more}> {{ {kt}\n {scores}\n {masked}\n y = MatMul (shares, {value}) }}",
        opset=opset,
    )
    return module


def fused(module: Module, form: str = "auto", feed: dict[str, Array] | None = None) -> list[str]:
    """Fuse, compare the outputs where the original has numbers, return the attention operators."""
    feed = heads() if feed is None else feed
    wanted = run_plain(module, feed)
    run_pass_to_the_end(FuseAttention(form), module)  # type: ignore[arg-type]
    for found, number in zip(run_plain(module, feed), wanted, strict=True):
        np.testing.assert_allclose(found, number, rtol=RTOL, atol=ATOL)
    return [op for op in ops(module) if "Attention" in op]


def heads(batch: int = 2, length: int = 5, groups: int = 2, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = {"q": 2, "k": groups, "v": groups}
    return {
        name: random.standard_normal((batch, count, length, 8)).astype(np.float32)
        for name, count in shapes.items()
    }


def missed(module: Module, form: str = "auto") -> str:
    assert not run_pass_to_the_end(FuseAttention(form), module).changed  # type: ignore[arg-type]
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


def test_plain() -> None:
    module = attend()
    assert fused(module) == ["MultiHeadAttention"]
    assert ops(module) == [
        "Transpose", "Reshape", "Transpose", "Reshape", "Transpose", "Reshape",
        "MultiHeadAttention", "Reshape", "Transpose",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "made"),
    [("mha", "MultiHeadAttention"), ("gqa", "GroupQueryAttention"), ("standard", "Attention")],
)
@pytest.mark.parametrize(
    "masked",
    [
        "shares = Softmax <axis = 3> (scores)",
        CAUSAL + "hidden = Where (causal, scores, fill)\n shares = Softmax (hidden)",
        CAUSAL
        + "bias = Where (causal, nothing, fill)\n hidden = Add (bias, scores)\n "
        + "shares = Softmax (hidden)",
        CAUSAL
        + "later = Not (causal)\n hidden = Where (later, fill, scores)\n shares = Softmax (hidden)",
    ],
    ids=["plain", "replaced", "added", "swapped"],
)
def test_each_form(form: str, made: str, masked: str) -> None:
    assert fused(attend(masked, opset=23), form) == [made]


def test_causal_is_a_flag() -> None:
    masked = CAUSAL + "hidden = Where (causal, scores, fill)\n shares = Softmax (hidden)"
    module = attend(masked)
    assert fused(module) == ["GroupQueryAttention"]
    assert "Where" not in ops(module)


def test_sliding_window() -> None:
    masked = (
        CAUSAL
        + "first = Sub (rows, two)\n near = Greater (keys, first)\n"
        + "seen = And (causal, near)\n hidden = Where (seen, scores, fill)\n"
        + "shares = Softmax (hidden)"
    )
    module = attend(masked)
    assert fused(module) == ["GroupQueryAttention"]
    (node,) = (n for n in module.nodes() if n.op_type == "GroupQueryAttention")
    assert node.attributes["local_window_size"].as_int() == 2


def test_soft_cap() -> None:
    scores = (
        "raw = MatMul (q, kt)\n part = Div (raw, cap)\n bent = Tanh (part)\n"
        "scores = Mul (bent, cap)"
    )
    module = attend(scores=scores, constants="float cap = {2}")
    assert fused(module) == ["GroupQueryAttention"]


PADDED = HEADS + ", int64[N, S] mask"
WIDE = "wide = Unsqueeze (mask, axes)\n seen = Cast <to = 9> (wide)\n"


def padded(length: int = 5) -> dict[str, Array]:
    """Two sequences, one padded on the left, one that is all padding."""
    mask = np.array([[0, 0, 1, 1, 1], [0] * 5], np.int64)
    return heads(length=length) | {"mask": mask}


@pytest.mark.parametrize("form", ["auto", "mha", "gqa"])
@pytest.mark.parametrize("low", [LOWEST, -float("inf")])
@pytest.mark.parametrize("guarded", [False, True])
def test_rows_hidden_as_a_whole_keep_their_numbers(form: str, low: float, guarded: bool) -> None:
    """The lowest number makes them means, minus infinity no numbers, and a guard zeros."""
    masked = WIDE + "hidden = Where (seen, scores, low)\n raws = Softmax (hidden)\n"
    masked += (
        "bad = IsNaN (raws)\n shares = Where (bad, nothing, raws)"
        if guarded
        else "shares = Identity (raws)"
    )
    text = "-inf" if low == -float("inf") else str(low)
    module = attend(
        masked, inputs=PADDED, constants=f"int64[2] axes = {{1, 2}}, float low = {{{text}}}"
    )
    assert len(fused(module, form, padded())) == 1


def test_the_standard_operator_gives_zeros_instead() -> None:
    masked = WIDE + "hidden = Where (seen, scores, fill)\n shares = Softmax (hidden)"
    module = attend(masked, inputs=PADDED, constants="int64[2] axes = {1, 2}", opset=23)
    assert "it gives 0 for rows that are hidden as a whole" in missed(module, "standard")


def test_two_masks_are_applied_in_order() -> None:
    """What is hidden twice is not hidden more: numbers are replaced, not added."""
    masked = (
        CAUSAL
        + WIDE
        + "first = Where (causal, scores, fill)\n hidden = Where (seen, first, fill)\n"
        + "shares = Softmax (hidden)"
    )
    module = attend(masked, inputs=PADDED, constants="int64[2] axes = {1, 2}")
    assert len(fused(module, "auto", padded())) == 1


def test_granted_masks_pad_right() -> None:
    masked = (
        CAUSAL
        + WIDE
        + "both = And (causal, seen)\n hidden = Where (both, scores, fill)\n"
        + "shares = Softmax (hidden)"
    )
    module = attend(masked, inputs=PADDED, constants="int64[2] axes = {1, 2}")
    feed = heads() | {"mask": np.array([[1, 1, 1, 0, 0], [1] * 5], np.int64)}
    wanted = run_plain(module, feed)[0]
    ctx = PassContext(
        AnalysisManager(module), source="fuse-attention", granted=frozenset({MASKS_PAD_RIGHT})
    )
    FuseAttention().run(module, ctx)
    assert "Where" not in ops(module)
    found = run_plain(module, feed)[0]
    real = feed["mask"].astype(bool)[:, None, :, None].repeat(2, 1).repeat(8, 3)
    np.testing.assert_allclose(found[real], wanted[real], rtol=RTOL, atol=ATOL)
    assert np.isfinite(found).all()


def test_shared_heads() -> None:
    inputs = "float[N, 2, S, 8] q, float[N, 1, S, 8] k, float[N, 1, S, 8] v"
    assert fused(attend(inputs=inputs), "gqa", heads(groups=1)) == ["GroupQueryAttention"]
    assert fused(attend(inputs=inputs), "mha", heads(groups=1)) == ["MultiHeadAttention"]


def test_transposed_keys_come_as_an_input() -> None:
    inputs = "float[N, 2, S, 8] q, float[N, 2, 8, S] kt, float[N, 2, S, 8] v"
    feed = heads()
    feed["kt"] = np.swapaxes(feed.pop("k"), 2, 3)
    assert fused(attend(inputs=inputs, kt=""), "auto", feed) == ["MultiHeadAttention"]


def test_softmax_of_flattened_scores() -> None:
    masked = (
        "flat = Flatten <axis = 3> (scores)\n part = Softmax (flat)\n shape = Shape (q)\n"
        "begin = Slice (shape, zero1, three1)\n back = Concat <axis = 0> (begin, last1)\n"
        "shares = Reshape (part, back)"
    )
    constants = "int64[1] zero1 = {0}, int64[1] three1 = {3}, int64[1] last1 = {-1}"
    module = attend(masked, constants=constants)
    assert fused(module) == ["MultiHeadAttention"]


def test_shares_are_given_back_the_shape_of_the_scores() -> None:
    masked = (
        "flat = Flatten <axis = 3> (scores)\n part = Softmax (flat)\n shape = Shape (scores)\n"
        "shares = Reshape (part, shape)"
    )
    assert fused(attend(masked)) == ["MultiHeadAttention"]


def test_the_shape_of_the_scores_is_read_elsewhere_too() -> None:
    masked = (
        "flat = Flatten <axis = 3> (scores)\n part = Softmax (flat)\n shape = Shape (scores)\n"
        "other = Size (shape)\n shares = Reshape (part, shape)"
    )
    module = attend(masked)
    (size,) = (node.outputs[0] for node in module.graph if node.op_type == "Size")
    size.dtype, size.shape = ir.DataType.INT64, ir.Shape([])
    module.graph.outputs.append(size)
    assert "scores on the way are read elsewhere" in missed(module)


@pytest.mark.parametrize(("causal", "near"), [(-1e9, -1.0), (-2.0, -1e9)])
def test_a_penalty_is_no_mask(causal: float, near: float) -> None:
    """What one of two terms only lowers is not hidden, however low the other one hides."""
    masked = (
        CAUSAL + "first = Sub (rows, two)\n close = Greater (keys, first)\n"
        "a = Where (causal, nothing, low)\n b = Where (close, nothing, lower)\n"
        "bias = Add (a, b)\n hidden = Add (scores, bias)\n shares = Softmax (hidden)"
    )
    module = attend(masked, constants=f"float low = {{{causal}}}, float lower = {{{near}}}")
    fused(module)
    (node,) = (n for n in module.nodes() if "Attention" in n.op_type)
    assert "local_window_size" not in node.attributes
    assert len(node.inputs) > 5


@pytest.mark.parametrize("row", [0, 1])
def test_one_row_of_the_mask_for_all_sequences(row: int) -> None:
    masked = (
        "one_row = Gather <axis = 0> (mask, place)\n seen = Cast <to = 9> (one_row)\n"
        "hidden = Where (seen, scores, fill)\n shares = Softmax (hidden)"
    )
    module = attend(
        masked, inputs=f"{HEADS}, int64[N, S] mask", constants=f"int64 place = {{{row}}}"
    )
    feed = heads()
    feed["mask"] = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    fused(module, feed=feed)


@pytest.mark.parametrize("to", [3, 2, 10])
def test_places_in_a_narrow_type_are_no_places(to: int) -> None:
    """int8 wraps, uint8 too, float16 rounds."""
    masked = CAUSAL + (
        f"narrow = Cast <to = {to}> (keys)\n across = Unsqueeze (narrow, one1)\n"
        "later = Greater (narrow, across)\n hidden = Where (later, fill, scores)\n"
        "shares = Softmax (hidden)"
    )
    length = 2100 if to == 10 else 260
    module = attend(masked)
    assert fused(module, feed=heads(1, length)) != ["GroupQueryAttention"]


STANDARD = """g (float[N, 4, S, 8] q, float[N, 2, S, 8] k, float[N, 2, S, 8] v, bool[N, 1, S, S] m)
    => (float[N, 4, S, 8] y) {{ y = Attention {attributes} (q, k, v{mask}) }}"""


@pytest.mark.parametrize("form", ["gqa", "mha"])
@pytest.mark.parametrize(
    ("attributes", "mask"), [("<is_causal = 1>", ""), ("<scale = 0.2>", ""), ("", ", m")]
)
def test_the_standard_operator_is_read(form: str, attributes: str, mask: str) -> None:
    if form == "mha" and "causal" in attributes:
        pytest.skip("has a test of its own")
    module = module_of(STANDARD.format(attributes=attributes, mask=mask), opset=23)
    random = np.random.default_rng(0)
    feed: dict[str, Array] = {
        name: random.standard_normal((2, count, 5, 8)).astype(np.float32)
        for name, count in (("q", 4), ("k", 2), ("v", 2))
    }
    feed["m"] = random.random((2, 1, 5, 5)) < 0.5
    feed["m"][0, 0, 1] = False
    made = fused(module, form, feed)
    assert made == [{"gqa": "GroupQueryAttention", "mha": "MultiHeadAttention"}[form]]


def test_causality_without_a_mask_to_add() -> None:
    module = module_of(STANDARD.format(attributes="<is_causal = 1>", mask=""), opset=23)
    assert "it has no flag for causality" in missed(module, "mha")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (attend("shares = Softmax <axis = 2> (scores)"), "softmax is along axis 2"),
        (attend("x = Add (scores, scores)\n shares = Softmax (x)"), "both, come from a product"),
        (
            attend(inputs="float[N, 2, S, 8] q, float[M, 2, S, 8] k, float[N, 2, S, 8] v"),
            "may differ in batch",
        ),
        (
            attend(inputs="float[N, 2, S, 8] q, float[N, 2, S, 8] k, float[N, 2, T, 8] v"),
            "keys and values may differ in length",
        ),
        (
            attend(inputs="float[N, 2, S, 8] q, float[N, 2, S, 8] k, float[N, H, S, 8] v"),
            "heads and sizes of the values are not known",
        ),
        (
            attend(inputs="float[N, 2, S, 8] q, float[N, 2, S, 8] k, float[N, 1, S, 8] v"),
            "not shared alike",
        ),
        (
            attend(
                "x = Add (scores, bias)\n shares = Softmax (x)",
                inputs=HEADS + ", float[M, 1, S, S] bias",
            ),
            "is not known to keep their shape",
        ),
        (
            attend(
                "x = Add (scores, bias)\n z = Mul (x, scale)\n shares = Softmax (z)",
                inputs=HEADS + ", float[N, 1, S, S] bias",
            ),
            "scaled after their mask",
        ),
        (
            attend(
                "x = Where (seen, scores, low)\n shares = Softmax (x)",
                inputs=HEADS + ", bool[N, 1, 1, S] seen",
                constants="float low = {-10000}",
            ),
            "rows that are hidden as a whole may differ: scores become -10000",
        ),
    ],
)
def test_near_misses(module: Module, reason: str) -> None:
    assert reason in missed(module)


def test_shares_read_elsewhere_stay() -> None:
    module = module_of(
        f"g ({HEADS}) => (float[N, 2, S, 8] y, float[N, 2, S, S] shares) {{"
        "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n scores = MatMul (q, kt)\n"
        "shares = Softmax (scores)\n y = MatMul (shares, v) }"
    )
    assert missed(module) == ""


def test_explain_shows_node_and_reason_and_require_match_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "turned.onnx"
    onnx.save(ir.to_proto(attend("shares = Softmax <axis = 2> (scores)").model), file)
    words = [str(file), "-p", "fuse-attention"]
    assert main([*words, "--explain=fuse-attention"]) == 0
    told = "".join(capsys.readouterr())
    assert "Softmax -> 'shares'" in told
    assert "softmax is along axis 2, not along the keys" in told
    assert main([*words, "--require-match=fuse-attention:1"]) != 0
