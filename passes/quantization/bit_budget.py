"""Choosing one of several sizes for each of many things under a bound on their sum, exactly.

That is the multiple-choice knapsack. It is solved by dynamic programming over the sums that are
possible: one thing after the other, keeping of all partial choices those that no other beats in
both size and cost. The relaxation of the bound (Lagrange) says what the rest costs at least, and
what cannot become better than a choice already known is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Option", "choose"]

Array = np.ndarray[Any, Any]

_SLACK = 1e-9
"""Relative: sums of costs in another order differ by less."""


_HALVINGS = 120
"""Of the interval in which the price lies; it is then known to 1e-36 of the largest cost."""


class Option(NamedTuple):
    """One way to have a thing.

    Attributes:
        size: What it takes.
        cost: What it costs, not negative.
    """

    size: int
    cost: float


def choose(things: Sequence[Sequence[Option]], limit: int) -> list[int] | None:
    """Return which option of each thing to take, so that the sum of costs is least.

    Of equal costs the smaller sum of sizes is taken, of equal ones the earlier option.

    Args:
        things: At least one option each.
        limit: What the sizes may sum to.

    Returns:
        Indices, or None where even the smallest options exceed the limit.
    """
    smallest = [min(option.size for option in options) for options in things]
    if sum(smallest) > limit:
        return None
    price, bound = _relaxed(things, limit)
    after_size = _sums_behind([float(size) for size in smallest])
    after_cost = _sums_behind([min(o.cost + price * o.size for o in opts) for opts in things])
    slack = _SLACK * (bound + price * limit)
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Array, Array]] = []
    for index, options in enumerate(things):
        taken = np.tile(np.arange(len(options)), len(sizes))
        parent = np.repeat(np.arange(len(sizes)), len(options))
        sizes = sizes[parent] + np.array([option.size for option in options], np.int64)[taken]
        costs = costs[parent] + np.array([option.cost for option in options])[taken]
        least = costs + after_cost[index + 1] - price * (limit - sizes)
        kept = (sizes + after_size[index + 1] <= limit) & (least <= bound + slack)
        order = np.flatnonzero(kept)
        order = order[np.lexsort((costs[order], sizes[order]))]
        best = np.minimum.accumulate(costs[order])
        better = np.append(True, best[1:] < best[:-1])
        order = order[better]
        sizes, costs = sizes[order], costs[order]
        steps.append((parent[order], taken[order]))
    place, found = len(sizes) - 1, list[int]()
    for parent, taken in reversed(steps):
        found.append(int(taken[place]))
        place = int(parent[place])
    return found[::-1]


def _relaxed(things: Sequence[Sequence[Option]], limit: int) -> tuple[float, float]:
    """Return the price of a unit of size at which the sum just fits, and the cost that it has."""

    def at(price: float) -> tuple[int, float]:
        taken = [
            min(options, key=lambda o: (o.cost + price * o.size, o.size)) for options in things
        ]
        return sum(option.size for option in taken), sum(option.cost for option in taken)

    size, cost = at(0.0)
    if size <= limit:
        return 0.0, cost
    # A unit of size is then worth more than all costs: the smallest options are taken.
    low, high = 0.0, 1.0 + sum(max(option.cost for option in options) for options in things)
    best = at(high)[1]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        size, cost = at(middle)
        if size <= limit:
            high, best = middle, min(best, cost)
        else:
            low = middle
    return high, best


def _sums_behind(numbers: Sequence[float]) -> Array:
    """Return the sum of `numbers[i:]` for each i, and 0 at the end."""
    return np.append(np.cumsum(numbers[::-1])[::-1], 0.0)
