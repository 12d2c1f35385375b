"""`--check-contract`: hold each pass of a pipeline to its whole contract on one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lwc.core.errors import UsageError
from lwc.pipeline.spec import to_spec

if TYPE_CHECKING:
    from lwc.calibration.feeds import FeedSpec
    from lwc.core.module import Module
    from lwc.pipeline.config import PipelineConfig
    from lwc.verify.contract.clauses import ContractOutcome

__all__ = ["check_lines"]


def check_lines(
    module: Module, config: PipelineConfig, feeds: FeedSpec
) -> Iterator[tuple[str, bool]]:
    """Check each pass on what the passes before it made of `module`, which is changed.

    Args:
        module: The module.
        config: The passes and the settings of the run.
        feeds: What is known of the inputs.

    Yields:
        One line for each pass, and whether it kept its contract. One that refuses leaves the
        module to those behind it; after one that breaks its contract, none is checked.

    Raises:
        UsageError: There are no passes.
        LwcError: The module is malformed or does not run.
    """
    from lwc.analysis.manager import AnalysisManager
    from lwc.backends.onnxruntime.session import make_runner
    from lwc.optimizer import bind_pass
    from lwc.pipeline.manager import PassManager
    from lwc.pipeline.passes import PassContext
    from lwc.verify.contract.clauses import ContractSettings, ContractViolation, check_contract

    passes = (*bind_pass(config.bind), *config.passes)
    if not passes:
        raise UsageError("--check-contract needs passes to check", remedy="add -p PIPELINE")
    settings = ContractSettings(feeds, granted=frozenset(config.grant), seed=config.seed)
    for number, pass_ in enumerate(passes, 1):
        name = f"{number:>2} {to_spec(pass_)}"
        try:
            outcome = check_contract(pass_, module, settings)
        except ContractViolation as violation:
            rules = ", ".join(f"{rule} x{count}" for rule, count in violation.rewrites.items())
            done = f" (its rewrites: {rules})" if rules else ""
            yield f"{name}: BROKEN, {violation.clause}: {violation.message}{done}", False
            return
        yield f"{name}: {_words(outcome)}", True
        if not outcome.changed:
            continue
        ctx = PassContext(
            AnalysisManager(module),
            make_runner=make_runner,
            max_memory=config.max_memory,
            seed=config.seed,
            granted=settings.granted,
        )
        PassManager([pass_], verify="none", rollback=False).run(module, ctx)


def _words(outcome: ContractOutcome) -> str:
    if outcome.refused is not None:
        return f"refuses, and leaves the module as it was: {outcome.refused}"
    if not outcome.changed:
        return "keeps its contract; it changed nothing"
    if outcome.skipped is not None:
        return f"keeps the rest of its contract; outputs not compared: {outcome.skipped}"
    wide = ", in float64 too" if outcome.float64 else ""
    return f"keeps its contract; outputs compared on {outcome.feeds} feeds{wide}"
