"""What a cache keeps: everything, a window of recent tokens, or those that got most attention.

Keys are kept as they were turned, and new tokens are told their true positions: dropping entries
moves no token. The order of entries means nothing to attention, so that the place of a dropped
entry is filled with a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from lwc.backends.decoding import Moves
from lwc.core.errors import UsageError

__all__ = ["CachePolicy", "FullCache", "HeavyHitters", "Tracker", "WindowCache"]

Array: TypeAlias = np.ndarray[Any, Any]


class Tracker(Protocol):
    """Follows what one cache holds, and says what to drop."""

    def seen(self, positions: Array, masses: Array | None) -> Moves | None:
        """Take note of a step, and return how the cache is cut after it, if it is.

        Args:
            positions: Those of the new tokens, `[new]`.
            masses: The attention that all entries got in the step, `[layers, heads, cached]`.
        """


@dataclass(frozen=True)
class FullCache:
    """Keep every token."""

    @property
    def budget(self) -> int | None:
        """Tokens kept after a step; None keeps all."""
        return None

    @property
    def weighs(self) -> bool:
        """Whether attention is counted."""
        return False

    def tracker(self, layers: int, heads: int) -> Tracker | None:
        """Return what follows a cache; None where nothing is dropped."""
        return None


@dataclass(frozen=True)
class WindowCache:
    """Keep the last tokens, and the first ones, which attention falls back on.

    The first tokens are the attention sinks of Xiao et al., Efficient Streaming Language Models
    with Attention Sinks, 2023. There, positions are those in the cache; here, the true ones.

    Attributes:
        window: Tokens kept, the first ones among them.
        sink: Of these, how many first ones.
    """

    window: int
    sink: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.sink < self.window:
            raise UsageError(
                f"a window of {self.window} tokens cannot keep the first {self.sink} "
                "and a recent one"
            )

    @property
    def budget(self) -> int | None:
        """Tokens kept after a step."""
        return self.window

    @property
    def weighs(self) -> bool:
        """Whether attention is counted."""
        return False

    def tracker(self, layers: int, heads: int) -> Tracker | None:
        """Return what follows a cache."""
        return _WindowTracker(self.window, self.sink)


@dataclass(frozen=True)
class HeavyHitters:
    """Keep the last tokens and, in each layer and head, those that got most attention.

    Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models, 2023, algorithm 1: attention probabilities are summed over all steps that an entry has
    seen, and with each token too many the entry with the smallest sum goes for good.

    Attributes:
        heavy: Tokens kept for their attention.
        recent: Last tokens kept.
    """

    heavy: int
    recent: int

    def __post_init__(self) -> None:
        if self.heavy < 1 or self.recent < 1:
            raise UsageError(
                f"{self.heavy} heavy hitters and {self.recent} recent tokens: both are at least 1"
            )

    @property
    def budget(self) -> int | None:
        """Tokens kept after a step."""
        return self.heavy + self.recent

    @property
    def weighs(self) -> bool:
        """Whether attention is counted."""
        return True

    def tracker(self, layers: int, heads: int) -> Tracker | None:
        """Return what follows a cache."""
        return _HeavyTracker(self.heavy + self.recent, self.recent, layers, heads)


CachePolicy: TypeAlias = FullCache | WindowCache | HeavyHitters


class _WindowTracker:
    """All layers and heads hold the same tokens."""

    def __init__(self, budget: int, sink: int) -> None:
        self._budget, self._sink = budget, sink
        self._held = np.zeros((1, 1, 0), np.int64)

    def seen(self, positions: Array, masses: Array | None) -> Moves | None:
        self._held = np.concatenate([self._held, positions[None, None]], axis=2)
        surplus = self._held.shape[2] - self._budget
        if surplus <= 0:
            return None
        age = np.where(self._held < self._sink, np.iinfo(np.int64).max, self._held)
        moves = _moves(_smallest(age, surplus), self._budget, surplus)
        self._held = _moved(self._held, moves)
        return moves


class _HeavyTracker:
    """Every layer and head holds tokens of its own."""

    def __init__(self, budget: int, recent: int, layers: int, heads: int) -> None:
        self._budget, self._recent = budget, recent
        self._held = np.zeros((layers, heads, 0), np.int64)
        self._mass = np.zeros((layers, heads, 0))

    def seen(self, positions: Array, masses: Array | None) -> Moves | None:
        assert masses is not None
        layers, heads, old = self._held.shape
        new = len(positions)
        fresh = np.broadcast_to(positions, (layers, heads, new))
        self._held = np.concatenate([self._held, fresh], axis=2)
        total = masses.astype(np.float64)
        total[..., :old] += self._mass
        self._mass = total
        surplus = old + new - self._budget
        if surplus <= 0:
            return None
        recent = self._held > positions[-1] - self._recent
        moves = _moves(_smallest(np.where(recent, np.inf, total), surplus), self._budget, surplus)
        self._held, self._mass = _moved(self._held, moves), _moved(total, moves)
        return moves


def _smallest(numbers: Array, count: int) -> Array:
    """Return where the `count` smallest numbers of each head are, `[layers, heads, count]`."""
    if count == 1:
        return np.asarray(numbers.argmin(axis=2)[..., None])
    return np.argpartition(numbers, count - 1, axis=2)[..., :count]


def _moves(dropped: Array, budget: int, surplus: int) -> Moves:
    """Return how entries behind the budget fill the places of those dropped before it.

    Args:
        dropped: Entries that go, `[layers, heads, surplus]`.
        budget: Entries that stay.
        surplus: Entries behind the budget.
    """
    if dropped.max() < budget:
        entries = np.broadcast_to(np.arange(budget, budget + surplus), dropped.shape)
        return Moves(budget, dropped, entries)
    kept = np.ones((*dropped.shape[:2], budget + surplus), bool)
    np.put_along_axis(kept, dropped, False, axis=2)
    counts = (~kept[..., :budget]).sum(axis=2)
    wide = int(counts.max())
    places = np.argsort(kept[..., :budget], axis=2, kind="stable")[..., :wide]
    entries = budget + np.argsort(~kept[..., budget:], axis=2, kind="stable")[..., :wide]
    # A head with fewer moves repeats its first one; one with none puts an entry where it is.
    missing = np.arange(wide) >= counts[..., None]
    none = np.zeros_like(places[..., :1])
    still = counts[..., None] == 0
    places = np.where(missing, np.where(still, none, places[..., :1]), places)
    entries = np.where(missing, np.where(still, none, entries[..., :1]), entries)
    return Moves(budget, places, entries)


def _moved(held: Array, moves: Moves) -> Array:
    """Return what is known of entries after the moves, `[layers, heads, kept]`."""
    after = held[..., : moves.kept].copy()
    taken = np.take_along_axis(held, moves.entries, axis=2)
    np.put_along_axis(after, moves.places, taken, axis=2)
    return after
