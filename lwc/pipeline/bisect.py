"""Bisection: which pass of a pipeline first makes the outputs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lwc.core.errors import VerificationError
from lwc.pipeline.passes import Approximate, Contract, Exact, Lossy, Pass
from lwc.pipeline.spec import to_spec

if TYPE_CHECKING:
    from lwc.pipeline.instruments import History
    from lwc.pipeline.manager import NumericCheck

__all__ = ["Culprit", "bisect"]


@dataclass(frozen=True)
class Culprit:
    """The first pass after which the outputs differ.

    Attributes:
        index: Its position in the pipeline, from 0.
        spec: The pass as text.
        message: How the outputs differ.
        node: Where, if the check could tell.
    """

    index: int
    spec: str
    message: str
    node: str | None


def bisect(history: History, check: NumericCheck) -> Culprit | None:
    """Find the first pass after which the outputs differ from the input's.

    A lossy pass changes the outputs by design, so the search starts anew after it: the passes
    behind it are compared with its result. Between two lossy passes the number of checks grows
    with the logarithm of the number of passes. Outputs that differ and later agree again are
    not seen.

    Args:
        history: What an instrumented run kept.
        check: Compares two modules.

    Returns:
        The pass, or None when all outputs agree.
    """
    start = 0
    for index, pass_ in enumerate(history.passes):
        if isinstance(pass_.contract, Lossy):
            culprit = _search(history, start, index, check)
            if culprit is not None:
                return culprit
            start = index + 1
    return _search(history, start, len(history.passes), check)


def _search(history: History, start: int, end: int, check: NumericCheck) -> Culprit | None:
    """Bisect among the passes `start` to `end - 1`, none of them lossy."""
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
    """Add up the errors that approximate passes state."""
    stated = [p.contract for p in passes if isinstance(p.contract, Approximate)]
    if not stated:
        return Exact()
    return Approximate(sum(c.rtol for c in stated), sum(c.atol for c in stated))
