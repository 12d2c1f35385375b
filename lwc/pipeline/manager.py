"""The pass manager: runs passes in order, checks each one, and records what it did."""

from __future__ import annotations

import dataclasses
import reprlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Protocol

from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.shapes import Shapes
from lwc.core.errors import LwcError, PassError, Terminated, UsageError, VerificationError
from lwc.pipeline.instruments import Instrument
from lwc.pipeline.passes import Contract, Pass, PassContext, PassResult, Verify, vouched
from lwc.pipeline.record import (
    PassRecord,
    PipelineRecord,
    Snapshot,
    describe_contract,
    take_snapshot,
)
from lwc.pipeline.spec import to_spec, to_text
from lwc.verify.structure.interface import Interface
from lwc.verify.structure.preserved import verify_preserved
from lwc.verify.structure.types import TypeState, check_types, verify_types
from lwc.verify.structure.weights import WeightContents
from lwc.verify.structure.well_formed import verify_structure

if TYPE_CHECKING:
    from lwc.core.module import Fingerprint, Module

__all__ = ["NumericCheck", "PassManager"]


class NumericCheck(Protocol):
    """Runs two modules and compares their outputs."""

    def __call__(self, before: Module, after: Module, contract: Contract) -> str:
        """Return one line on how well the outputs agree.

        Raises:
            VerificationError: They differ by more than `contract` allows.
        """


@dataclass(frozen=True)
class PassManager:
    """Runs passes over a module.

    Attributes:
        passes: The passes in order.
        verify: `none` trusts the passes. `structural` verifies the module's structure before the
            first and after each pass, that each pass told the truth about what it changed and
            which analyses it preserved, that it brought in no type or shape that contradicts
            inference, and wrote into no weight. `numeric` also executes the module before and
            after each pass that changed it.
        numeric: The check that `numeric` uses.
        instruments: What watches the run.
        rollback: Restore the module where a pass fails. Without it the module is lost then; that
            spares a copy of the graph per pass.
    """

    passes: Sequence[Pass]
    verify: Verify = "structural"
    numeric: NumericCheck | None = None
    instruments: Sequence[Instrument] = ()
    rollback: bool = True

    def __post_init__(self) -> None:
        if self.verify == "numeric" and self.numeric is None:
            raise UsageError("numeric verification needs a numeric check")

    def run(self, module: Module, ctx: PassContext | None = None) -> PipelineRecord:
        """Rewrite `module` in place.

        Args:
            module: The module.
            ctx: What passes may use; its analyses must be those of `module`.

        Raises:
            PassError: A pass failed.
            VerificationError: The input is malformed, or a pass broke what it promises.
        """
        ctx = ctx or PassContext(AnalysisManager(module))
        start = time.perf_counter()
        reported = tuple(module.remarks)
        if self.verify != "none":
            verify_structure(module)
        for instrument in self.instruments:
            instrument.before_pipeline(module, self.passes)
        state = first = self._measure(module, ctx)
        records = []
        for index, pass_ in enumerate(self.passes):
            record, state = self._run_pass(index, module, ctx, state)
            records.append(record)
            for instrument in self.instruments:
                instrument.after_pass(pass_, module, record)
        whole = PipelineRecord(
            pipeline=to_text(self.passes),
            verify=self.verify,
            seed=ctx.seed,
            seconds=time.perf_counter() - start,
            remarks=reported,
            passes=tuple(records),
            input=first.snapshot,
            output=state.snapshot,
        )
        for instrument in self.instruments:
            instrument.after_pipeline(whole)
        return whole

    def _run_pass(
        self, index: int, module: Module, ctx: PassContext, state: _State
    ) -> tuple[PassRecord, _State]:
        pass_ = self.passes[index]
        for instrument in self.instruments:
            instrument.before_pass(pass_, module, index)
        before = module.clone() if self._needs_copy else None
        heard = len(module.remarks)
        ctx = dataclasses.replace(ctx, source=pass_.name, spec=to_text([pass_]))
        if ctx.checkpoint is not None:
            ctx.checkpoint.taken.clear()
        try:
            outcome = self._attempt(pass_, module, ctx, state, before)
        except BaseException as error:
            if isinstance(error, LwcError):
                _name_pass(error, pass_, module)
            for instrument in self.instruments:
                instrument.on_error(pass_, before, self.passes[index:], error)
            ctx.analyses.invalidate()
            if self.rollback:
                assert before is not None
                module.adopt(before)
            raise
        result = outcome.result
        if not result.changed and len(module.remarks) == heard:
            ctx.note("found nothing to do")
        said = tuple(module.remarks.since(heard))
        applied = Counter(remark.rule or "" for remark in said if remark.kind == "applied")
        record = PassRecord(
            name=pass_.name,
            spec=to_spec(pass_),
            contract=describe_contract(pass_.contract),
            assumptions=pass_.contract.assumptions,
            seconds=outcome.seconds,
            verify_seconds=outcome.verify_seconds,
            changed=result.changed,
            statistics={**result.statistics, **_resumed(ctx)},
            rewrites=dict(result.rewrites or applied),
            remarks=said,
            verification=outcome.verification,
            before=state.snapshot,
            after=outcome.state.snapshot,
        )
        return record, outcome.state

    def _attempt(
        self, pass_: Pass, module: Module, ctx: PassContext, state: _State, before: Module | None
    ) -> _Outcome:
        """Run one pass and check what it left."""
        interface = Interface.of(module)
        start = time.perf_counter()
        result = _call(pass_, module, ctx)
        middle = time.perf_counter()
        module.forget_names()
        verification, types, fingerprint, contents = None, state.types, None, state.contents
        if self.verify != "none":
            if contents is not None and (written := contents.problem()):
                raise VerificationError(written)
            verify_structure(module)
            if pass_.keeps_interface and (change := interface.change_to(Interface.of(module))):
                raise VerificationError(change)
            fingerprint = module.fingerprint()
            _check_truth(claimed=result.changed, real=fingerprint != state.fingerprint)
        if result.changed:
            if self.verify != "none":
                verify_preserved(ctx.analyses, result.preserved)
            ctx.analyses.invalidate(result.preserved)
            types = self._types(module, ctx, types)
            if fingerprint is not None:
                contents = WeightContents.of(fingerprint.tensors, contents)
            state = _State(take_snapshot(module), fingerprint, types, contents)
        if self.verify == "numeric" and result.changed:
            assert self.numeric is not None
            assert before is not None
            verification = self.numeric(before, module, vouched(pass_.contract, ctx.granted))
        end = time.perf_counter()
        return _Outcome(result, state, verification, middle - start, end - middle)

    @property
    def _needs_copy(self) -> bool:
        return (
            self.rollback
            or self.verify == "numeric"
            or any(instrument.needs_copy for instrument in self.instruments)
        )

    def _types(
        self, module: Module, ctx: PassContext, before: TypeState | None
    ) -> TypeState | None:
        """Check types and shapes; what the input had is no pass's fault, so nothing is then.

        The shapes inferred for it stay cached, so that the next pass finds them.
        """
        if self.verify == "none":
            return None
        shapes = ctx.analyses.get(Shapes)
        if before is None:
            return check_types(module, shapes)
        return verify_types(module, shapes, before)

    def _measure(self, module: Module, ctx: PassContext) -> _State:
        """Describe the input, as far as the checks of the passes need it."""
        checked = self.verify != "none" and self.passes
        fingerprint = module.fingerprint() if checked else None
        types = self._types(module, ctx, None) if checked else None
        contents = None if fingerprint is None else WeightContents.of(fingerprint.tensors)
        return _State(take_snapshot(module), fingerprint, types, contents)


