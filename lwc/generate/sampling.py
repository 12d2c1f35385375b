"""The next token from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lwc.core.errors import LwcError, UsageError

__all__ = ["Sampler", "Sampling"]

Array: TypeAlias = np.ndarray[Any, Any]

_FIRST = 256
"""Most likely tokens looked at first for `top_p`; sorting the whole vocabulary takes longer."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Filters apply in this order: temperature, `top_k`, `top_p`.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Draw from so many most likely tokens; of those that are equal, the first ones.
        top_p: Draw from the fewest most likely tokens that have this probability together.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"the temperature is at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k is at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p lies above 0 and up to 1, not at {self.top_p}")
        if self.seed < 0:
            raise UsageError(f"the seed is at least 0, not {self.seed}")


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def draw(self, logits: Array) -> int:
        """Return a token.

        Args:
            logits: `[vocabulary]`.

        Raises:
            LwcError: They are not numbers.
        """
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise LwcError(
                f"the model's largest logit is {logits[best]}",
                remedy="check the model with lwc-opt --verify=numeric",
            )
        if self._sampling.temperature == 0:
            return best
        tokens, weights = self._candidates(logits, float(logits[best]))
        sums = np.cumsum(weights)
        place = np.searchsorted(sums, self._rng.random() * sums[-1], side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])

    def _candidates(self, logits: Array, best: float) -> tuple[Array, Array]:
        """Return the tokens to draw from, most likely first where filtered, and their weights."""
        with np.errstate(over="ignore"):  # minus infinity, whose weight is 0
            weights = np.exp((logits.astype(np.float64) - best) / self._sampling.temperature)
        count = len(weights) if self._sampling.top_k is None else self._sampling.top_k
        if self._sampling.top_p is None:
            if count >= len(weights):
                return np.arange(len(weights)), weights
            tokens = _most_likely(weights, count)
            return tokens, weights[tokens]
        count = min(count, len(weights))
        narrow = min(count, _FIRST)
        if count < len(weights):
            total = weights[_most_likely(weights, count)].sum()
        else:
            total = weights.sum()
        while True:
            tokens = _most_likely(weights, narrow)
            sums = np.cumsum(weights[tokens])
            if narrow == count or sums[-1] >= self._sampling.top_p * total:
                break
            narrow = min(count, 8 * narrow)
        needed = int(np.searchsorted(sums, self._sampling.top_p * total, side="left")) + 1
        tokens = tokens[:needed]
        return tokens, weights[tokens]


def _most_likely(weights: Array, count: int) -> Array:
    """Return the `count` tokens of most weight, most first, then by number."""
    if count < len(weights):
        least = np.partition(weights, -count)[-count]
        above = np.flatnonzero(weights > least)
        found = np.concatenate([above, np.flatnonzero(weights == least)[: count - len(above)]])
    else:
        found = np.arange(len(weights))
    return found[np.argsort(-weights[found], kind="stable")]
