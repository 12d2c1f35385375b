"""The graphs that a pass is checked on unless others are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lwc.verify.generate.grammar import GRAMMAR
from lwc.verify.generate.motifs import MOTIFS
from lwc.verify.generate.sketch import sketches

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass

__all__ = ["graphs_for"]


def graphs_for(pass_: Pass) -> SearchStrategy[Module]:
    """Return the strategy of graphs for a pass: random operators and motifs of real models."""
    return sketches([*GRAMMAR, *MOTIFS])
