"""The grammar of small steps that random graphs are grown from.

Many steps do their work in a roundabout way that undoes itself: that is where rewriting finds
something to do.
"""

from __future__ import annotations

from lwc.verify.generate import arithmetic_steps, layout_steps
from lwc.verify.generate.sketch import Motif

__all__ = ["GRAMMAR"]

GRAMMAR: tuple[Motif, ...] = tuple(
    Motif(step.__name__.replace("_", "-"), step)
    for step in (*arithmetic_steps.STEPS, *layout_steps.STEPS)
)
