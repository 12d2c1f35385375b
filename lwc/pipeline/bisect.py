"""Bisection: which pass of a pipeline first goes wrong, and which of its rewrites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import PassError, VerificationError
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Approximate, Contract, Exact, Lossy, Pass, PassContext, Verify
from lwc.pipeline.spec import to_spec
from lwc.verify.structure.well_formed import verify_structure

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.instruments import History
    from lwc.pipeline.manager import NumericCheck
    from lwc.rewrite import RewriteLimit

__all__ = ["Culprit", "CulpritRewrite", "bisect"]


@dataclass(frozen=True)
class CulpritRewrite:
    """The first rewrite of a pass after which it is wrong.

    Attributes:
        number: Its number in the pass's run, from 1.
        total: Rewrites of the whole run.
        rule: The rule, or what the pass calls this kind of rewrite.
        node: The node it started at.
    """

    number: int
    total: int
    rule: str
    node: str | None


@dataclass(frozen=True)
class Culprit:
    """The first pass that is wrong.

    Attributes:
        index: Its position in the pipeline, from 0.
        spec: The pass as text.
        message: How the outputs differ, or what verification says.
        node: Where, if the check could tell.
        broken: Whether the pass does not pass verification; otherwise the outputs differ.
        rewrite: The first wrong rewrite, or None where none can be named.
        why_no_rewrite: Why none can be named.
    """

    index: int
    spec: str
    message: str
    node: str | None
    broken: bool = False
    rewrite: CulpritRewrite | None = None
    why_no_rewrite: str | None = None


def bisect(
    history: History,
    check: NumericCheck,
    make_context: Callable[[Module], PassContext] | None = None,
) -> Culprit | None:
    """Find the first pass after which the outputs differ from the input's, and its rewrite.

    A lossy pass changes the outputs by design, so the search starts anew after it: the passes
    behind it are compared with its result. Of the lossy pass itself `check` sees whether the
    model still runs and gives outputs of the same shapes. Between two lossy passes the number of
    checks grows with the logarithm of the number of passes, within a pass the number of runs and
    checks with that of its rewrites. Outputs that differ and later agree again are not seen.

    A pass at which the run ended because it did not pass verification is searched as well.

    Args:
        history: What an instrumented run kept.
        check: Compares two modules.
        make_context: Makes what passes may use for a module, to run one again.

    Returns:
        The pass, or None when all outputs agree.
    """
    make_context = make_context or (lambda module: PassContext(AnalysisManager(module)))
    done = len(history.modules) - 1
    for start, end in _segments(history.passes[:done]):
        culprit = _search(history, start, end, check)
        if culprit is not None:

            def differs(after: Module, start: int = start, index: int = culprit.index) -> None:
                verify_structure(after)
                contract = _sum_contract(history.passes[start : index + 1])
                check(history.modules[start], after, contract)

            return _refine(culprit, _Rerun(history, culprit.index, make_context, differs))
    error = history.failure
    if not isinstance(error, VerificationError):
        return None
    spec = to_spec(history.passes[done])
    message = error.message.removeprefix(f"pass '{history.passes[done].name}': ")
    culprit = Culprit(done, spec, message, error.node, broken=True)
    return _refine(culprit, _Rerun(history, done, make_context, None))


def _segments(passes: Sequence[Pass]) -> Iterator[tuple[int, int]]:
    """Yield the first pass of each stretch to search, and the one after its last.

    A lossy pass is a stretch of its own.
    """
    start = 0
    for index, pass_ in enumerate(passes):
        if isinstance(pass_.contract, Lossy):
            yield start, index
            yield index, index + 1
            start = index + 1
    yield start, len(passes)


def _search(history: History, start: int, end: int, check: NumericCheck) -> Culprit | None:
    """Bisect among the passes `start` to `end - 1`: a lossy one, or some of which none is."""
    failure = _difference(history, start, end, check)
    if failure is None:
        return None
    good, bad = start, end
    while bad - good > 1:
        middle = (good + bad) // 2
        found = _difference(history, start, middle, check)
        if found is None:
            good = middle
        else:
            bad, failure = middle, found
    return Culprit(bad - 1, to_spec(history.passes[bad - 1]), failure.message, failure.node)


def _difference(
    history: History, start: int, end: int, check: NumericCheck
) -> VerificationError | None:
    before, after = history.modules[start], history.modules[end]
    if before is after:
        return None
    try:
        check(before, after, _sum_contract(history.passes[start:end]))
    except VerificationError as error:
        return error
    return None


def _sum_contract(passes: Sequence[Pass]) -> Contract:
    """Add up the errors that approximate passes state; a lossy pass stands alone."""
    if len(passes) == 1:
        return passes[0].contract
    stated = [p.contract for p in passes if isinstance(p.contract, Approximate)]
    if not stated:
        return Exact()
    return Approximate(sum(c.rtol for c in stated), sum(c.atol for c in stated))


@dataclass(frozen=True)
class _Rerun:
    """Runs one pass again on the module before it, up to a number of rewrites.

    Attributes:
        history: See `bisect`.
        index: The pass.
        make_context: See `bisect`.
        judge: Raises where the result is wrong; without it the manager's own verification judges.
    """

    history: History
    index: int
    make_context: Callable[[Module], PassContext]
    judge: Callable[[Module], None] | None

    def __call__(self, allowed: int | None) -> tuple[RewriteLimit, VerificationError | None]:
        """Return the rewrites that happened, and what is wrong after them.

        A run that raises is wrong, too: what it met is the work of its own earlier rewrites. A
        whole run that counts nothing is not judged, as there is nothing to search.
        """
        from lwc.rewrite import RewriteLimit

        module = self.history.modules[self.index].clone()
        ctx = self.make_context(module)
        ctx.limit = limit = RewriteLimit(allowed)
        verify: Verify = "structural" if self.judge is None else "none"
        manager = PassManager([self.history.passes[self.index]], verify=verify, rollback=False)
        try:
            manager.run(module, ctx)
            if self.judge is not None and (limit.count or allowed is not None):
                self.judge(module)
        except VerificationError as error:
            return limit, error
        except PassError as error:
            return limit, VerificationError(error.message, node=error.node)
        return limit, None


def _refine(culprit: Culprit, rerun: _Rerun) -> Culprit:
    """Name the rewrite, or say why none can be named."""
    whole, failure = rerun(None)
    total = whole.count
    why = None
    if not total:
        why = "the pass counts no rewrites, as ctx.editor() and ctx.limit would"
    elif failure is None:
        why = "running the pass a second time gives a right result: it is not deterministic"
    else:
        tried, found = rerun(0)
        if found is not None and tried.count:
            why = "it does not stop at the limit of rewrites, as ctx.limit.exhausted asks it to"
        elif found is not None:
            why = (
                "it is wrong before its first rewrite, or it does not stop at the limit: something "
                "beside what it counts is the cause"
            )
    if why is not None:
        return replace(culprit, why_no_rewrite=why)
    good, bad = 0, total
    limit, error = whole, failure
    while bad - good > 1:
        middle = (good + bad) // 2
        tried, found = rerun(middle)
        if found is None:
            good = middle
        else:
            bad, limit, error = middle, tried, found
    if limit.last is None:  # the last rewrite of all: the whole run kept no step
        limit, error = rerun(bad)
    step = limit.last
    if step is None or error is None:
        why = f"{bad} rewrites were counted at first and {limit.count} later: not deterministic"
        return replace(culprit, why_no_rewrite=why)
    found_at = CulpritRewrite(bad, total, step.rule, step.node)
    message = error.message.removeprefix(f"pass '{rerun.history.passes[rerun.index].name}': ")
    return replace(culprit, rewrite=found_at, message=message, node=error.node)
