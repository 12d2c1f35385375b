"""What a pass is: options as fields, a contract, a run method, a truthful result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, get_args

from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.core.diagnostics import Remark, RemarkKind, describe
from lwc.core.errors import PassError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from lwc.analysis.target import Target
    from lwc.core.module import Module
    from lwc.pipeline.gradients import GradientRequest, GradientRunner
    from lwc.rewrite import Editor, RewriteLimit, Rewriting

__all__ = [
    "Approximate",
    "Checkpoint",
    "Contract",
    "Description",
    "Exact",
    "Feed",
    "Lossy",
    "Pass",
    "PassContext",
    "PassResult",
    "Progress",
    "Runner",
    "Verify",
    "check_settings",
    "vouched",
]

Verify: TypeAlias = Literal["none", "structural", "numeric"]
"""How a pipeline checks each pass; see `lwc.pipeline.manager.PassManager`."""


def check_settings(verify: str, seed: int, threads: int | None, max_memory: int | None) -> None:
    """Check the settings of a run.

    Raises:
        UsageError: One has a value that it cannot have.
    """
    known = get_args(Verify)
    if verify not in known:
        raise UsageError(f"verify is one of {', '.join(known)}, not {verify!r}")
    numbers = (("seed", seed, 0), ("threads", threads, 1), ("max-memory", max_memory, 0))
    for name, number, least in numbers:
        if number is not None and (not isinstance(number, int) or number < least):
            raise UsageError(f"{name} is an integer from {least} on, not {number!r}")


Array: TypeAlias = "np.ndarray[Any, Any]"
Feed: TypeAlias = "Mapping[str, Array]"
"""One batch: an array for each graph input, by name."""


@dataclass(frozen=True)
class Exact:
    """The pass computes the same function up to floating-point rounding.

    Attributes:
        assumptions: What must hold of the inputs for that, each in one sentence.
        kept: What an output after the pass stands for, where that is a part of what it was: given
            an output before and after, returns the part of the former.
    """

    assumptions: tuple[str, ...] = ()
    kept: Callable[[Array, Array], Array] | None = None


@dataclass(frozen=True)
class Approximate:
    """The pass adds a stated error.

    Attributes:
        rtol: Bound on the relative error it adds to any output.
        atol: Bound on the absolute error it adds to any output.
        assumptions: See `Exact`.
    """

    rtol: float
    atol: float
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lossy:
    """The pass loses accuracy that only an evaluation can judge.

    Attributes:
        assumptions: See `Exact`.
        noise: Relative root-mean-square change of every weight (and of every activation that
            enters a linear operator) to which the pass is equivalent at worst, as far as a check
            on random inputs can tell; None promises nothing.
    """

    assumptions: tuple[str, ...] = ()
    noise: float | None = None


Contract: TypeAlias = Exact | Approximate | Lossy


def vouched(contract: Contract, granted: frozenset[str]) -> Contract:
    """Return a contract with those of its assumptions that the user vouches for.

    Args:
        contract: What a pass promises.
        granted: See `PassContext`.
    """
    held = tuple(each for each in contract.assumptions if _is_granted(each, granted))
    return replace(contract, assumptions=held)


def _is_granted(assumption: str, granted: frozenset[str]) -> bool:
    return any(words == "all" or assumption.startswith(words) for words in granted)


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: Whether the module differs from before; checked against a fingerprint.
        preserved: Analyses that still hold. None of them matters when nothing changed.
        statistics: Counts and figures for the report, by name.
        rewrites: Rewrites that happened, by rule. A pass that emits one applied remark for each
            leaves it empty: the manager counts those.
    """

    changed: bool
    preserved: frozenset[type[Analysis]] = frozenset()
    statistics: Mapping[str, int | float | str] = field(default_factory=dict)
    rewrites: Mapping[str, int] = field(default_factory=dict)


