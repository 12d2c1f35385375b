"""Streaming statistics of activations: what quantization methods ask about a tensor.

A statistic is updated with one batch after the other and holds no batch. Channels are the last
axis: what a linear layer sums over.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["AbsMax", "Gram", "Histogram", "MeanAbs", "Sample", "Statistic"]

Array = np.ndarray[Any, Any]


class Statistic(ABC):
    """Something that is known of a tensor once all batches were seen."""

    @abstractmethod
    def update(self, batch: Array) -> None:
        """Take a batch `[..., channels]` in."""

    def state(self) -> dict[str, Array]:
        """Return all that was gathered: attributes, which are arrays, numbers or lists of them."""
        return {name: np.asarray(content) for name, content in vars(self).items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Become a statistic that has this state."""
        for name, array in state.items():
            if isinstance(getattr(self, name), list):
                setattr(self, name, list(array))
            else:
                held = isinstance(getattr(self, name), np.ndarray)
                setattr(self, name, array if held else array.item())


def _rows(batch: Array) -> Array:
    *outer, channels = batch.shape or (1,)
    return batch.reshape(math.prod(outer), channels)


class AbsMax(Statistic):
    """The largest magnitude of each channel: `value`, float32 `[channels]`, at first empty."""

    def __init__(self) -> None:
        self.value: Array = np.zeros(0, np.float32)

    def update(self, batch: Array) -> None:
        """See `Statistic`."""
        rows = _rows(batch)
        found = np.abs(rows).max(axis=0, initial=0).astype(np.float32)
        self.value = np.maximum(self.value, found) if self.value.size else found


class MeanAbs(Statistic):
    """The mean magnitude of each channel over all rows."""

    def __init__(self) -> None:
        self._sum: Array = np.zeros(0)
        self.rows = 0

    def update(self, batch: Array) -> None:
        """See `Statistic`."""
        rows = _rows(batch)
        found = np.abs(rows).sum(axis=0, dtype=np.float64)
        self._sum = self._sum + found if self._sum.size else found
        self.rows += len(rows)

    @property
    def value(self) -> Array:
        """Float32 `[channels]`; empty before the first row."""
        return (self._sum / max(self.rows, 1)).astype(np.float32)


class Gram(Statistic):
    """X·Xᵀ over all rows, and the number of `rows`.

    Batches are summed in float64. Products of a batch are float32, in half the time, of its rows
    less their mean, which is put back in the end: the rounding of channels whose mean is a thousand
    times their spread would leave a matrix that is not positive. Magnitudes from about 1e18 on have
    products beyond float32, and leave one that is not finite.
    """

    def __init__(self) -> None:
        self._centred: Array = np.zeros((0, 0))
        self._means: list[Array] = []
        self._sums: list[Array] = []
        self.rows = 0

    def update(self, batch: Array) -> None:
        """See `Statistic`."""
        rows = _rows(batch).astype(np.float32, copy=False)
        if not self._centred.size:
            self._centred = np.zeros((rows.shape[1],) * 2)
        if not len(rows):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            means = rows.mean(axis=0)
            centred = rows - means
            self._centred += centred.T @ centred
        # With y = x - m and s = Σ y: Σ x·xᵀ = Σ y·yᵀ + m·(s + n/2 m)ᵀ + (s + n/2 m)·mᵀ.
        self._means.append(means.astype(np.float64))
        self._sums.append(centred.sum(axis=0, dtype=np.float64) + len(rows) / 2 * self._means[-1])
        self.rows += len(rows)

    @property
    def value(self) -> Array:
        """Float64 `[channels, channels]`; empty before the first batch."""
        if not self.rows:
            return self._centred
        back = np.array(self._means).T @ np.array(self._sums)
        whole: Array = self._centred + (back + back.T)
        return whole


