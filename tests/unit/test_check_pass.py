"""check_pass: it finds what is wrong with a pass, makes it small, and can show it again."""

from __future__ import annotations

import inspect
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import strategies as st
from rules_to_check import (
    Double,
    DoubleForgetsConsumers,
    DoubleIgnoresOrder,
    DoubleOfAnything,
)
from support import module_of

import lwc
from lwc.calibration.feed_file import read_feed_spec
from lwc.cli.opt import main
from lwc.core.errors import UsageError
from lwc.core.module import Module
from lwc.passes.cleanup.bind_dims import BindDims
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult
from lwc.pipeline.rule_pass import RulePass
from lwc.rewrite.patterns import PatternRule
from lwc.verify import FeedSpec, Motif, PassBrokenError, Sketch, passes_hold, sketches
from lwc.verify.contract.property import CheckReport, check_pass


def sums(s: Sketch) -> Any:
    """Values added to themselves and to others."""
    x = s.pick()
    return s.emit(s.choose("Add", "Sub"), x, x if s.flip() else s.partner(x))


SUMS = sketches([Motif("sums", sums)], steps=(1, 4))


def test_a_right_pass_holds() -> None:
    report = check_pass(Double, graphs=SUMS, examples=60)
    assert report.examples == 60
    assert report.rewrites["add-itself"] > 20
    assert report.float64 == report.changed
    assert "holds on 60 graphs" in str(report)
    assert "add-itself" in str(report)


class WritesOwnedWeights(Pass):
    """Scales weights in place where their memory lets it."""

    name = "writes-owned-weights"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        for value in module.graph.initializers.values():
            assert value.const_value is not None
            array = value.const_value.numpy()
            if array.dtype == np.float32 and array.flags.writeable:
                array *= 0.5
        return PassResult(False)


class FailsOnce(Pass):
    """Depends on more than the module: on how often it ran."""

    name = "fails-once"
    runs: ClassVar[int] = 0

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        FailsOnce.runs += 1
        if FailsOnce.runs == 5:
            raise ValueError("the fifth run")
        return PassResult(False)


def test_a_pass_that_writes_into_weights_is_found_and_reduced(tmp_path: Path) -> None:
    with pytest.raises(PassBrokenError) as caught:
        check_pass(WritesOwnedWeights, examples=200, folder=tmp_path)
    assert caught.value.violation.clause == "weights"
    assert caught.value.counterexample.nodes <= 1


def test_a_fault_that_does_not_show_again_is_reported_on_the_graph_as_drawn(tmp_path: Path) -> None:
    with pytest.raises(PassBrokenError, match="the fifth run") as caught:
        check_pass(FailsOnce, graphs=SUMS, examples=50, folder=tmp_path)
    assert caught.value.violation.clause == "crash"
    assert caught.value.examples == 5


@pytest.mark.parametrize(
    ("pass_", "clause", "rule"),
    [
        (DoubleOfAnything, "outputs", "add-anything"),
        (DoubleIgnoresOrder, "outputs", "subtract-itself"),
        (DoubleForgetsConsumers, "structure", ""),
    ],
)
def test_a_fault_is_reported_by_name_and_replays(
    pass_: type[Pass],
    clause: str,
    rule: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PassBrokenError) as caught:
        check_pass(pass_, graphs=SUMS, examples=200, folder=tmp_path)
    broken = caught.value
    assert broken.violation.clause == clause
    assert rule in str(broken)
    assert pass_.name in str(broken)
    assert broken.counterexample.nodes <= 2
    assert broken.counterexample.path is not None
    assert broken.counterexample.path.suffix == ".onnxtxt"
    program, *words = shlex.split(broken.counterexample.command)
    assert program == "lwc-opt"
    assert main(words) == 1
    assert f"BROKEN, {clause}" in capsys.readouterr().out


def test_the_default_graphs_find_a_fault_of_a_rule_pass(tmp_path: Path) -> None:
    with pytest.raises(PassBrokenError) as caught:
        check_pass(DoubleOfAnything, folder=tmp_path, seconds=60)
    assert caught.value.counterexample.nodes <= 3


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with pytest.raises(PassBrokenError) as caught:
            check_pass(DoubleOfAnything, graphs=SUMS, seed=5, folder=tmp_path)
        found.append((caught.value.examples, caught.value.counterexample.text))
    assert found[0] == found[1]


