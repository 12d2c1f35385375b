"""Evaluation: perplexity, latency, memory, size and agreement against closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import lwc
from lwc.backends.onnxruntime.custom_operators import library_file
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.evaluate.agreement import agreement, output_agreement
from lwc.evaluate.latency import compare_latency, latency
from lwc.evaluate.memory import file_size, peak_memory
from lwc.evaluate.perplexity import perplexity

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
VOCABULARY = 17


def parse(text: str) -> Module:
    return Module(ir.from_onnx_text(HEADER + text))


def table_model(table: np.ndarray, index: str) -> Module:
    """A language model whose logits are the rows of `table` at the ids or the positions."""
    module = parse(
        "g (int64[batch, sequence] input_ids, int64[batch, sequence] position_ids)"
        f" => (float[batch, sequence, {VOCABULARY}] logits) <float[{VOCABULARY}, 1] known = "
        f"{{{', '.join('0' * VOCABULARY)}}}>\n"
        "{ zero = Gather(known, input_ids) rows = Gather(known, input_ids) "
        "logits = Add(rows, zero) }"
    )
    gather = module.graph[1]
    gather.replace_input_with(0, module.add_initializer("table", table.astype(np.float32)))
    gather.replace_input_with(1, module.graph.inputs[1 if index == "position_ids" else 0])
    return module


def tokens(text: str) -> Sequence[int]:
    return [int(word) for word in text.split()]


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, 60)


def nll(table: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = table.astype(np.float32).astype(np.float64)[rows]
    losses: np.ndarray = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(rows)), targets]
    return losses


@pytest.mark.parametrize(("window", "stride"), [(512, 512), (7, 7), (7, 3), (1, 1)])
def test_perplexity_of_a_bigram_model(ids: np.ndarray, window: int, stride: int) -> None:
    table = np.random.default_rng(1).standard_normal((VOCABULARY, VOCABULARY)) * 3
    found = perplexity(
        table_model(table, "input_ids"), tokens, " ".join(map(str, ids)), window=window,
        stride=stride,
    )  # fmt: skip
    expected = nll(table, ids[:-1], ids[1:])
    np.testing.assert_allclose(found.nll_per_token, expected, rtol=1e-5)
    assert found.tokens == 59
    assert found.value == pytest.approx(math.exp(expected.mean()), rel=1e-6)


def test_overlapping_windows_score_the_positions_no_earlier_window_covered(ids: np.ndarray) -> None:
    table = np.random.default_rng(1).standard_normal((8, VOCABULARY)) * 3
    found = perplexity(
        table_model(table, "position_ids"), tokens, " ".join(map(str, ids[:13])), window=6, stride=2
    )
    positions = np.array([0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5])
    np.testing.assert_allclose(found.nll_per_token, nll(table, positions, ids[1:13]), rtol=1e-5)


def test_uniform_logits_have_the_vocabulary_as_perplexity(ids: np.ndarray) -> None:
    model = table_model(np.full((VOCABULARY, VOCABULARY), 80.0), "input_ids")
    found = perplexity(model, tokens, " ".join(map(str, ids)), max_tokens=10)
    assert found.tokens == 9
    assert found.value == pytest.approx(VOCABULARY)


def test_paired_ratio(ids: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((VOCABULARY, VOCABULARY))
    text = " ".join(map(str, ids))
    first = perplexity(table_model(table, "input_ids"), tokens, text)
    second = perplexity(
        table_model(table + 0.1 * rng.standard_normal(table.shape), "input_ids"), tokens, text
    )
    ratio = second.over(first)
    difference = second.nll_per_token - first.nll_per_token
    assert ratio.ratio == pytest.approx(second.value / first.value)
    assert ratio.standard_error == pytest.approx(
        ratio.ratio * difference.std(ddof=1) / math.sqrt(59)
    )
    with pytest.raises(ValueError, match="same text"):
        first.over(perplexity(table_model(table, "input_ids"), tokens, text, max_tokens=9))


def test_perplexity_errors() -> None:
    table = np.zeros((VOCABULARY, VOCABULARY))
    with pytest.raises(InputError, match="at least two tokens"):
        perplexity(table_model(table, "input_ids"), tokens, "3")
    encoder = parse(
        "g (int64[b, s] a) => (float[b, s, 2] y)"
        " <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = Gather(w, a) }"
    )
    with pytest.raises(LwcError, match="no logits of 2 tokens with ids up to 2"):
        perplexity(encoder, tokens, "0 1 2")


def squares(size: int) -> Module:
    module = parse(f"g (float[n, {size}] x) => (float[n, {size}] y) {{ y = MatMul(x, x) }}")
    weight = module.add_initializer("w", np.eye(size, dtype=np.float32))
    module.graph[0].replace_input_with(1, weight)
    return module


def test_latency() -> None:
    feed = {"x": np.ones((4, 64), np.float32)}
    found = latency(squares(64), feed, runs=11, warmup=1, threads=1)
    assert 0 < found.p10 <= found.median <= found.p90
    assert found.first > 0
    assert found.runs == 11


def test_compare_latency_takes_turns_and_gives_ratios() -> None:
    heavy = parse("g (float[n, 64] x) => (float[n, 64] y) { y = Identity(x) }")
    graph, value = heavy.graph, heavy.graph.inputs[0]
    weight = heavy.add_initializer("w", np.eye(64, dtype=np.float32))
    for _ in range(64):
        node = ir.Node("", "MatMul", [value, weight])
        graph.insert_before(graph[-1], node)
        value = node.outputs[0]
    graph[-1].replace_input_with(0, value)
    backend = OnnxRuntimeBackend()
    with (
        backend.compile(squares(64), threads=1) as small,
        backend.compile(heavy, threads=1) as big,
    ):
        feed = {"x": np.ones((64, 64), np.float32)}
        found = compare_latency({"small": (small, feed), "big": (big, feed)}, rounds=5, repeats=2)
    assert found.ratios["small"].median == 1
    assert found.ratios["big"].median > 4
    assert found.latencies["big"].runs == 5


def test_peak_memory_sees_the_activations_of_each_run(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    model = parse(
        "g (int64[1] n) => (float y) <float one = {1}, float[0] none = {}>\n"
        "{ big = Expand(one, n) y = ReduceSum<keepdims = 0>(big) }"
    ).model
    ir.save(model, file)
    feeds = [{"n": np.array([count])} for count in (1, 32 << 20)]
    found = peak_memory(file, feeds, threads=1, arena=False, memory_pattern=False, optimize="none")
    assert 0 < found.baseline <= found.session
    small, big = found.runs
    assert big.peak - small.resident == pytest.approx(128 << 20, rel=0.05)
    assert small.peak - found.session < 16 << 20
    assert found.peak == big.peak


@pytest.mark.skipif(library_file() is None, reason="the native operators were not built")
def test_peak_memory_is_that_of_the_native_operators(tmp_path: Path) -> None:
    """As functions they would hold the weights as floats: 32 MB and more."""
    module = parse("g (float[n,4096] x) => (float[n,2048] y) { y = MatMul(x, x) }")
    weight = np.random.default_rng(0).standard_normal((4096, 2048)).astype(np.float32)
    module.graph[0].replace_input_with(1, module.add_initializer("w", weight))
    lwc.optimize(module, "quantize-weights{format=lwc}").save(tmp_path / "m.onnx")
    peak = peak_memory(tmp_path / "m.onnx", [{"x": np.ones((1, 4096), np.float32)}], threads=1)
    assert peak.peak - peak.baseline < 24e6


def test_peak_memory_takes_any_input(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    ir.save(
        parse(
            "g (float[n] file, string[n] text) => (float[n] y, string[n] z)\n"
            "{ y = Neg(file) z = Identity(text) }"
        ).model,
        file,
    )
    feed = {"file": np.ones(3, np.float32), "text": np.full(3, "light", object)}
    assert len(peak_memory(file, [feed], threads=1).runs) == 1


def test_peak_memory_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        peak_memory(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_text("text")
    with pytest.raises(LwcError, match=r"bad\.onnx: the measuring process failed"):
        peak_memory(tmp_path / "bad.onnx")


def test_file_size_counts_external_data_once(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    model = squares(64).model
    ir.save(model, file, external_data="m.data", size_threshold_bytes=0)
    (tmp_path / "other").write_bytes(b"12345")
    expected = file.stat().st_size + (tmp_path / "m.data").stat().st_size
    assert expected > 64 * 64 * 4
    assert file_size(file) == expected
    assert file_size(tmp_path) == expected + 5
    (tmp_path / "m.data").unlink()
    with pytest.raises(InputError, match=r"'m\.data' is missing"):
        file_size(file)


def test_output_agreement_in_closed_form() -> None:
    found = output_agreement(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 0.0]]))
    assert found.elements == 4
    assert found.max_error == 1
    assert found.mean_error == 0.5
    assert found.relative_error == pytest.approx(math.sqrt(2) / 5)
    assert found.cosine == pytest.approx(24 / 25)
    assert found.top1 == 0.5
    assert found.nonfinite == 0


def test_output_agreement_with_nan_and_infinity() -> None:
    left = np.array([np.nan, np.inf, np.inf, 1.0, 2.0])
    right = np.array([np.nan, np.inf, -np.inf, np.nan, 2.5])
    found = output_agreement(left, right)
    assert found.nonfinite == 2
    assert found.max_error == 0.5
    assert found.mean_error == 0.5


@pytest.mark.parametrize(
    ("left", "right", "cosine", "relative"),
    [([0, 0], [0, 0], 1, 0), ([0, 0], [1, 0], 0, math.inf), ([1, 0], [-1, 0], -1, 2)],
)
def test_output_agreement_at_zero(
    left: list[float], right: list[float], cosine: float, relative: float
) -> None:
    found = output_agreement(np.array(left, float), np.array(right, float))
    assert (found.cosine, found.relative_error) == (cosine, relative)


def test_agreement_over_feeds() -> None:
    plus = parse("g (float[n, 2] x) => (float[n, 2] y) { y = Identity(x) }")
    minus = parse("g (float[n, 2] x) => (float[n, 2] y) { y = Neg(x) }")
    feeds = [{"x": np.full((n, 2), n, np.float32)} for n in (1, 2)]
    found = agreement(plus, minus, feeds)
    assert found.feeds == 2
    assert found.outputs["y"].elements == 6
    assert found.outputs["y"].max_error == 4
    assert found.outputs["y"].mean_error == pytest.approx((2 * 2 + 4 * 4) / 6)
    assert found.outputs["y"].cosine == pytest.approx(-1)


def test_agreement_errors() -> None:
    plus = parse("g (float[n, 2] x) => (float[n, 2] y) { y = Identity(x) }")
    other = parse("g (float[n, 2] x) => (float[n, 2] z) { z = Identity(x) }")
    flat = parse("g (float[n, 2] x) => (float[m] y) <int64[1] s = {-1}> { y = Reshape(x, s) }")
    feeds = [{"x": np.ones((1, 2), np.float32)}]
    with pytest.raises(LwcError, match="'y' is missing"):
        agreement(plus, other, feeds)
    with pytest.raises(LwcError, match=r"shape \[2\] after and \[1, 2\] before"):
        agreement(plus, flat, feeds)


def test_perplexity_beyond_the_range_of_floats(ids: np.ndarray) -> None:
    table = np.zeros((VOCABULARY, VOCABULARY))
    table[:, 0] = 1e4
    text = " ".join(str(one) for one in ids if one)
    flat = table_model(np.zeros((VOCABULARY, VOCABULARY)), "input_ids")
    found = perplexity(table_model(table, "input_ids"), tokens, text)
    assert found.value == math.inf
    assert found.over(perplexity(flat, tokens, text)).ratio == math.inf


def test_outputs_of_nan_alone_do_not_agree() -> None:
    found = output_agreement(np.array([[3.0, 1.0]] * 2), np.full((2, 2), np.nan))
    assert (found.cosine, found.top1, found.nonfinite) == (0, 0, 4)
    same = output_agreement(np.full((2, 2), np.nan), np.full((2, 2), np.nan))
    assert (same.cosine, same.top1, same.nonfinite) == (1, 1, 0)