class Sample(Statistic):
    """Some of the rows, each as likely as any other, and the same ones for the same data.

    Every row draws a number; those of the smallest are kept. What is drawn depends on the number of
    rows before and not on what is in them.

    Args:
        rows: How many are kept at most.
        seed: Of the draw.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._limit = rows
        self._seed = seed
        self._seen = 0
        self._drawn: Array = np.zeros(0)
        self.value: Array = np.zeros((0, 0), np.float32)
        """Float32 `[rows, channels]`."""

    def update(self, batch: Array) -> None:
        """See `Statistic`."""
        rows = _rows(batch)
        # Made anew, so that all state is numbers: each row is one draw further.
        source = np.random.PCG64(self._seed)
        source.advance(self._seen)
        self._seen += len(rows)
        drawn = np.concatenate([self._drawn, np.random.Generator(source).random(len(rows))])
        kept = np.sort(np.argsort(drawn, kind="stable")[: self._limit])
        old = kept[kept < len(self._drawn)]
        new = kept[len(old) :] - len(self._drawn)
        parts = [self.value[old], rows[new].astype(np.float32)]
        self.value = np.concatenate(parts) if self.value.size else parts[1]
        self._drawn = drawn[kept]


_BINS = 2048


class Histogram(Statistic):
    """How magnitudes are distributed over the whole tensor, and where to clip them.

    The range is that of the first batch that is not all zero; when a batch exceeds it, it doubles
    as often as need be, and pairs of bins are added: the bins' width stays a power of two times
    the first one's, and counts stay exact.

    Attributes:
        counts: Magnitudes in each bin, int64 `[bins]`.
        limit: Upper end of the last bin.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self.counts: Array = np.zeros(bins, np.int64)
        self.limit = 0.0

    def update(self, batch: Array) -> None:
        """See `Statistic`."""
        magnitudes = np.abs(batch.astype(np.float64, copy=False)).ravel()
        largest = float(magnitudes.max(initial=0.0))
        bins = len(self.counts)
        if self.limit == 0.0 and largest > 0.0:
            self.limit = largest
        while largest > self.limit:
            pairs = np.pad(self.counts, (0, bins % 2)).reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, (0, bins - len(pairs)))
            self.limit *= 2
        if self.limit == 0.0:
            self.counts[0] += magnitudes.size
            return
        places = np.minimum((magnitudes * (bins / self.limit)).astype(np.int64), bins - 1)
        self.counts += np.bincount(places, minlength=bins)

    def percentile(self, share: float) -> float:
        """Return the upper end of the bin below which `share` (in `(0, 1]`) of magnitudes lie.

        Raises:
            ValueError: The share is not within `(0, 1]`.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share lies above 0 and up to 1, not at {share}")
        total = int(self.counts.sum())
        if not total:
            return 0.0
        last = int(np.searchsorted(np.cumsum(self.counts), share * total * (1 - 1e-12)))
        return (last + 1) * self.limit / len(self.counts)

    def least_squares(self, levels: int) -> float:
        """Return the clipping point of least squared error with `levels` steps above zero.

        A magnitude within the range is off by a rounding of uniform error, step²/12; one beyond
        it by its distance. Bins count as their centres.
        """
        width = self.limit / len(self.counts)
        centres = (np.arange(len(self.counts)) + 0.5) * width
        ends = np.arange(1, len(self.counts) + 1) * width
        inside = np.cumsum(self.counts)
        # Sums over the bins beyond each end, of counts times 1, x and x².
        zero, one, two = (
            (total := np.cumsum(self.counts * centres**power))[-1] - total for power in (0, 1, 2)
        )
        errors = inside * (ends / levels) ** 2 / 12 + two - 2 * ends * one + ends**2 * zero
        return float(ends[int(np.argmin(errors))])

    def entropy(self, levels: int) -> float:
        """Return the clipping point whose quantized distribution diverges least from the clipped.

        As TensorRT's entropy calibration (Migacz 2017): for each end of the range from `levels`
        bins on, the distribution with what lies beyond it added to its last bin is compared with
        itself spread evenly over the filled bins of each of `levels` steps, by the
        Kullback-Leibler divergence.
        """
        bins, best, chosen = len(self.counts), np.inf, len(self.counts)
        for end in [*range(levels, bins, max(1, bins // 256)), bins]:
            inside = self.counts[:end].astype(np.float64)
            clipped = inside.copy()
            clipped[-1] += self.counts[end:].sum()
            steps = (np.arange(end) * levels) // end
            filled = clipped > 0
            sums = np.bincount(steps, inside, levels)
            holders = np.bincount(steps, filled, levels)
            spread = np.where(filled, (sums / np.maximum(holders, 1))[steps], 0.0)
            if not spread.sum():
                continue
            p, q = clipped / clipped.sum(), spread / spread.sum()
            both = filled & (q > 0)
            if p[filled & ~both].sum() > 0:
                continue
            divergence = float((p[both] * np.log(p[both] / q[both])).sum())
            if divergence < best:
                best, chosen = divergence, end
        return chosen * self.limit / bins