def test_a_pass_that_never_changes_anything_was_not_checked() -> None:
    only_neg = sketches([Motif("neg", lambda s: s.emit("Neg", s.pick()))])
    with pytest.raises(UsageError, match="rewrote none of 10 graphs"):
        check_pass(Double, graphs=only_neg, examples=10)
    report = check_pass(Double, graphs=only_neg, examples=10, must_change=False)
    assert not report.rewrites


def test_graphs_that_do_not_run_are_not_counted() -> None:
    good = module_of("g (float[N] x) => (float[N] y) { y = Add(x, x) }")
    bad = module_of(
        "g (float[N, 4] x) => (float[N, 4] y) <float[3, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3}>\n"
        "{ y = MatMul(x, w) }"
    )
    report = check_pass(Double, graphs=st.sampled_from([good, bad]), examples=20)
    assert 0 < report.examples <= 20
    assert report.changed == report.examples


def test_time_is_bounded() -> None:
    report = check_pass(Double, graphs=SUMS, examples=10**6, seconds=1.0)
    assert 0 < report.examples < 10**5


def test_fewer_graphs_than_asked_for_are_noted() -> None:
    report = check_pass(Double, graphs=SUMS, examples=10**6, seconds=0.5)
    (note,) = [each for each in report.notes if "1000000" in each]
    assert note == f"time was up after {report.examples} of 1000000 graphs"
    one = st.just(module_of("g (float[N] x) => (float[N] y) { y = Add(x, x) }"))
    report = check_pass(Double, graphs=one, examples=30)
    assert report.notes == [
        f"{report.examples} of 30 graphs: the strategy has no more that are valid and run"
    ]
    assert not check_pass(Double, graphs=SUMS, examples=20).notes


def test_no_graph_at_all_is_no_success() -> None:
    with pytest.raises(UsageError, match="no graph was checked") as caught:
        check_pass(Double, graphs=SUMS, seconds=0.0, must_change=False)
    assert "seconds=" in str(caught.value)


def test_making_the_strategy_takes_no_time_from_the_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(pass_: Pass) -> Any:
        time.sleep(1.2)
        return SUMS

    monkeypatch.setattr("lwc.verify.contract.property._default_graphs", slow)
    assert check_pass(Double, examples=10**6, seconds=1.0).examples > 0


def test_graphs_that_are_not_compared_are_counted() -> None:
    noisy = st.just(
        module_of(
            "g (float[N] x) => (float[N] y, float[N] z) { y = Add(x, x) z = RandomNormalLike(x) }"
        )
    )
    report = check_pass(Double, graphs=noisy, examples=1)
    assert (report.changed, report.uncompared.total()) == (1, 1)
    assert "outputs of 1 not compared: RandomNormalLike -> 'z' draws random numbers" in str(report)
    assert "not compared" not in str(check_pass(Double, graphs=SUMS, examples=5))


NOT_NEGATIVE = "x is not negative"


@dataclass(frozen=True)
class DropAbs(Pass):
    """Drop Abs where its input is not negative."""

    name: ClassVar[str] = "drop-abs"
    contract: ClassVar[Contract] = Exact((NOT_NEGATIVE,))

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        found = [node for node in module.graph if node.op_type == "Abs"]
        if not found:
            return PassResult(False)
        ctx.assume(NOT_NEGATIVE)
        for node in found:
            node.op_type = "Identity"
        return PassResult(True)


ABS = st.just(module_of("g (float[N] x) => (float[N] y) { y = Abs(x) }"))


def test_assumptions_are_checked_from_both_sides(tmp_path: Path) -> None:
    inside = FeedSpec(ranges={"x": (0, 9)})
    report = check_pass(DropAbs, graphs=ABS, grant="all", feeds=inside, examples=2)
    assert report.refused.total() == 1
    assert report.changed == 1
    with pytest.raises(PassBrokenError):
        check_pass(DropAbs, graphs=ABS, grant="all", folder=tmp_path)
    report = check_pass(DropAbs, graphs=ABS, must_change=False)
    assert any("no assumption was granted" in note for note in report.notes)


