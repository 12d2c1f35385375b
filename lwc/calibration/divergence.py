"""How far the outputs of a changed model are from those of the original, as one number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["Reference", "kl_divergence", "probabilities"]

Array = np.ndarray[Any, Any]

_TILE = 1 << 18
"""Elements worked on at once."""

_FAR = 80.0
"""Differences of logits up to which float32 holds the exponential."""

_LEAST = np.nextafter(-1.0, 0.0)


class Reference:
    """The outputs of the original model on some feeds.

    Args:
        outputs: For each feed, float outputs by name; they are held.
        logits: The outputs whose last axis holds logits.
    """

    def __init__(self, outputs: Iterable[Mapping[str, Array]], logits: frozenset[str]) -> None:
        self._outputs = [dict(each) for each in outputs]
        self._chances = [
            {name: probabilities(each[name]) for name in logits} for each in self._outputs
        ]

    def distance(self, results: Iterable[Mapping[str, Array]]) -> float:
        """Return how far other outputs are, over all feeds.

        Outputs that `results` lack are the same. Logits: KL divergence of the softmax of the
        result from that of the original, in nats, mean over positions. Others: squared error
        over the sum of squares. Several outputs: the sum.
        """
        sums: dict[str, Array] = {}
        for result, outputs, chances in zip(results, self._outputs, self._chances, strict=True):
            for name, found in result.items():
                expected = outputs[name]
                if name in chances:
                    each = kl_divergence(expected, chances[name], found)
                    new = np.array([each.sum(), each.size])
                else:
                    off = found.astype(np.float64) - expected
                    new = np.array([np.vdot(off, off), _squares(expected)])
                sums[name] = sums.get(name, np.zeros(2)) + new
        return float(sum(_quotient(*each) for each in sums.values()))


def probabilities(logits: Array) -> Array:
    """Return the softmax over the last axis, float32."""
    rows = logits.reshape(-1, logits.shape[-1])
    made = np.empty(rows.shape, np.float32)
    for part in _parts(rows):
        tile = made[part]
        np.subtract(rows[part], rows[part].max(axis=1, keepdims=True), out=tile)
        np.exp(tile, out=tile)
        tile /= tile.sum(axis=1, keepdims=True, dtype=np.float64)
    return made.reshape(logits.shape)


def kl_divergence(expected: Array, chances: Array, found: Array) -> Array:
    """Return KL(softmax(expected) || softmax(found)) of each row, float64, `[rows]`.

    With d = found - expected and p = softmax(expected) it is log E_p[exp d] - E_p[d]. Once E_p[d]
    is taken off d, both terms are of second order in d, and nothing cancels: float32 suffices.

    Args:
        expected: Logits `[..., classes]`.
        chances: Their softmax.
        found: The other logits.
    """
    classes = expected.shape[-1]
    rows, weights, others = (each.reshape(-1, classes) for each in (expected, chances, found))
    divergence = np.empty(len(rows))
    for part in _parts(rows):
        p = weights[part]
        d = np.subtract(others[part], rows[part], dtype=np.float32)
        d -= np.einsum("rc,rc->r", p, d)[:, None]
        mean = np.einsum("rc,rc->r", p, d).astype(np.float64)
        # Where the exponential would overflow, the largest term is taken out of it.
        top = np.maximum(d.max(axis=1) - _FAR, 0)
        far = top > 0
        d[far] -= top[far, None]
        np.expm1(d, out=d)
        grown = np.einsum("rc,rc->r", p, d).astype(np.float64)
        divergence[part] = np.log1p(np.maximum(grown, _LEAST)) + top - mean
    return np.maximum(divergence, 0)


def _parts(rows: Array) -> list[slice]:
    step = max(1, _TILE // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _squares(array: Array) -> float:
    wide = array.astype(np.float64)
    return float(np.vdot(wide, wide))


def _quotient(error: float, whole: float) -> float:
    """Return what share of `whole` is wrong; infinite where nothing should be there."""
    if whole > 0:
        return error / whole
    return 0.0 if error == 0 else np.inf
