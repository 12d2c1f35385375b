"""What a failure is: how a pipeline fails on a module, in a form that can be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.trials import working_feeds
from lwc.core.errors import LwcError, UsageError, VerificationError
from lwc.pipeline.instruments import Instrument
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Contract, Pass, PassContext, Runner
from lwc.verify.numeric.comparer import compare
from lwc.verify.numeric.running import LOOP_SECONDS, compiled
from lwc.verify.structure.well_formed import verify_structure

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Failure", "FailureKind", "Trial"]

FailureKind: TypeAlias = Literal[
    "crash", "refused", "structure", "contract", "numeric", "unrunnable", "checker"
]
"""How a pass fails:

- `crash`: it raised something else than a message to the user;
- `refused`: it gave up, with a message;
- `structure`: what it left is malformed;
- `contract`: what it left is well formed, but not what its result or its class says;
- `numeric`: the outputs differ;
- `unrunnable`: the backend ran the module before it and does not run it after;
- `checker`: the verification itself crashed on what it left.
"""


@dataclass(frozen=True)
class Failure:
    """How a pass failed.

    Attributes:
        kind: See `FailureKind`.
        pass_name: The pass.
        message: What was raised, in one line or more.
        detail: Of a crash, the class of the exception; of a broken contract, the message without
            what differs from model to model; empty for other kinds.
    """

    kind: FailureKind
    pass_name: str
    message: str
    detail: str = ""

    def same_as(self, other: Failure | None) -> bool:
        """Tell whether two failures have kind, pass and detail in common."""
        return other is not None and (self.kind, self.pass_name, self.detail) == (
            other.kind,
            other.pass_name,
            other.detail,
        )


@dataclass(frozen=True)
class Trial:
    """Tries passes on modules, with the same settings each time.

    Attributes:
        numeric: Whether outputs are compared too.
        seed: Seed of everything random.
        threads: Threads of the backend; its choice by default.
        max_memory: See `PassContext`.
        granted: See `PassContext`.
        limit: Seconds for one run of a module that loops, before the passes.
    """

    numeric: bool = True
    seed: int = 0
    threads: int | None = None
    max_memory: int | None = None
    granted: frozenset[str] = frozenset()
    limit: float = LOOP_SECONDS

    def run(self, module: Module, passes: Sequence[Pass]) -> Failure | None:
        """Run passes on a copy of `module` and tell how they fail, or None.

        Raises:
            LwcError: The module itself is malformed, or does not run where that is needed.
            OSError: The system failed, not a pass.
        """
        verify_structure(module)
        twin = module.clone()
        watch = _Watch()
        checks = _Checks(self)
        manager = PassManager(
            passes,
            verify="numeric" if self.numeric else "structural",
            numeric=checks,
            instruments=(watch,),
            rollback=False,
        )
        try:
            manager.run(twin, self.context(AnalysisManager(twin)))
        except (OSError, MemoryError):
            raise
        except Exception as error:
            if watch.failed is None or checks.unfit is not None:
                raise checks.unfit or error from error
            return _classify(error, watch.failed, twin, checks)
        return None

    def context(self, analyses: AnalysisManager) -> PassContext:
        """Return what passes may use on the module of `analyses`."""
        return PassContext(
            analyses,
            make_runner=self._runner,
            max_memory=self.max_memory,
            seed=self.seed,
            granted=self.granted,
        )

    def runs(self, module: Module) -> bool:
        """Tell whether the backend runs a module as it is."""
        return self.refusal(module) is None

    def refusal(self, module: Module) -> LwcError | None:
        """Return what the backend says where it does not run a module as it is."""
        try:
            with compiled(module, self.threads, limit=self.limit) as executable:
                working_feeds(module, executable, 1, self.seed)
        except LwcError as error:
            return error
        return None

    def _runner(self, module: Module, expose: Sequence[str]) -> AbstractContextManager[Runner]:
        return OnnxRuntimeBackend().compile(module, threads=self.threads, expose=expose)


class _Watch(Instrument):
    """Remembers which pass failed."""

    failed: Pass | None = None

    def on_error(
        self, pass_: Pass, before: Module | None, rest: Sequence[Pass], error: BaseException
    ) -> None:
        self.failed = pass_


class _Checks:
    """The numeric check; it remembers whether it was what failed, and on which side."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.found: VerificationError | None = None
        self.unfit: LwcError | None = None
        """Why the module before the pass cannot be run: no failure of the pass."""

    def __call__(self, before: Module, after: Module, contract: Contract) -> str:
        trial = self.trial
        try:
            compare(
                before,
                after,
                contract=contract,
                seed=trial.seed,
                threads=trial.threads,
                limit=trial.limit,
            )
        except VerificationError as error:
            self.found = error
            raise
        except LwcError as error:
            self.unfit = error
            raise
        return "outputs agree"


def _classify(error: Exception, pass_: Pass, left: Module, checks: _Checks) -> Failure:
    """Tell what kind of failure an exception of the pass manager is.

    Args:
        error: What was raised while or after `pass_` ran.
        pass_: The pass.
        left: The module as the pass left it.
        checks: The numeric check of the run.
    """
    if isinstance(error, UsageError):
        raise error
    message = str(error) or type(error).__name__
    if not isinstance(error, LwcError):
        return Failure("checker", pass_.name, message, type(error).__name__)
    if not isinstance(error, VerificationError):
        cause = error.__cause__
        if cause is None or isinstance(cause, LwcError | OSError):
            return Failure("refused", pass_.name, message)
        return Failure("crash", pass_.name, message, type(cause).__name__)
    if checks.found is error:
        unrunnable = isinstance(error.__cause__, LwcError)
        return Failure("unrunnable" if unrunnable else "numeric", pass_.name, message)
    try:
        verify_structure(left)
    except VerificationError:
        return Failure("structure", pass_.name, message)
    return Failure("contract", pass_.name, message, _skeleton(error.message))


def _skeleton(message: str) -> str:
    """Return the first line of a message without names, numbers and shapes."""
    return re.sub(r"'[^']*'|\[[^\]]*\]|[\d.]+", "", message.partition("\n")[0])
