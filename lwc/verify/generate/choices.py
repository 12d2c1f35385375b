"""Choices drawn from hypothesis, the simplest option first."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

__all__ = ["Choices", "even_source"]

ItemT = TypeVar("ItemT")


class Choices:
    """Draws; hypothesis shrinks each towards the option that is named simplest.

    Args:
        draw: What `hypothesis.strategies.composite` hands in.
        source: Where the choices come from instead: even, and several times as fast, since
            hypothesis does not hear of them. It favours the first options and what it drew
            before, and cannot shrink what it did not draw.
    """

    def __init__(self, draw: DrawFn, source: random.Random | None = None) -> None:
        self.draw = draw
        self.source = source

    def choose(self, *options: ItemT) -> ItemT:
        """Draw one of the options; the first is the simplest."""
        if self.source is not None:
            return self.source.choice(options)
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        if self.source is not None:
            return self.source.randint(low, high)
        return self.draw(st.integers(low, high))

    def flip(self) -> bool:
        """Draw true or false; false is the simpler."""
        if self.source is not None:
            return self.source.random() < 0.5
        return self.draw(_FLIP)

    def rarely(self) -> bool:
        """Draw true about once in eight times."""
        if self.source is not None:
            return self.source.random() < 0.125
        return self.draw(_RARELY)

    def permutation(self, count: int) -> list[int]:
        """Draw an order of the numbers below `count`."""
        if self.source is not None:
            return self.source.sample(range(count), count)
        return list(self.draw(st.permutations(range(count))))


def even_source(draw: DrawFn, evenly: bool) -> random.Random | None:
    """Return a source of even choices, its seed drawn from hypothesis, or None."""
    return random.Random(draw(_SEEDS)) if evenly else None


_SEEDS = st.integers(0, 2**32 - 1)
_FLIP = st.booleans()
_RARELY = st.integers(0, 7).map(lambda number: number == 7)
