"""The graphs that a pass is checked on unless others are given.

Most motifs are nothing to most passes. So each motif is first tried alone, and then every rule
that was seen to apply, or nearly, gets the same share of the draws, for the motifs that lead to it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import hypothesis
from hypothesis import strategies as st

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import LwcError
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import PassContext
from lwc.pipeline.rule_pass import RulePass
from lwc.rewrite.patterns import PatternRule
from lwc.verify.generate.grammar import GRAMMAR
from lwc.verify.generate.motifs import MOTIFS
from lwc.verify.generate.near_misses import with_near_misses
from lwc.verify.generate.patterns import is_matchable, matching, pattern_motif
from lwc.verify.generate.sketch import Motif, sketches

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass

__all__ = ["graphs_for"]

_TRIALS = 8
"""Graphs of each motif that the pass is tried on."""

_SHARE = 8
"""Draws for each rule, where each motif gets one for itself."""

_STEPS = (1, 4)


def graphs_for(pass_: Pass) -> SearchStrategy[Module]:
    """Return the strategy of graphs for a pass, near misses among them.

    The graphs are made of random operators and motifs of real models; two of three for a pass
    made of pattern rules are made from its patterns.
    """
    patterns = [rule for rule in _pattern_rules(pass_) if is_matchable(rule)]
    motifs = [*GRAMMAR, *MOTIFS, *map(pattern_motif, patterns)]
    interests = [_interests(pass_, each) for each in motifs]
    sketched = sketches(_weighted(motifs, interests), steps=_STEPS, evenly=True)
    usual = with_near_misses(sketched, most=1, evenly=True)
    matches = [matching(rule, evenly=True) for rule in patterns]
    return st.one_of(*matches, *matches, *([usual] * max(1, len(matches))))


def _pattern_rules(pass_: Pass) -> list[PatternRule]:
    """Return the pattern rules of a pass, if it is made of rules."""
    rules = pass_.find_rules() if isinstance(pass_, RulePass) else ()
    made = [rule() if isinstance(rule, type) else rule for rule in rules]
    return [rule for rule in made if isinstance(rule, PatternRule)]


def _weighted(motifs: Sequence[Motif], interests: Sequence[Counter[str]]) -> list[Motif]:
    """Repeat motifs so that each rule gets an equal share of the draws.

    Args:
        motifs: The motifs.
        interests: For each of them, how likely a node of it leads to which rule.
    """
    chosen = list(motifs)
    for rule in sorted(set().union(*interests)):
        scores = [found[rule] for found in interests]
        total = sum(scores)
        best = sorted(range(len(motifs)), key=lambda index: -scores[index])[:_SHARE]
        for index in best:
            chosen += [motifs[index]] * round(_SHARE * scores[index] / total)
    return chosen


def _interests(pass_: Pass, motif: Motif) -> Counter[str]:
    """Return how often a motif makes the pass apply each rule, or nearly, per node."""
    found: Counter[str] = Counter()
    nodes = 1

    @hypothesis.settings(
        max_examples=_TRIALS,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        deadline=None,
        database=None,
        derandomize=True,
    )
    @hypothesis.given(sketches([motif], steps=(1, 1), evenly=True))
    def try_alone(module: Module) -> None:
        nonlocal nodes
        nodes += module.graph.num_nodes()
        manager = PassManager([pass_], verify="none", rollback=False)
        try:
            (record,) = manager.run(module, PassContext(AnalysisManager(module))).passes
        except LwcError:
            found["failure"] += 1
            return
        rules = {*record.rewrites, *(f"missed {remark.rule}" for remark in record.missed)}
        found.update(rules or ({"change"} if record.changed else ()))

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        try_alone()
    # By size: a small graph that leads to a rule is checked sooner than a large one.
    return Counter({rule: count / nodes for rule, count in found.items()})