def test_a_counterexample_replays_on_the_feeds_of_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.array([1.5, -np.inf], np.float32)
    feeds = FeedSpec(dims={"N": 2}, ranges={"z": (-3, -1)}, values={"x": values})
    with pytest.raises(PassBrokenError) as caught:
        check_pass(DropAbs, graphs=ABS, grant="all", feeds=feeds, folder=tmp_path)
    _, *words = shlex.split(caught.value.counterexample.command)
    (file,) = tmp_path.glob("*.feeds.json")
    assert words[-1] == f"--feeds={file}"
    again = read_feed_spec(file)
    assert (again.dims, again.ranges) == (feeds.dims, feeds.ranges)
    assert again.values["x"].dtype == np.float32
    assert np.array_equal(again.values["x"], values)
    assert main(words) == 1
    file.write_text('{"ranges": {"x": [0, 9]}}')
    assert main(words) == 0
    assert "keeps its contract" in capsys.readouterr().out
    for text, message in (
        ("{", "the feeds are no JSON"),
        ('{"range": {}}', "it may have: dims, ranges"),
        ('{"dims": 3}', "it may have: dims, ranges"),
        ('{"ranges": {"x": 3}}', "a part of the feeds cannot be read"),
        ('{"values": {"x": {}}}', "a part of the feeds cannot be read"),
        ('{"ranges": {"x": [3, 1]}}', "the range of 'x' is empty"),
    ):
        file.write_text(text)
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert main([*words[:-1], f"--feeds={tmp_path / 'none'}"]) == 2


@dataclass(frozen=True)
class SlowAndWrong(Pass):
    """Take Neg for Abs where its input is not negative, which is wrong there, and take long."""

    name: ClassVar[str] = "slow-and-wrong"
    contract: ClassVar[Contract] = Exact((NOT_NEGATIVE,))

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        time.sleep(0.05)
        if NOT_NEGATIVE not in ctx.granted and "all" not in ctx.granted:
            return PassResult(False)
        found = [node for node in module.graph if node.op_type == "Abs"]
        for node in found:
            node.op_type = "Neg"
        return PassResult(bool(found))


def test_each_side_of_an_assumption_gets_its_share_of_time(tmp_path: Path) -> None:
    graphs = sketches([Motif("abs", lambda s: s.emit("Abs", s.pick()))], steps=(1, 3))
    with pytest.raises(PassBrokenError):
        check_pass(SlowAndWrong, graphs=graphs, grant="all", folder=tmp_path, seconds=20.0)


def test_options_without_defaults_ask_for_an_instance() -> None:
    @dataclass(frozen=True)
    class Needs(Pass):
        """Need an option."""

        count: int

        name: ClassVar[str] = "needs"

        def run(self, module: Module, ctx: PassContext) -> PassResult:
            return PassResult(False)

    with pytest.raises(UsageError, match="give an instance"):
        check_pass(Needs)


def test_a_pass_whose_option_is_its_assumption() -> None:
    report = check_pass(BindDims((("N", 3),)), graphs=SUMS, examples=40)
    assert report.changed > 10


@passes_hold(Double, graphs=SUMS, examples=20)
def test_the_decorator(report: CheckReport) -> None:
    assert report.examples == 20


@passes_hold(Double, graphs=SUMS, examples=5)
def test_the_decorator_leaves_fixtures(tmp_path: Path) -> None:
    assert tmp_path.exists()


def test_the_decorator_hides_the_report_from_pytest() -> None:
    @passes_hold(Double, graphs=SUMS, examples=5)
    def check(report: CheckReport, tmp_path: Path) -> None:
        """Say something."""

    assert list(inspect.signature(check).parameters) == ["tmp_path"]
    assert check.__doc__ == "Say something."

    @passes_hold(DoubleOfAnything, graphs=SUMS)
    def fails() -> None:
        raise AssertionError("not reached")

    with pytest.raises(PassBrokenError):
        fails()


def test_the_fixture_keeps_counterexamples_with_the_test(
    check_pass: Callable[..., CheckReport], tmp_path: Path
) -> None:
    assert check_pass(Double, graphs=SUMS, examples=5).examples == 5
    with pytest.raises(PassBrokenError):
        check_pass(DoubleOfAnything, graphs=SUMS)
    assert list(tmp_path.glob("double-of-anything-outputs-*.onnxtxt"))


def test_the_facade() -> None:
    assert lwc.verify.check_pass is check_pass
    for name in lwc.verify.__all__:
        assert getattr(lwc.verify, name) is not None


class PairOfGelu(PatternRule):
    """Two sign changes after an operator that opset 20 brought."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(op.Gelu(x)))

    def rewrite(self, edit: Any, x: Any) -> Any:
        return edit.op("Gelu", [x])


class PairsOfGelu(RulePass):
    """Drop pairs of sign changes."""

    rules = (PairOfGelu,)


def test_default_graphs_of_a_rule_whose_operators_are_not_in_every_opset() -> None:
    report = check_pass(PairsOfGelu, examples=40)
    assert report.rewrites["pair-of-gelu"] > 5