class Runner(Protocol):
    """Executes a module; what a pass gets that must see activations."""

    def run(
        self, feed: Feed, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch and return the named values (any value of the main graph), by name."""


Description: TypeAlias = str | Callable[[], str]


class Progress(Protocol):
    """Shows how far a long loop is."""

    def track(
        self, items: Iterable[Any], description: Description, total: int | None = None
    ) -> Iterator[Any]:
        """Yield from `items`, showing progress; a description may change with every item."""


class Checkpoint(Protocol):
    """Keeps results of calibrated passes; see `lwc.calibration.checkpoint.CheckpointFolder`."""

    facts: object
    taken: Counter[str]

    def get(
        self, kind: str, key: str, warn: Callable[[str], None]
    ) -> tuple[Mapping[str, Array], str] | None:
        """Return a result and its checksum, or None."""

    def put(self, kind: str, key: str, entry: Mapping[str, Array]) -> str:
        """Keep a result and return its checksum."""

    def drop(self, kind: str, key: str) -> None:
        """Forget a result that another one takes the place of."""


class _Silent:
    def track(
        self, items: Iterable[Any], description: Description, total: int | None = None
    ) -> Iterator[Any]:
        yield from items


def _unlimited() -> RewriteLimit:
    # A context is made where a module exists; importing passes must not import onnx_ir.
    from lwc.rewrite.limit import RewriteLimit

    return RewriteLimit()


@dataclass
class PassContext:
    """What a pass may use besides the module.

    Attributes:
        analyses: The module's analyses.
        source: The name of the running pass, put on its remarks.
        make_runner: Builds a `Runner` for a module and the extra values to expose; given by
            whoever starts the pipeline, since passes import no backend.
        make_gradient_runner: Builds a `GradientRunner` for a module, likewise.
        find_original: Returns the module as it was before the first pass of the pipeline, which is
            not to be changed, or None where nobody kept it.
        progress: Progress display.
        max_memory: Bound in bytes on what a single step may hold, or None.
        seed: Seed of everything random.
        granted: Assumptions the user vouches for, by their first words, or `all`; see `assume`.
        limit: Counts the rewrites and stops the pass after a number of them; the editor and the
            driver consult it.
        explain: Report everything that rules saw at nodes whose description contains this text,
            also where nothing was like what they look for; None reports near misses only.
        find_target: Returns the measured machine that the module is to run on, or None where it
            was not measured.
        calibration: Gives calibration data for a module, as often as it is asked; None where the
            user gave none.
        checkpoint: Keeps what calibrated passes compute, for a run that follows a killed one; None
            where that was not asked for.
        spec: The running pass with its options.
    """

    analyses: AnalysisManager
    source: str = ""
    make_runner: Callable[[Module, Sequence[str]], AbstractContextManager[Runner]] | None = None
    make_gradient_runner: (
        Callable[[Module, GradientRequest], AbstractContextManager[GradientRunner]] | None
    ) = None
    find_original: Callable[[], Module | None] = lambda: None
    progress: Progress = field(default_factory=_Silent)
    max_memory: int | None = None
    seed: int = 0
    granted: frozenset[str] = frozenset()
    limit: RewriteLimit = field(default_factory=_unlimited)
    explain: str | None = None
    find_target: Callable[[], Target | None] = lambda: None
    calibration: Callable[[Module], Iterable[Feed]] | None = None
    checkpoint: Checkpoint | None = None
    spec: str = ""

    def editor(self) -> Editor:
        """Return an editor of the module that obeys the limit and records this pass."""
        from lwc.analysis.shapes import Shapes
        from lwc.rewrite import Editor

        return Editor(
            self.analyses.module,
            self.analyses.get(Shapes),
            self.source,
            limit=self.limit,
            explain=self.explain,
        )

    def report(self, done: Rewriting) -> None:
        """Report what a run of the rewrite driver missed, and what `explain` asks for besides.

        A miss is reported at the furthest node the rule reached.
        """
        for step in done.applied:
            self._say("applied", "applied here", step.node, step.rule)
        for miss in done.missed:
            place = describe(miss.node)
            if miss.root is not miss.node:
                place = f"{place}, reached from {describe(miss.root)}"
            self._say("missed" if miss.near else "note", miss.reason, place, miss.rule)

    def applied(self, message: str, node: ir.Node | None = None, rule: str | None = None) -> None:
        """Report a rewrite that happened."""
        self._emit("applied", message, node, rule)

    def missed(self, message: str, node: ir.Node | None = None, rule: str | None = None) -> None:
        """Report a rewrite that did not happen, and why."""
        self._emit("missed", message, node, rule)

    def note(self, message: str, node: ir.Node | None = None) -> None:
        """Report a fact."""
        self._emit("note", message, node, None)

    def warn(self, message: str, node: ir.Node | None = None) -> None:
        """Report something the user should look at."""
        self._emit("warning", message, node, None)

    def is_granted(self, assumption: str) -> bool:
        """Tell whether the user vouches for one of the sentences in the pass's contract."""
        return _is_granted(assumption, self.granted)

    def assume(self, assumption: str) -> None:
        """Go on only if the user vouches for something that the pass cannot prove.

        Args:
            assumption: One of the sentences in the pass's contract.

        Raises:
            PassError: The user did not grant it.
        """
        if not self.is_granted(assumption):
            raise PassError(
                f"it would have to assume: {assumption}",
                remedy=f"--grant '{assumption}' if that holds",
            )
        self.note(f"assumes, as granted: {assumption}")

    def runner(self, module: Module, expose: Sequence[str] = ()) -> AbstractContextManager[Runner]:
        """Return a context manager that gives a `Runner` for `module`.

        Raises:
            PassError: The pipeline was started without a backend.
        """
        if self.make_runner is None:
            raise PassError(
                f"'{self.source}' must run the model, but the pipeline has no backend",
                remedy="pass backend= to lwc.optimize",
            )
        return self.make_runner(module, expose)

    def gradient_runner(
        self,
        module: Module,
        *,
        weights: Sequence[str] = (),
        values: Sequence[str] = (),
        masks: Mapping[str, Array] | None = None,
        segments: int | None = None,
        straight_through: bool = True,
    ) -> AbstractContextManager[GradientRunner]:
        """Return a context manager that gives a `GradientRunner` for `module`.

        Arguments are those of `lwc.pipeline.gradients.GradientRequest`; where `segments` does not
        say, `max_memory` bounds the activations that are kept.

        Raises:
            PassError: The pipeline was started without a backend.
            MissingExtraError: PyTorch is not installed.
        """
        from lwc.pipeline.gradients import GradientRequest

        if self.make_gradient_runner is None:
            raise PassError(
                f"'{self.source}' needs gradients, but the pipeline has no backend",
                remedy="pass backend= to lwc.optimize",
            )
        request = GradientRequest(
            tuple(weights), tuple(values), masks or {}, segments, self.max_memory, straight_through
        )
        return self.make_gradient_runner(module, request)

    def calibration_feeds(self, module: Module) -> Iterable[Feed]:
        """Return the calibration data as feeds of `module`.

        Raises:
            UsageError: The user gave none.
        """
        if self.calibration is None:
            raise UsageError(
                "it must see activations, but there is no calibration data",
                remedy="--calibrate PATH, or calibration= of lwc.optimize",
            )
        return self.calibration(module)

    def _emit(self, kind: RemarkKind, message: str, node: ir.Node | None, rule: str | None) -> None:
        self._say(kind, message, None if node is None else describe(node), rule)

    def _say(self, kind: RemarkKind, message: str, place: str | None, rule: str | None) -> None:
        self.analyses.module.remarks.emit(Remark(kind, self.source, message, place, rule))


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a module. Subclasses are frozen dataclasses; their fields are their options.

    The first line of the docstring is the summary that `--list-passes` prints.

    Class attributes:
        name: The kebab-case name in pipelines and on the command line; also the file's name.
        contract: What the pass promises about the function it leaves.
        positional: The field that a pipeline may give first and without its name.
        free_options: The field of type `tuple[tuple[str, T], ...]` that takes the options whose
            names are no field, such as the dimensions of `bind-dims{batch=1}`.
        changes_again: Why a second run on the pass's own result may change it again; None
            promises that it does not.
        never_more: Measures that the pass never increases, out of `nodes`, `flops` and
            `parameter-bytes`; the property verifier checks them.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = Exact()
    positional: ClassVar[str | None] = None
    free_options: ClassVar[str | None] = None
    changes_again: ClassVar[str | None] = None
    never_more: ClassVar[frozenset[str]] = frozenset()

    @property
    def keeps_interface(self) -> bool:
        """Whether graph inputs and outputs keep their names, order and element types."""
        return True

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Rewrite `module` in place.

        Raises:
            PassError: The pass cannot do its work here; the manager restores the module.
        """