@dataclass(frozen=True)
class _State:
    """A module as a pass left it."""

    snapshot: Snapshot
    fingerprint: Fingerprint | None
    types: TypeState | None
    contents: WeightContents | None


@dataclass(frozen=True)
class _Outcome:
    """A pass that ran and passed its checks."""

    result: PassResult
    state: _State
    verification: str | None
    seconds: float
    verify_seconds: float


def _no_result(problem: str) -> PassError:
    """Make an error with a cause, which tells a mistake from a refusal."""
    error = PassError(problem)
    error.__cause__ = TypeError(problem)
    return error


def _call(pass_: Pass, module: Module, ctx: PassContext) -> PassResult:
    """Run a pass; whatever it raises or returns by mistake becomes a `PassError`."""
    try:
        result: object = pass_.run(module, ctx)
    except (LwcError, OSError, MemoryError, Terminated):
        raise
    except SystemExit as error:
        raise PassError(f"it tried to end the program with {error.code!r}") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PassError(f"{type(error).__name__}: {' '.join(reason.split())}") from error
    if not isinstance(result, PassResult):
        raise _no_result(f"run returned {type(result).__name__}, not a PassResult")
    problem = _result_problem(result)
    if problem is not None:
        raise _no_result(f"run returned a PassResult that is malformed: {problem}")
    return result


def _result_problem(result: PassResult) -> str | None:
    """Say which field of a result is not what it must be, or return None."""
    changed: object = result.changed
    preserved: object = result.preserved
    if not isinstance(changed, bool):
        return f"changed is True or False, not {_shown(changed)}"
    if not isinstance(preserved, Set | tuple | list):
        return f"preserved is a set of analyses, not {_shown(preserved)}"
    for kind in preserved:
        if not (isinstance(kind, type) and issubclass(kind, Analysis)):
            return f"preserved has {_shown(kind)}, which is no Analysis"
    for name, number, what in (
        ("statistics", Real | str, "a number or a string"),
        ("rewrites", Integral, "a count"),
    ):
        table: object = getattr(result, name)
        if not isinstance(table, Mapping):
            return f"{name} is a table of figures by name, not {_shown(table)}"
        for key, figure in table.items():
            if not isinstance(key, str):
                return f"{name} has the key {_shown(key)}, which is no string"
            if not isinstance(figure, number) or (name == "rewrites" and figure < 0):
                return f"{name}['{key}'] is {what}, not {_shown(figure)}"
    return None


def _resumed(ctx: PassContext) -> dict[str, int]:
    """Return what the pass took from the checkpoint, as statistics of it."""
    taken = {} if ctx.checkpoint is None else ctx.checkpoint.taken
    return {f"{kind} resumed": count for kind, count in taken.items()}


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())


def _check_truth(*, claimed: bool, real: bool) -> None:
    if real and not claimed:
        raise VerificationError("it reports no change, but the module differs")
    if claimed and not real:
        raise VerificationError("it reports a change, but the module is the same")


def _name_pass(error: LwcError, pass_: Pass, module: Module) -> None:
    """Put the pass's name in front of the message, once; a refusal is of a file, too."""
    if isinstance(error, PassError) and error.__cause__ is None:
        error.file = error.file or module.source.path
    if not error.message.startswith("pass '"):
        error.message = f"pass '{pass_.name}': {error.message}"
