"""A reproducer: the smallest module and pipeline that fail as the given ones do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import LwcError, VerificationError
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Pass
from lwc.verify.numeric.running import limit_after
from lwc.verify.reduction.failure import Failure, Trial
from lwc.verify.reduction.reduce import count_nodes, reduce_module, reduce_pipeline
from lwc.verify.structure.well_formed import verify_structure

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Reproducer", "reproduce"]


@dataclass(frozen=True)
class Reproducer:
    """A small failing case.

    Attributes:
        module: The module.
        passes: The passes that fail on it.
        failure: How.
        trial: The settings it was found with; outputs are compared only where the model runs.
        nodes_before: Nodes of the module it was made from.
        passes_before: Passes of the pipeline it was made from.
    """

    module: Module
    passes: tuple[Pass, ...]
    failure: Failure
    trial: Trial
    nodes_before: int
    passes_before: int

    @property
    def nodes(self) -> int:
        """Nodes of the module."""
        return count_nodes(self.module)

    def write(self, path: str | os.PathLike[str]) -> Failure:
        """Write the module, read it back, and return how the passes fail on what was read.

        Raises:
            VerificationError: They do not, or in another way.
            LwcError: The file cannot be written.
        """
        save(self.module, path)
        found = self.trial.run(load(path), self.passes)
        if found is None or not self.failure.same_as(found):
            how = "do not fail" if found is None else f"fail otherwise ({found.kind})"
            raise VerificationError(
                f"is the reduced model, but the passes {how} on it once it is read back",
                file=path,
                remedy="write a .onnx file",
            )
        return found


def reproduce(
    module: Module,
    passes: Sequence[Pass],
    trial: Trial,
    *,
    seconds: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Reproducer | None:
    """Find how passes fail on a module, and make both small; None where nothing fails.

    Where more than one pass is needed, those before the failing one are applied to the module
    for good if the last then fails by itself. What the backend ran before must run after: a
    pass may fail on nonsense.

    Args:
        module: The module; it is not changed.
        passes: The pipeline.
        trial: How to try passes.
        seconds: See `reduce_module`.
        progress: See `reduce_module`.

    Raises:
        LwcError: The module is malformed, or an option of a pass does not fit it; or nothing
            fails, and the outputs to compare are not to be had, as the backend refuses the module.
    """
    verify_structure(module)
    begin = time.perf_counter()
    refusal = trial.refusal(module)
    # What is cut down may never end where the module did.
    limit = limit_after(time.perf_counter() - begin)
    runs = refusal is None
    wanted, trial = trial.numeric, replace(trial, numeric=trial.numeric and runs)
    failure = trial.run(module, passes)
    trial = replace(trial, limit=min(limit, trial.limit))
    if failure is None:
        if wanted and refusal is not None:
            raise LwcError(
                f"no pass fails, but outputs were not compared: {refusal}",
                remedy="--verify=structural compares none",
            ) from refusal
        return None

    # Those that the numeric check finds have run before the pass.
    must_run = runs and failure.kind not in ("numeric", "unrunnable")

    def fails(candidate: Module, chosen: Sequence[Pass]) -> bool:
        try:
            found = trial.run(candidate, chosen)
        except LwcError:
            return False
        return failure.same_as(found) and (not must_run or trial.runs(candidate))

    left = reduce_pipeline(passes, lambda chosen: fails(module, chosen))
    start = module
    if len(left) > 1:
        between = _applied(module, left[:-1], trial)
        if between is not None and fails(between, left[-1:]):
            start, left = between, left[-1:]
    small = reduce_module(
        start, lambda candidate: fails(candidate, left), seconds=seconds, progress=progress
    )
    return Reproducer(small, tuple(left), failure, trial, count_nodes(module), len(passes))


def _applied(module: Module, passes: Sequence[Pass], trial: Trial) -> Module | None:
    """Return what passes make of a module, or None where one of them fails."""
    twin = module.clone()
    try:
        PassManager(passes).run(twin, trial.context(AnalysisManager(twin)))
    except LwcError:
        return None
    return twin
