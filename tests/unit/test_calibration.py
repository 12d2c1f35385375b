"""Calibration: statistics of streams, data from files, values collected within a bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.collect import checked_feeds, collect
from lwc.calibration.data import CalibrationFile, as_calibration
from lwc.calibration.inputs import InputRole, RoleKind, embedded_ids, input_role
from lwc.calibration.statistics import AbsMax, Gram, Histogram, MeanAbs
from lwc.core.errors import InputError, LwcError, UsageError
from lwc.core.module import Module
from lwc.optimizer import optimize
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]

IDS = """g (int64[batch, sequence] ids) => (float[batch, sequence, 4] y)
    <float[7, 4] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
     21, 22, 23, 24, 25, 26, 27}>
    { y = Gather (table, ids) }"""

NUMBERS = """g (float[batch, 4] x) => (float[batch, 4] y)
    { a = Abs (x) b = Neg (a) c = Relu (b) y = Add (c, x) }"""


def batches(seed: int, sizes: list[int]) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((rows, 3)).astype(np.float32) * (rows + 1) for rows in sizes]


@given(st.integers(0, 99), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_streams_are_like_the_whole(seed: int, sizes: list[int]) -> None:
    """Sums of float32 products differ in their order: 1e-5 relative."""
    parts = batches(seed, sizes)
    whole = np.concatenate(parts)
    largest, mean, gram = AbsMax(), MeanAbs(), Gram()
    for part in parts:
        for each in (largest, mean, gram):
            each.update(part)
    np.testing.assert_array_equal(largest.value, np.abs(whole).max(axis=0, initial=0))
    assert gram.rows == mean.rows == len(whole)
    if len(whole):
        np.testing.assert_allclose(mean.value, np.abs(whole).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(gram.value, whole.T @ whole, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 99), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_histograms_count_every_magnitude_in_its_bin(seed: int, sizes: list[int]) -> None:
    parts = batches(seed, sizes)
    whole = np.abs(np.concatenate(parts)).ravel()
    made = Histogram(64)
    for part in parts:
        made.update(part)
    assert made.counts.sum() == whole.size
    if whole.size:
        edges = np.linspace(0, made.limit, 65)
        wanted, _ = np.histogram(whole.astype(np.float64), edges)
        # A magnitude on an edge may be rounded into the bin beside it.
        assert np.abs(np.cumsum(made.counts) - np.cumsum(wanted)).max() <= 1
        assert made.limit / 2 <= whole.max() <= made.limit or len(parts) > 1
        assert made.percentile(1.0) >= whole.max() * (1 - 1e-6)
        width = made.limit / 64
        assert made.percentile(0.5) == pytest.approx(
            np.quantile(whole, 0.5, method="inverted_cdf"), abs=width * 1.001
        )


def test_products_stay_positive_where_means_are_large() -> None:
    """Means of a batch 10,000 times the spread: float32 products are off by 1e6 and more."""
    random = np.random.default_rng(0)
    parts = [random.standard_normal((500, 40)) + 1e4 * random.standard_normal(40) for _ in range(3)]
    made = Gram()
    wanted = np.zeros((40, 40))
    for part in (each.astype(np.float32) for each in parts):
        made.update(part)
        wanted += part.T.astype(np.float64) @ part.astype(np.float64)
    found = np.linalg.eigvalsh(made.value)
    assert found[0] == pytest.approx(np.linalg.eigvalsh(wanted)[0], rel=1e-4)
    np.linalg.cholesky(made.value)
    np.testing.assert_array_equal(made.value, made.value.T)


def test_channels_of_zeros_stay_exactly_zero() -> None:
    made = Gram()
    for seed in range(3):
        rows = np.random.default_rng(seed).standard_normal((7, 4)).astype(np.float32) + 3
        rows[:, 2] = 0
        made.update(rows)
    assert not made.value[2].any()
    assert not made.value[:, 2].any()


def test_batches_without_rows_or_channels() -> None:
    for made in (AbsMax(), MeanAbs(), Gram()):
        made.update(np.zeros((2, 0, 4), np.float32))
        assert made.value.shape[-1] == 4
        assert not made.value.any()
        made.update(np.ones((1, 4), np.float32))
        assert made.value.any()
    empty = AbsMax()
    empty.update(np.zeros((3, 0), np.float32))
    assert empty.value.shape == (0,)


def test_a_scalar_has_one_channel() -> None:
    made = AbsMax()
    made.update(np.array(-3.0, np.float32))
    assert made.value.tolist() == [3]


@pytest.mark.parametrize("bins", [1, 2, 7, 8, 33])
def test_any_number_of_bins_may_be_halved(bins: int) -> None:
    """A range that doubles three times: each magnitude lies in its bin of the last range."""
    numbers = np.array([0.1, 0.9, 1.7, 6.9])
    made, whole = Histogram(bins), Histogram(bins)
    made.limit, whole.limit = 1.0, 8.0
    made.update(numbers[:2])
    made.update(numbers[2:])
    assert made.limit == 8.0
    whole.update(numbers)
    np.testing.assert_array_equal(made.counts, whole.counts)


@pytest.mark.parametrize("bins", [7, 100, 2048])
@pytest.mark.parametrize("levels", [3, 7, 127])
def test_clipping_points_of_one_value_and_of_zeros(bins: int, levels: int) -> None:
    """One magnitude is what there is to represent: it is clipped by less than a bin."""
    made, zeros, empty = Histogram(bins), Histogram(bins), Histogram(bins)
    made.update(np.full(50, 3.0))
    zeros.update(np.zeros(50))
    assert made.entropy(levels) == 3.0
    assert made.percentile(0.5) == 3.0
    assert 3.0 * (1 - 1 / bins) - 1e-9 <= made.least_squares(levels) <= 3.0
    for other in (zeros, empty):
        assert other.entropy(levels) == other.least_squares(levels) == other.percentile(0.5) == 0


def test_entropy_may_keep_the_whole_range() -> None:
    """Evenly spread magnitudes with as many at the top: nothing is to be clipped."""
    made = Histogram(2048)
    made.update(np.append(np.linspace(0, 1, 4096), np.ones(4096)))
    assert made.entropy(127) == 1.0


def test_a_histogram_of_zeros() -> None:
    made = Histogram(8)
    made.update(np.zeros(5, np.float32))
    assert (made.counts[0], made.percentile(1.0)) == (5, 0.0)
    made.update(np.array([3.0], np.float32))
    assert (made.counts.sum(), made.counts[0], made.counts[-1]) == (6, 5, 1)


def test_clipping_points() -> None:
    """A normal distribution and one outlier: both methods clip the outlier off, absmax cannot."""
    random = np.random.default_rng(0)
    numbers = np.append(random.standard_normal(100_000), 60.0)
    made = Histogram()
    made.update(numbers)

    def error(clip: float) -> float:
        step = clip / 7
        rounded = np.clip(np.round(numbers / step), -7, 7) * step
        return float(((numbers - rounded) ** 2).mean())

    chosen = made.least_squares(7)
    best = min((error(clip), clip) for clip in np.linspace(0.5, 60, 400))
    assert error(chosen) <= 1.05 * best[0]
    assert made.entropy(128) < 12
    assert made.percentile(0.999) == pytest.approx(3.29, abs=0.1)
    with pytest.raises(ValueError, match="share"):
        made.percentile(0.0)


def test_token_ids_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text("[1, 2, 3]\n\n" + json.dumps({"ids": [[4, 5], [6, 0]]}) + "\n")
    found = list(CalibrationFile(path).feeds(module_of(IDS)))
    assert [feed["ids"].tolist() for feed in found] == [[[1, 2, 3]], [[4, 5], [6, 0]]]
    assert all(feed["ids"].dtype == np.int64 for feed in found)
    assert len(list(CalibrationFile(path, samples=1).feeds(module_of(IDS)))) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1, 2", "line 2 is no feed"),
        ("[1.5]", "it is no list of integers"),
        ("[]", "it is no list of integers"),
        ('{"x": [1]}', "'x' is no input of the model"),
        ("7", "neither a list nor an object"),
        ('{"ids": [[1.7]]}', "'ids' takes int64, not float64"),
        ('{"ids": [["1"]]}', "'ids' takes int64"),
        ("[" * 100_000, "line 2 is no feed"),
        ('{"ids": [[1], [2, 3]]}', "line 2 is no feed"),
    ],
)
def test_bad_lines(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text(f"[1]\n{line}\n")
    with pytest.raises(InputError, match=reason) as caught:
        list(CalibrationFile(path).feeds(module_of(IDS)))
    assert "ids.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1, 9]", "line 3 gives input 'ids' the id 9 (its ids are 0 to 6, "),
        (
            '{"ids": [1]}',
            "line 3 gives input 'ids' an array of shape [1] (feed int64 [batch, sequence])",
        ),
        ("{}", "line 3 lacks input 'ids' (the inputs are ids)"),
    ],
)
def test_lines_that_do_not_fit_are_told_by_file_and_line(
    line: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text(f"[1]\n\n{line}\n")
    module = module_of(IDS)
    with pytest.raises(InputError) as caught:
        list(checked_feeds(module, context(module, list(CalibrationFile(path).feeds(module)))))
    assert str(caught.value).startswith(f"{path}: {told}")


def test_files_that_do_not_fit_are_told_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3), np.float32))
    module = module_of(NUMBERS)
    with pytest.raises(InputError) as caught:
        list(checked_feeds(module, context(module, list(CalibrationFile(tmp_path).feeds(module)))))
    told = f"{tmp_path / 'a.npz'}: it gives input 'x' an array of shape [2, 3]"
    assert str(caught.value).startswith(told)


def test_ids_for_a_model_that_takes_none_are_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text("\n[1]\n")
    with pytest.raises(InputError, match=r"ids.jsonl: line 2 .*: the model takes no token ids"):
        list(CalibrationFile(path).feeds(module_of(NUMBERS)))
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"ids.jsonl: none of its 2 lines is a feed \(a line is"):
        list(CalibrationFile(path).feeds(module_of(NUMBERS)))


@pytest.mark.parametrize("name", ["x.onnx", "x.onnxtxt", "X.GGUF"])
def test_a_model_is_no_calibration_data(name: str) -> None:
    with pytest.raises(UsageError, match=rf"'{name}' is a model, not calibration data \(give an"):
        CalibrationFile(name)


def test_text_is_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456012")

    def tokenize(text: str) -> list[int]:
        return [int(each) for each in text]

    module = module_of(IDS)
    found = list(CalibrationFile(path, tokenize, window=4).feeds(module))
    assert [feed["ids"].tolist() for feed in found] == [[[0, 1, 2, 3]], [[4, 5, 6, 0]]]
    (short,) = CalibrationFile(path, tokenize, window=50).feeds(module)
    assert short["ids"].shape == (1, 10)
    path.write_text("")
    with pytest.raises(InputError, match="no tokens"):
        list(CalibrationFile(path, tokenize).feeds(module))
    with pytest.raises(UsageError, match="no tokenizer"):
        list(CalibrationFile(path).feeds(module))


def test_arrays_from_files(tmp_path: Path) -> None:
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", x=np.full((2, 4), number, np.float32))
    found = list(CalibrationFile(tmp_path).feeds(module_of(NUMBERS)))
    assert [feed["x"][0, 0] for feed in found] == [0, 1, 2]
    assert len(list(CalibrationFile(tmp_path / "1.npz").feeds(module_of(NUMBERS)))) == 1
    with pytest.raises(InputError, match="no such file"):
        list(CalibrationFile(tmp_path / "4.npz").feeds(module_of(NUMBERS)))


def test_what_is_calibration_data(tmp_path: Path) -> None:
    feeds = [{"x": np.zeros((1, 4), np.float32)}]
    module = module_of(NUMBERS)
    assert list(as_calibration(feeds).feeds(module)) == feeds
    assert list(as_calibration(iter(feeds)).feeds(module)) == feeds
    given = CalibrationFile(tmp_path)
    assert as_calibration(given) is given
    for wrong in (3, feeds[0], ["a"]):
        with pytest.raises(UsageError, match="no calibration data"):
            as_calibration(wrong)  # type: ignore[arg-type]


def context(module: Module, feeds: list[dict[str, Array]], limit: int | None = None) -> PassContext:
    return PassContext(
        AnalysisManager(module),
        make_runner=make_runner,
        max_memory=limit,
        calibration=lambda module: feeds,
    )


@pytest.mark.parametrize(("limit", "runs"), [(None, 1), (10_000, 1), (2 * 5 * 4 * 4, 2), (1, 3)])
def test_values_within_a_bound(limit: int | None, runs: int) -> None:
    module = module_of(NUMBERS)
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((5, 4)).astype(np.float32)} for _ in range(3)]
    opened: list[list[str]] = []
    ctx = context(module, feeds, limit)

    def runner(made: Module, expose: Any) -> Any:
        opened.append(list(expose))
        return make_runner(made, expose)

    ctx.make_runner = runner
    values = {
        node.outputs[0]: (AbsMax(), MeanAbs()) for node in module.graph if node.op_type != "Add"
    }
    assert collect(module, values, ctx) == 3
    assert len(opened) == runs
    assert sorted(name for names in opened for name in names) == ["a", "b", "c"]
    whole = np.concatenate([feed["x"] for feed in feeds])
    for value, (largest, mean) in values.items():
        wanted = np.zeros_like(whole) if value.name == "c" else np.abs(whole)
        np.testing.assert_array_equal(largest.value, wanted.max(axis=0))
        np.testing.assert_allclose(mean.value, wanted.mean(axis=0), rtol=1e-6)


def test_the_largest_feed_bounds_what_is_fetched() -> None:
    """Two values of 5 rows fit, of 50 rows one: whichever feed comes first."""
    module = module_of(NUMBERS)
    feeds = [{"x": np.ones((rows, 4), np.float32)} for rows in (5, 50, 5)]
    opened: list[list[str]] = []
    ctx = context(module, feeds, 2 * 5 * 4 * 4)

    def runner(made: Module, expose: Any) -> Any:
        opened.append(list(expose))
        return make_runner(made, expose)

    ctx.make_runner = runner
    collect(module, {node.outputs[0]: [AbsMax()] for node in list(module.graph)[:3]}, ctx)
    assert opened == [["a"], ["b"], ["c"]]


def test_the_feed_that_cannot_be_run_is_named() -> None:
    """The third is asked for a row that a table of activations does not have."""
    module = module_of("g (float[4, 2] x, int64[n] at) => (float[n, 2] y) { y = Gather (x, at) }")
    x = np.ones((4, 2), np.float32)
    feeds = [{"x": x, "at": np.array([number])} for number in (0, -1, 7)]
    (node,) = module.graph
    with pytest.raises(LwcError, match=r"feed 3 of the calibration data: .*idx=7"):
        collect(module, {node.outputs[0]: (AbsMax(),)}, context(module, feeds))


TABLE = "<float[7, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}>"
SPELLED = {
    "plain": "y = Gather (table, ids)",
    "cast and reshaped": """s = Constant<value_ints = [-1]> () r = Reshape (ids, s)
        c = Cast<to = 6> (r) y = Gather (table, c)""",
    "scaled": "k = Constant<value_float = 2.0> () t = Mul (table, k) y = Gather (t, ids)",
}


@pytest.mark.parametrize("spelled", SPELLED)
def test_an_id_that_its_table_does_not_hold_is_refused(spelled: str) -> None:
    """ONNX takes -1 as the last row."""
    module = module_of(f"g (int64[b, s] ids) => (float y) {TABLE} {{ {SPELLED[spelled]} }}")
    value = module.graph[-1].outputs[0]
    value.shape = None
    for odd in (-100, -1, 7):
        feeds = [{"ids": np.array([[1, number]])} for number in (0, 6, odd)]
        with pytest.raises(InputError) as caught:
            collect(module, {value: (AbsMax(),)}, context(module, feeds))
        assert str(caught.value) == (
            f"feed 3 of the calibration data gives input 'ids' the id {odd} (its ids are 0 to 6, "
            "also where a mask is 0)"
        )
        assert caught.value.exit_code == 2
        assert collect(module, {value: (AbsMax(),)}, context(module, feeds[:2])) == 2


INDICES = {
    "of an activation": "r = Relu (x) y = Gather (r, at)",
    "along another axis": "a = Gather<axis = 1> (table, at) m = ReduceMax (x) y = Add (a, m)",
    "counted from the end": """n = Constant<value_ints = [7]> () s = Add (at, n) t = Mod (s, n)
        a = Gather (table, t) m = ReduceMax (x) y = Add (a, m)""",
    "in part": """z = Constant<value_ints = [0]> () o = Constant<value_ints = [1]> ()
        f = Slice (at, z, o) a = Gather (table, f) m = ReduceMax (x) y = Add (a, m)""",
    "no ids": "c = Cast<to = 1> (at) m = ReduceMax (c) y = Add (x, m)",
}


@pytest.mark.parametrize("spelled", INDICES)
def test_other_integers_may_be_negative(spelled: str) -> None:
    text = f"g (float[4, 2] x, int64[n] at) => (float y) {TABLE} {{ {INDICES[spelled]} }}"
    module = module_of(text)
    value = module.graph[-1].outputs[0]
    value.shape = None
    feeds = [{"x": np.ones((4, 2), np.float32), "at": np.array([0, -1])}]
    assert collect(module, {value: (AbsMax(),)}, context(module, feeds)) == 1


def test_positions_are_known_by_their_name_and_may_be_negative() -> None:
    """As some exporters have them where a mask is 0."""
    module = module_of(f"g (int64[b, s] position_ids) => (float y) {TABLE} "
                       "{ y = Gather (table, position_ids) }")  # fmt: skip
    (given,) = module.graph.inputs
    assert input_role(module, given) == InputRole(RoleKind.POSITIONS, high=6)
    assert embedded_ids(module, given) is None
    value = module.graph[-1].outputs[0]
    value.shape = None
    feeds = [{"position_ids": np.array([[-1, 0]])}]
    assert collect(module, {value: (AbsMax(),)}, context(module, feeds)) == 1


def test_nothing_is_run_where_nothing_is_wanted() -> None:
    module = module_of(NUMBERS)
    for limit in (None, 1):
        assert collect(module, {}, context(module, [], limit)) == 0


def test_an_input_of_unknown_rank_has_values_in_runs_of_their_own() -> None:
    module = module_of(NUMBERS)
    module.graph.inputs[0].shape = None
    for node in module.graph:
        node.outputs[0].shape = None
    made = AbsMax()
    ctx = context(module, [{"x": np.full((2, 4), -3, np.float32)}], 1_000)
    assert collect(module, {module.graph[0].outputs[0]: (made,)}, ctx) == 1
    assert made.value.tolist() == [3, 3, 3, 3]


def test_a_bound_does_not_hide_what_a_feed_lacks() -> None:
    module = module_of(NUMBERS)
    with pytest.raises(LwcError, match="is no input"):
        collect(
            module,
            {module.graph[0].outputs[0]: (AbsMax(),)},
            context(module, [{"z": np.zeros(1)}], 1_000),
        )


def test_one_number_that_is_none_is_enough() -> None:
    module = module_of(NUMBERS)
    feeds = [{"x": np.zeros((1, 4), np.float32)}, {"x": np.array([[0, 1, np.inf, 0]], np.float32)}]
    with pytest.raises(InputError, match="'a' is not finite on feed 2"):
        collect(module, {module.graph[0].outputs[0]: (AbsMax(),)}, context(module, feeds))


def test_what_cannot_be_collected() -> None:
    module = module_of(NUMBERS)
    value = module.graph[0].outputs[0]
    with pytest.raises(InputError, match="no feeds"):
        collect(module, {value: (AbsMax(),)}, context(module, []))
    feeds = [{"x": np.full((1, 4), np.nan, np.float32)}]
    with pytest.raises(InputError, match="'a' is not finite on feed 1"):
        collect(module, {value: (AbsMax(),)}, context(module, feeds))
    ctx = context(module, feeds)
    ctx.calibration = None
    with pytest.raises(UsageError, match="no calibration data"):
        collect(module, {value: (AbsMax(),)}, ctx)
    with pytest.raises(LwcError, match="is no input"):
        collect(module, {value: (AbsMax(),)}, context(module, [{"z": np.zeros(1)}]))


MODEL = """g (int64[b, s] ids) => (float[b, s, 64] y) <float[1] table = {0}, float[1] w = {0}>
    { e = Gather (table, ids) y = MatMul (e, w) }"""


@pytest.mark.parametrize(
    ("feed", "reason"),
    [
        (
            {"ids": np.zeros((1, 0), np.int64)},
            "the calibration data holds no rows for value '[ey]'",
        ),
        (
            {"ids": np.ones((1, 2), np.float32)},
            r"feed 2 .*'ids'.* of type float32 \(feed int64 \[b, s\]\)",
        ),
        ({"ids": np.ones((1, 2), np.int32)}, "feed 2 .*input 'ids'.* of type int32"),
        ({"ids": np.ones(2, np.int64)}, r"feed 2 .*input 'ids'.* of shape \[2\]"),
        ({"ids": np.ones((1, 2), np.int64), "z": np.zeros(1)}, "feed 2 .*has 'z'.* no input"),
        ({}, "feed 2 .* lacks input 'ids'"),
    ],
)
@pytest.mark.parametrize(
    "passes",
    [
        "quantize-weights{method=gptq}",
        "quantize-weights{method=awq}",
        "smooth{0.5 products=true}",
        "smooth-quantize{none activations=static}",
        "llm-int8",
        "mixed-precision{6}",
    ],
)
def test_every_pass_refuses_feeds_that_do_not_fit(
    passes: str, feed: dict[str, Array], reason: str
) -> None:
    module = module_of(MODEL)
    for value, rows in (("table", 100), ("w", 64)):
        content = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        module.replace_initializer(module.graph.initializers[value], ir.Tensor(content))
    empty = not reason.startswith("feed")
    feeds = [feed] if empty else [{"ids": np.ones((1, 2), np.int64)}, feed]
    with pytest.raises(InputError, match=reason):
        optimize(module, passes=passes, calibration=feeds)


def test_one_feed_without_rows_is_none_too_many() -> None:
    module = module_of(NUMBERS)
    feeds = [{"x": np.ones((rows, 4), np.float32)} for rows in (0, 2)]
    assert collect(module, {module.graph[0].outputs[0]: (AbsMax(),)}, context(module, feeds)) == 2


def test_lines_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_bytes(b"[1]\n\xff\xfe[1]\n")
    with pytest.raises(InputError, match="cannot be read: it is not UTF-8 text"):
        list(CalibrationFile(path).feeds(module_of(IDS)))


def test_a_broken_archive(tmp_path: Path) -> None:
    path = tmp_path / "feed.npz"
    path.write_bytes(b"PK\x03\x04garbage")
    with pytest.raises(InputError, match="no feed can be read"):
        list(CalibrationFile(path).feeds(module_of(IDS)))


@pytest.mark.parametrize("content", ["text", "array", "objects"])
def test_what_is_no_archive_of_plain_arrays_gets_one_line_without_advice_to_unpickle(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "feed.npz"
    if content == "text":
        path.write_text("the quick brown fox\n")
    elif content == "array":
        np.save(tmp_path / "feed.npy", np.ones(3))
        (tmp_path / "feed.npy").rename(path)
    else:
        np.savez(path, ids=np.array([{}], dtype=object))
    with pytest.raises(InputError) as caught:
        list(CalibrationFile(path).feeds(module_of(IDS)))
    told = {
        "objects": "no feed can be read: 'ids' is an array of Python objects (store plain arrays)"
    }
    assert str(caught.value) == f"{path}: " + told.get(
        content,
        "no feed can be read: it is no .npz archive (use numpy.savez; a text is not named .npz)",
    )


def test_a_percentile_at_the_edge_of_a_gap() -> None:
    """7 of 100 magnitudes are at 1, the others at 100; 0.07 · 100 is above 7 in floating point."""
    made = Histogram(256)
    made.update(np.array([1.0] * 7 + [100.0] * 93))
    assert made.percentile(0.07) < 2


@pytest.mark.parametrize(
    ("dtype", "numbers", "fits"),
    [
        ("uint8", "[0, 255]", True),
        ("uint8", "[256]", False),
        ("int32", "[5000000000]", False),
        ("bool", "[0, 1]", True),
        ("bool", "[true]", True),
        ("int64", "[true]", False),
        ("float", "[1, 2.5]", True),
        ("float", "[true]", False),
    ],
)
def test_numbers_of_a_line_fit_the_input(
    dtype: str, numbers: str, fits: bool, tmp_path: Path
) -> None:
    path = tmp_path / "feeds.jsonl"
    path.write_text(f'{{"x": {numbers}}}\n')
    module = module_of(f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = Identity (x) }}")
    read = CalibrationFile(path).feeds(module)
    if not fits:
        with pytest.raises(InputError, match="line 1 is no feed"):
            list(read)
        return
    (feed,) = read
    assert feed["x"].tolist() == json.loads(numbers)
