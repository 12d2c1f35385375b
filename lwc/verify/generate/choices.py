"""Choices drawn from hypothesis, the simplest option first."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

__all__ = ["Choices"]

ItemT = TypeVar("ItemT")


class Choices:
    """Draws; hypothesis shrinks each towards the option that is named simplest.

    Args:
        draw: What `hypothesis.strategies.composite` hands in.
    """

    def __init__(self, draw: DrawFn) -> None:
        self.draw = draw

    def choose(self, *options: ItemT) -> ItemT:
        """Draw one of the options; the first is the simplest."""
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return self.draw(st.integers(low, high))

    def flip(self) -> bool:
        """Draw true or false; false is the simpler."""
        return self.draw(_FLIP)

    def rarely(self) -> bool:
        """Draw true about once in eight times."""
        return self.draw(_RARELY)

    def permutation(self, count: int) -> list[int]:
        """Draw an order of the numbers below `count`."""
        return list(self.draw(st.permutations(range(count))))


_FLIP = st.booleans()
_RARELY = st.integers(0, 7).map(lambda number: number == 7)
