"""Going through a model in stages: every node once, weights replaced on the way are seen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.stages import Stages
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]

TEXT = """g (float[b, 4] x, bool c) => (float[b, 4] y)
    <float[4, 4] w = {1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 1, 0, 0, 1}, float[4] v = {1, 2, 3, 4}>
    { table = Neg (v)
      a = MatMul (x, w)
      skip = Add (x, table)
      r = Relu (a)
      d = MatMul (r, w)
      e = If (c) <then_branch = t () => (float[b, 4] p) { p = Add (d, skip) },
                  else_branch = o () => (float[b, 4] q) { q = Sub (d, table) }>
      unread = Exp (e)
      f = MatMul (e, w)
      y = Add (f, unread) }"""

FEEDS = [
    {"x": np.arange(n * 4, dtype=np.float32).reshape(n, 4) - 5, "c": np.array(n % 2 == 0)}
    for n in (2, 3, 1)
]


def context(module: Module, ran: list[str], max_memory: int | None = None) -> PassContext:
    def counting(stage: Module, expose: Sequence[str] = ()) -> AbstractContextManager[Any]:
        ran.extend(node.outputs[0].name or "" for node in stage.graph)
        return make_runner(stage, expose)

    return PassContext(
        AnalysisManager(module), source="p", make_runner=counting,
        calibration=lambda module: FEEDS, max_memory=max_memory,
    )  # fmt: skip


def values(module: Module, *names: str) -> list[ir.Value]:
    outputs = {value.name: value for node in module.graph for value in node.outputs}
    return [outputs[name] for name in names]


@pytest.mark.parametrize("max_memory", [None, 1])
def test_each_stop_is_what_a_whole_run_gives(
    max_memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lwc.calibration.stages._SPILLED", 1)
    module, ran = module_of(TEXT), list[str]()
    stops = values(module, "a", "r", "skip", "e")
    stages = Stages(module, stops, context(module, ran, max_memory))
    assert stages.feeds == 3
    for stop in stops:
        found = list(stages.activations(stop))
        with make_runner(module, [stop.name or ""]) as runner:
            wanted = [runner.run(feed, [stop.name or ""])[stop.name or ""] for feed in FEEDS]
        assert all(map(np.array_equal, found, wanted))
    # Constants may run again; what no stop needs does not run.
    varying = [name for name in ran if name != "table"]
    assert sorted(varying) == ["a", "d", "e", "r", "skip"]


def test_weights_replaced_on_the_way_are_seen_from_there_on() -> None:
    module = module_of(TEXT)
    first, second = values(module, "r", "e")
    stages = Stages(module, [first, second], context(module, []))
    before = list(stages.activations(first))
    module.replace_initializer(module.graph.initializers["w"], ir.Tensor(2 * np.eye(4, dtype="f")))
    after = list(stages.activations(second))
    for r, e, feed in zip(before, after, FEEDS, strict=True):
        other = feed["x"] - [1, 2, 3, 4] if feed["c"] else np.array([1, 2, 3, 4])
        np.testing.assert_allclose(e, 2 * r + other)


def test_a_value_that_is_divided_stays_so() -> None:
    module = module_of(TEXT)
    first, second = values(module, "r", "d")
    stages = Stages(module, [first, second], context(module, []))
    plain = list(stages.activations(first))
    stages.divide(first, np.array([1.0, 2, 4, 8]))
    weight = np.asarray(module.graph.initializers["w"].const_value)
    for r, d in zip(plain, stages.activations(second), strict=True):
        np.testing.assert_allclose(d, (r / [1, 2, 4, 8]) @ weight, rtol=1e-6)


def test_a_stop_that_is_an_input() -> None:
    module = module_of(TEXT)
    x = module.graph.inputs[0]
    found = list(Stages(module, [x], context(module, [])).activations(x))
    assert all(np.array_equal(a, feed["x"]) for a, feed in zip(found, FEEDS, strict=True))


def test_what_is_not_finite_is_named() -> None:
    module = module_of("g (float[b, 4] x, bool c) => (float[b, 4] y) { a = Log (x) y = Neg (a) }")
    (stop,) = values(module, "a")
    with pytest.raises(InputError, match="'a' is not finite"):
        list(Stages(module, [stop], context(module, [])).activations(stop))


def test_the_feed_that_cannot_be_run_is_named() -> None:
    module = module_of(
        "g (int64[n] i) => (float[n] y) <float[3] t = {1, 2, 3}> { a = Gather (t, i) y = Neg (a) }"
    )
    ctx = context(module, [])
    ctx.calibration = lambda module: [{"i": np.array([2, last])} for last in (0, 3)]
    (stop,) = values(module, "a")
    with pytest.raises(LwcError, match=r"feed 2 of the calibration data: .*idx=3"):
        list(Stages(module, [stop], ctx).activations(stop))


def test_there_must_be_data() -> None:
    module = module_of(TEXT)
    ctx = context(module, [])
    ctx.calibration = lambda module: []
    with pytest.raises(InputError, match="no feeds"):
        Stages(module, values(module, "a"), ctx)
    assert run_plain(module, FEEDS[0])


@pytest.mark.parametrize(
    ("feed", "reason"),
    [
        ({"x": FEEDS[0]["x"]}, "lacks input 'c'"),
        ({**FEEDS[0], "z": FEEDS[0]["x"]}, "has 'z', which is no input"),
    ],
)
def test_feeds_have_the_inputs_of_the_model(feed: dict[str, Array], reason: str) -> None:
    module = module_of(TEXT)
    ctx = context(module, [])
    ctx.calibration = lambda module: [feed]
    with pytest.raises(InputError, match=f"{reason}.*the inputs are x, c"):
        Stages(module, values(module, "a"), ctx)


def test_an_input_with_a_default_is_what_is_fed() -> None:
    module = module_of("g (float[b, 4] x) => (float[b, 4] y) { a = Neg (x) y = Abs (a) }")
    default = ir.Tensor(np.ones((1, 4), np.float32), name="x")
    module.graph.inputs[0].const_value = default
    module.graph.register_initializer(module.graph.inputs[0])
    (stop,) = values(module, "a")
    fed = np.full((2, 4), 3, np.float32)
    ctx = context(module, [])
    ctx.calibration = lambda module: [{"x": fed}]
    (found,) = Stages(module, [stop], ctx).activations(stop)
    np.testing.assert_array_equal(found, -fed)


def test_what_is_kept_lies_in_files_only_where_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lwc.calibration.stages._SPILLED", 1)
    module = module_of(TEXT)
    x = module.graph.inputs[0]
    for bound in (None, 1):
        found = next(Stages(module, [x], context(module, [], bound)).activations(x))
        assert isinstance(found, np.memmap) == (bound is not None)


def test_what_an_earlier_stage_made_on_the_way_is_not_made_again() -> None:
    """And after the last stop nothing is kept."""
    module, ran = (
        module_of(
            """g (float[b, 4] x, bool c) => (float[b, 4] y)
        { p = Neg (x) a = Abs (p) q = Add (p, a) y = Relu (q) }"""
        ),
        list[str](),
    )
    first, second = values(module, "a", "q")
    stages = Stages(module, [first, second], context(module, ran))
    list(stages.activations(first))
    for found, feed in zip(stages.activations(second), FEEDS, strict=True):
        np.testing.assert_array_equal(found, np.abs(feed["x"]) - feed["x"])
    assert ran == ["p", "a", "q"]
    assert not any(stages._kept)
    stages.divide(first, np.ones(4))  # it is no longer kept


@pytest.mark.parametrize("name", ["x", "a"])
def test_the_feed_that_is_not_finite_is_counted_from_one(name: str) -> None:
    module = module_of("g (float[b, 4] x, bool c) => (float[b, 4] y) { a = Neg (x) y = Abs (a) }")
    stop = module.graph.inputs[0] if name == "x" else values(module, "a")[0]
    broken = FEEDS[1]["x"].copy()
    broken[1, 2] = np.nan
    ctx = context(module, [])
    ctx.calibration = lambda module: [FEEDS[0], {**FEEDS[1], "x": broken}]
    with pytest.raises(InputError, match=f"'{name}' is not finite on feed 2"):
        list(Stages(module, [stop], ctx).activations(stop))


def test_an_input_with_a_default_need_not_be_fed() -> None:
    module = module_of("g (float[b, 4] x, float[4] z) => (float[b, 4] y) { y = Add (x, z) }")
    default = ir.Tensor(np.arange(4, dtype=np.float32), name="z")
    module.graph.inputs[1].const_value = default
    module.graph.register_initializer(module.graph.inputs[1])
    ctx = context(module, [])
    ctx.calibration = lambda module: [{"x": FEEDS[0]["x"]}]
    (stop,) = values(module, "y")
    (found,) = Stages(module, [stop], ctx).activations(stop)
    np.testing.assert_array_equal(found, FEEDS[0]["x"] + np.arange(4))


def test_a_weight_that_is_read_through_a_node_is_seen_when_it_is_replaced() -> None:
    module = module_of(
        """g (float[b, 4] x, bool c) => (float[b, 4] y)
        <float[4, 4] w = {1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 1, 0, 0, 1}>
        { t = Transpose (w) a = MatMul (x, t) y = MatMul (a, t) }"""
    )
    first, second = values(module, "a", "y")
    stages = Stages(module, [first, second], context(module, []))
    before = list(stages.activations(first))
    module.replace_initializer(module.graph.initializers["w"], ir.Tensor(2 * np.eye(4, dtype="f")))
    for a, y in zip(before, stages.activations(second), strict=True):
        np.testing.assert_array_equal(y, 2 * a)
