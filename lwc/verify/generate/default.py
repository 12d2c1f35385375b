"""The graphs that a pass is checked on unless others are given.

Most motifs are nothing to most passes. So each motif is first tried alone, and one that makes the
pass do what few others make it do is drawn the more often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import hypothesis

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import LwcError
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import PassContext
from lwc.verify.generate.grammar import GRAMMAR
from lwc.verify.generate.motifs import MOTIFS
from lwc.verify.generate.sketch import Motif, sketches

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass

__all__ = ["graphs_for"]

_TRIALS = 5
"""Graphs of each motif that the pass is tried on."""

_MOST = 12
"""How much oftener than others a motif is drawn at most."""

_STEPS = (1, 4)


def graphs_for(pass_: Pass) -> SearchStrategy[Module]:
    """Return the strategy of graphs for a pass: random operators and motifs of real models."""
    motifs = (*GRAMMAR, *MOTIFS)
    return sketches(_weighted(motifs, _interests(pass_, motifs)), steps=_STEPS)


def _weighted(motifs: Sequence[Motif], interests: Sequence[frozenset[str]]) -> list[Motif]:
    """Repeat each motif by how rare the rules are that it makes the pass look at."""
    common = Counter(rule for rules in interests for rule in rules)
    scores = [sum(1 / common[rule] for rule in rules) for rules in interests]
    largest = max(scores, default=0.0)
    if not largest:
        return list(motifs)
    weights = [1 + round((_MOST - 1) * min(1.0, score / (largest / 2))) for score in scores]
    return [motif for motif, weight in zip(motifs, weights, strict=True) for _ in range(weight)]


def _interests(pass_: Pass, motifs: Sequence[Motif]) -> list[frozenset[str]]:
    """Return the rules that each motif makes the pass apply, or nearly."""
    return [frozenset(_rules_of(pass_, motif)) for motif in motifs]


def _rules_of(pass_: Pass, motif: Motif) -> set[str]:
    found: set[str] = set()

    @hypothesis.settings(
        max_examples=_TRIALS,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        deadline=None,
        database=None,
        derandomize=True,
    )
    @hypothesis.given(sketches([motif], steps=(1, 1)))
    def try_alone(module: Module) -> None:
        try:
            done = PassManager([pass_], verify="none", rollback=False).run(
                module, PassContext(AnalysisManager(module))
            )
        except LwcError:
            found.add("failure")
            return
        (record,) = done.passes
        found.update(record.rewrites)
        found.update(f"missed {remark.rule}" for remark in record.missed)
        if record.changed and not record.rewrites:
            found.add("change")

    try:
        try_alone()
    except hypothesis.errors.Unsatisfiable:
        return set()
    return found
