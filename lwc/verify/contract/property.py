"""`check_pass`: hypothesis draws graphs, and a pass must keep its whole contract on each."""

from __future__ import annotations

import contextlib
import functools
import inspect
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.calibration.feeds import FeedSpec
from lwc.core.errors import LwcError, MissingExtraError, UsageError
from lwc.core.module import Module
from lwc.pipeline.passes import Pass
from lwc.pipeline.rule_pass import RulePass
from lwc.pipeline.spec import to_spec
from lwc.verify.contract.clauses import (
    ContractOutcome,
    ContractSettings,
    ContractViolation,
    check_contract,
)
from lwc.verify.contract.counterexample import Counterexample, write_counterexample

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["CheckReport", "PassBrokenError", "check_pass", "passes_hold"]

_REDUCTION_SECONDS = 20.0
_REASONS = 3
"""Reasons shown why outputs were not compared."""
_LOOP_SECONDS = 1.0
"""Time of a drawn graph with loops: one that needs more hardly ends, and fills the memory."""
_OFTEN = 20
"""Graphs on which each rule is checked in full."""
_TURN = 8
"""After that, one in so many graphs is."""


@dataclass
class CheckReport:
    """What a check that found nothing wrong saw.

    Attributes:
        spec: The pass as pipeline text.
        examples: Graphs drawn on which the pass ran.
        changed: On how many of them it changed something.
        refused: On how many it refused, by reason.
        float64: How many were compared in float64 too.
        uncompared: On how many changed ones the outputs were not compared, by reason.
        rewrites: Rewrites by rule, over all graphs.
        missed: Missed rewrites by rule, over all graphs.
        seconds: Time of the check.
        notes: What the reader should know: what was not checked.
    """

    spec: str
    examples: int = 0
    changed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    float64: int = 0
    uncompared: Counter[str] = field(default_factory=Counter)
    rewrites: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, outcome: ContractOutcome) -> None:
        """Count one graph."""
        self.examples += 1
        self.changed += outcome.changed
        self.float64 += outcome.float64
        if outcome.refused is not None:
            self.refused[outcome.refused] += 1
        if outcome.skipped is not None:
            self.uncompared[outcome.skipped] += 1
        if outcome.record is not None:
            self.rewrites.update(outcome.record.rewrites)
            self.missed.update(remark.rule or "" for remark in outcome.record.missed)

    def __str__(self) -> str:
        lines = [
            f"{self.spec} holds on {self.examples} graphs: changed {self.changed}, refused "
            f"{self.refused.total()}, {self.float64} compared in float64, {self.seconds:.1f} s"
        ]
        lines += [
            f"  {count:>6} x {rule or 'unnamed'}" for rule, count in self.rewrites.most_common()
        ]
        lines += [
            f"  outputs of {count} not compared: {reason}"
            for reason, count in self.uncompared.most_common(_REASONS)
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class PassBrokenError(AssertionError):
    """A pass broke its contract on a graph.

    Attributes:
        violation: The clause and how it was broken.
        counterexample: The smallest graph that shows it, with the command that replays it.
        examples: Graphs drawn until one showed it.
    """

    def __init__(
        self, spec: str, violation: ContractViolation, counterexample: Counterexample, examples: int
    ) -> None:
        rules = ", ".join(f"{rule} x{count}" for rule, count in violation.rewrites.items())
        super().__init__(
            f"{spec} breaks its contract ({violation.clause})\n"
            f"{textwrap.indent(violation.message, '  ')}\n"
            + (f"  its rewrites: {rules}\n" if rules else "")
            + f"  found after {_counted(examples, 'graph')}; the smallest has "
            f"{_counted(counterexample.nodes, 'node')}:\n"
            + "".join(f"    {line}\n" for line in counterexample.text.splitlines())
            + f"  replay: {counterexample.command}"
        )
        self.violation = violation
        self.counterexample = counterexample
        self.examples = examples


def check_pass(
    pass_: Pass | type[Pass],
    *,
    examples: int = 1000,
    graphs: SearchStrategy[Module] | None = None,
    feeds: FeedSpec | None = None,
    grant: str | Iterable[str] = (),
    seconds: float = 40.0,
    seed: int = 0,
    folder: str | Path | None = None,
    must_change: bool = True,
) -> CheckReport:
    """Draw graphs, run a pass on each, and check every clause of its contract.

    The clauses are those of `lwc.verify.contract.clauses`. A graph that breaks one is reduced to
    the smallest that breaks the same clause, and written down.

    A pass whose contract has assumptions is checked twice, on half of the examples each: with
    none granted, where it must do without them or refuse; and with those in `grant`, on `feeds`
    that keep them.

    Args:
        pass_: The pass, or its class where every option has a default.
        examples: Graphs to draw.
        graphs: A strategy of modules. By default graphs of random operators and motifs of real
            models; for a pass made of pattern rules, also graphs that match them and near misses.
        feeds: What the inputs may be where assumptions are granted.
        grant: Assumptions to grant, by their first words, or `all`.
        seconds: Time after which no further graph is drawn; each of the two checks has its half.
            Making the default strategy is not counted.
        seed: Seed of everything random.
        folder: Where counterexamples go; a folder of the system's temporary folder by default.
        must_change: Fail where the pass rewrites none of the graphs: nothing was checked then.

    Returns:
        What was seen.

    Raises:
        PassBrokenError: The pass broke its contract.
        UsageError: The pass rewrote no graph, no graph was checked in time, or the pass needs
            options that have no default.
        MissingExtraError: hypothesis is not installed.
    """
    chosen = _instance(pass_)
    report = CheckReport(to_spec(chosen))
    granted = frozenset([grant] if isinstance(grant, str) else grant)
    for words in granted - {"all"}:
        if not any(each.startswith(words) for each in chosen.contract.assumptions):
            raise UsageError(
                f"pass '{chosen.name}' assumes nothing that begins with '{words}'",
                remedy=f"it assumes: {'; '.join(chosen.contract.assumptions) or 'nothing'}",
            )
    start = time.perf_counter()
    strategy = _default_graphs(chosen) if graphs is None else graphs
    plain = ContractSettings(seed=seed, limit=_LOOP_SECONDS)
    if not chosen.contract.assumptions:
        phases = {"": replace(plain, feeds=feeds or FeedSpec())}
    elif granted:
        phases = {
            " with no assumption granted": plain,
            " with assumptions granted": replace(plain, feeds=feeds or FeedSpec(), granted=granted),
        }
    else:
        phases = {"": plain}
        report.notes.append("no assumption was granted: give grant= and the feeds that keep it")
    deadline = time.perf_counter() + seconds
    for number, (words, settings) in enumerate(phases.items()):
        left = (deadline - time.perf_counter()) / (len(phases) - number)
        search = _Search(chosen, settings, report, folder, words=words, seconds=left)
        search.run(strategy, max(1, examples // len(phases)), seed)
    report.seconds = time.perf_counter() - start
    for rule in chosen.find_rules() if isinstance(chosen, RulePass) else ():
        if not report.rewrites[rule.name]:
            report.notes.append(f"rule '{rule.name}' was never applied")
    # A pass of rules that only tidied up has shown none of its rules.
    worked = report.rewrites if isinstance(chosen, RulePass) else report.changed
    if must_change and not worked:
        reasons = "; ".join(reason for reason, _ in report.refused.most_common(2))
        raise UsageError(
            f"pass '{chosen.name}' rewrote none of {report.examples} graphs"
            + (f" (it refused: {reasons})" if reasons else ""),
            remedy="give graphs= that it should change, "
            + ("grant= what it assumes, " if chosen.contract.assumptions and not granted else "")
            + "or must_change=False",
        )
    return report


def passes_hold(
    pass_: Pass | type[Pass], **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a test that checks a pass first; see `check_pass` for the settings.

    A function with a parameter `report` gets the `CheckReport` there:

        @lwc.verify.passes_hold(FuseSwish, examples=300)
        def test_fuse_swish(report):
            assert report.rewrites["fuse-swish"] > 100
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        wanted = "report" in signature.parameters

        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> None:
            report = check_pass(pass_, **settings)
            if wanted:
                kwargs["report"] = report
            function(*args, **kwargs)

        # pytest looks for a fixture for each parameter it sees.
        rest = [each for name, each in signature.parameters.items() if name != "report"]
        setattr(test, "__signature__", signature.replace(parameters=rest))  # noqa: B010
        return test

    return wrap


class _Enough(BaseException):
    """Ends a search. No Exception, which hypothesis would take for a failure and try again."""


class _Search:
    """Draws graphs until one breaks the contract, the number is reached or time is up.

    Args:
        pass_: The pass.
        settings: How to check it.
        report: What was seen, over all searches.
        folder: Where counterexamples go.
        words: Tells this search from the others, in messages.
        seconds: Time for drawing.
    """

    def __init__(
        self,
        pass_: Pass,
        settings: ContractSettings,
        report: CheckReport,
        folder: str | Path | None,
        *,
        words: str,
        seconds: float,
    ) -> None:
        self.pass_ = pass_
        self.settings = settings
        self.report = report
        self.words = words
        self.seconds = seconds
        self.folder = folder
        self.deadline = time.perf_counter() + seconds
        self.late = False
        self.found: tuple[Module, ContractViolation] | None = None
        self.thorough: Counter[str] = Counter()

    def run(self, graphs: SearchStrategy[Module], examples: int, seed: int) -> None:
        """Draw and check; see `check_pass`."""
        import hypothesis

        # The graph is reduced by its structure, which takes far fewer runs of the pass than
        # hypothesis would need, so its own shrinking is off.
        settings = hypothesis.settings(
            max_examples=examples,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
            deadline=None,
            database=None,
            report_multiple_bugs=False,
        )
        test = hypothesis.given(graphs)(self._try)
        before = self.report.examples
        try:
            hypothesis.seed(seed)(settings(test))()
        except _Enough:
            pass
        except hypothesis.errors.Unsatisfiable as error:
            raise UsageError(
                f"none of the graphs drawn{self.words} is a valid model that runs",
                remedy="look at the strategy given as graphs=, and at feeds=",
            ) from error
        if self.found is not None:
            self._report_broken(*self.found)
        self._note_missing(self.report.examples - before, examples)

    def _note_missing(self, checked: int, wanted: int) -> None:
        """Say that fewer graphs were checked than asked for."""
        if not checked:
            raise UsageError(
                f"no graph was checked{self.words} within {max(self.seconds, 0.0):.1f} s",
                remedy="give more seconds=, or graphs= that are smaller and run",
            )
        share = f"{checked} of {wanted} graphs{self.words}"
        if self.late:
            self.report.notes.append(f"time was up after {share}")
        elif checked < wanted:
            self.report.notes.append(f"{share}: the strategy has no more that are valid and run")

    def _try(self, module: Module) -> None:
        if time.perf_counter() > self.deadline:
            self.late = True
            raise _Enough
        settings = replace(self.settings, thorough=self._is_new)
        proto = ir.to_proto(module.model)
        try:
            outcome = check_contract(self.pass_, module, settings)
        except ContractViolation as violation:
            # Made anew: the pass may have written into the weights.
            self.found = _made_anew(proto), violation
            raise _Enough from violation
        except LwcError:
            import hypothesis

            hypothesis.reject()  # the graph is no valid one
        self.report.add(outcome)

    def _is_new(self, rewrites: Mapping[str, int]) -> bool:
        """Tell whether some rule was seldom checked in full, or it is this graph's turn anyway.

        Running the pass again and again takes most of the time, and tells little about rules
        that were repeated often.
        """
        rules = rewrites or {"": 1}
        turn = self.report.examples % _TURN == 0
        if not turn and all(self.thorough[rule] >= _OFTEN for rule in rules):
            return False
        self.thorough.update(dict.fromkeys(rules, 1))
        return True

    def _report_broken(self, module: Module, violation: ContractViolation) -> None:
        from lwc.verify.reduction.reduce import reduce_module

        fails = functools.partial(_breaks, self.pass_, self.settings, violation)
        small = module
        # What depends on more than the module, or on chance, need not fail again.
        with contextlib.suppress(LwcError):
            small = reduce_module(module, fails, seconds=_REDUCTION_SECONDS)
        try:
            check_contract(self.pass_, small, self.settings)
        except ContractViolation as smaller:
            violation = smaller
        counterexample = write_counterexample(
            self.pass_, small, violation, self.settings, self.folder
        )
        raise PassBrokenError(
            self.report.spec, violation, counterexample, self.report.examples + 1
        ) from violation


def _made_anew(proto: Any) -> Module:
    """Make a module of a protobuf, its initializers in memory that can be written, as drawn."""
    module = Module(ir.from_proto(proto))
    for graph in module.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING:
                array = np.array(tensor.numpy())
                value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
    return module


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _breaks(
    pass_: Pass, settings: ContractSettings, violation: ContractViolation, module: Module
) -> bool:
    try:
        # Of its own: the pass may write into weights that candidates share.
        check_contract(pass_, _made_anew(ir.to_proto(module.model)), settings)
    except ContractViolation as found:
        return found.clause == violation.clause
    return False


def _instance(pass_: Pass | type[Pass]) -> Pass:
    if isinstance(pass_, Pass):
        return pass_
    if not (isinstance(pass_, type) and issubclass(pass_, Pass)):
        raise UsageError(f"{pass_!r} is no pass", remedy="give a Pass or its class")
    try:
        return pass_()
    except TypeError as error:
        raise UsageError(
            f"{pass_.__name__} cannot be made without options: {error}",
            remedy="give an instance",
        ) from error


def _default_graphs(pass_: Pass) -> SearchStrategy[Module]:
    try:
        from lwc.verify.generate.default import graphs_for
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise MissingExtraError("check_pass", "verify") from error
    return graphs_for(pass_)
