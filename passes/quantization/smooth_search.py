"""The power of SmoothQuant's factors that int8 products of an activation lose least with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lwc.passes.quantization.channel_places import Place
from lwc.passes.quantization.int8_rounding import per_channel, per_token
from lwc.passes.quantization.weight_uses import matrix

__all__ = ["ROWS", "Found", "search"]

Array: TypeAlias = "np.ndarray[Any, Any]"

ROWS = 512
"""Rows of an activation that are looked at; taken at random from all of the calibration data."""

_POWERS = np.arange(21) / 20

_GAIN = 0.99
"""Factors must bring the error below this share of what it is without any. A second run starts from
the best of the grid and stays there: its factors lead to the same grid again."""


class Found(NamedTuple):
    """What a search found.

    Attributes:
        alpha: The power; None where it is best to leave the activation alone.
        factors: What each channel is divided by, float64 `[channels]`.
        error: Squared error of the outputs over that without factors.
    """

    alpha: float | None
    factors: Array
    error: float


def search(x: Array, weights: Sequence[Place], factors_of: Callable[[float], Array]) -> Found:
    """Try powers 0, 0.05, ... 1 and no factors; take the least squared error of all outputs.

    Activations are rounded per row and weights per output, both to ±127 steps.

    Args:
        x: Rows of the activation, `[rows, channels]`.
        weights: Of all layers that read it.
        factors_of: Gives the factors of a power, `[channels]`.
    """
    matrices = [_content(place) for place in weights]
    outputs = [x @ each for each in matrices]
    plain = _error(x, matrices, outputs, np.ones(x.shape[1], np.float32))
    best = Found(None, np.ones(x.shape[1]), 1.0)
    for power in _POWERS:
        factors = factors_of(float(power))
        error = _error(x, matrices, outputs, factors.astype(np.float32))
        if error < best.error * plain and error < _GAIN * plain:
            best = Found(float(power), factors, error / plain)
    return best


def _error(x: Array, weights: list[Array], outputs: list[Array], factors: Array) -> float:
    rounded = per_token(x / factors)
    total = 0.0
    for weight, wanted in zip(weights, outputs, strict=True):
        difference = rounded @ per_channel(weight * factors[:, None])
        difference -= wanted
        total += float(np.vdot(difference, difference))
    return total


def _content(place: Place) -> Array:
    tensor = place.source.const_value
    assert tensor is not None
    return matrix(tensor, place.axis == 1, np.float32)
