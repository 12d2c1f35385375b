"""Near misses: graphs that differ a little from one that a rewrite should match.

A rewrite that forgets one of its conditions rewrites a near miss as well, and changes what the
graph computes.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.control import currently_in_test_context

from lwc.core.module import Module
from lwc.verify.generate.choices import Choices, even_source
from lwc.verify.generate.mutant import Mutant
from lwc.verify.generate.mutations import MUTATIONS
from lwc.verify.generate.retyping import mixed_constant, retyped
from lwc.verify.generate.validity import is_valid, restate

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["mutate", "with_near_misses"]

_TRIES = 5


def mutate(draw: DrawFn, module: Module, source: random.Random | None = None) -> Module:
    """Return a near miss of a module: the same graph with one small change, and valid.

    The module itself is not touched; where no change that was drawn leaves the graph valid, or
    where it holds a Loop, it is returned as it is.

    Args:
        draw: What `hypothesis.strategies.composite` hands in.
        module: A valid module.
        source: Where the choices come from; see `Choices`.
    """
    if any(node.op_type == "Loop" for node in module.nodes()):
        return module  # a small change to what ends a loop, and it never ends
    mutations = [retyped, mixed_constant, *MUTATIONS]
    for _ in range(_TRIES):
        mutation = Choices(draw, source).choose(*mutations)
        mutations.remove(mutation)
        twin = module.clone()
        change = mutation(Mutant(draw, twin, source))
        if change is None:
            continue
        twin.forget_names()
        restate(twin)
        if is_valid(twin):
            if currently_in_test_context():
                note(f"near miss: {change}")
            return twin
    return module


def with_near_misses(
    strategy: SearchStrategy[Module], *, most: int = 2, evenly: bool = False
) -> SearchStrategy[Module]:
    """Return a strategy of the graphs of another one and of their near misses.

    Args:
        strategy: Draws valid modules.
        most: The largest number of changes.
        evenly: See `sketches`.
    """

    @st.composite
    def changed(draw: DrawFn) -> Module:
        module = draw(strategy)
        source = even_source(draw, evenly)
        for _ in range(Choices(draw, source).integer(0, most)):
            module = mutate(draw, module, source)
        return module

    return changed()
