"""Round-to-nearest: real blocks to codes, a scale and a zero point, by plain numpy.

A block is a run of `block_size` weights that share one scale `s` and one integer zero point `z`;
a weight `w` is stored as the code `q = clamp(round(w / s) + z, 0, 2**bits - 1)` and read back as
`s * (q - z)`. With a codebook, `q` is the level nearest to `w / s`, and there is no `z`.

Everything here works on a *tile* `[block_size, blocks]` small enough for the processor's cache, one
block per column, in buffers that are reused: long rows make numpy's loops fast, and a column's
result does not depend on how a weight is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from lwc.passes.quantization.codebook import nearest_levels, nf4_levels

__all__ = ["LARGEST", "Codes", "Grid", "TileRounder", "widen"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_IMMENSE = 2.0**100
"""Weights of this magnitude and more are not rounded: ranges of blocks might leave float32."""

LARGEST = np.float32(2.0**64)
"""The same for methods that change weights before they round them."""

_MAGIC = np.float32(1.5 * 2.0**23)
"""Added to a float32 of magnitude below 2**22, it leaves the nearest integer in the low bits."""

_FLOAT32_NORMAL = np.float32(2.0**-126)
_FLOAT16_NORMAL = np.float32(2.0**-14)

_DROPPED_BITS = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 13,
    np.dtype(ml_dtypes.bfloat16): 16,
}
"""Mantissa bits of float32 that a type lacks. Below its normal range float16 has fixed steps."""


@dataclass(frozen=True)
class Grid:
    """The points a block may be rounded to, and how the block's scale is chosen.

    Attributes:
        bits: Bits of a code.
        symmetric: Whether the zero point is fixed at `2**(bits - 1)`. Then 8-bit codes span
            `±max|w| / 127`, 7-bit ones `±max|w| / 63`, and shorter ones use their extra negative
            step: of 4 bits, the weight of the largest magnitude becomes -8 exactly, with a negative
            scale where it is positive.
        search: `none` takes the scale from the range of the block, zero included; `mse` tries a
            few (scale, zero point) pairs and keeps the one of least squared error.
        codebook: `uniform` has the integers; `nf4` the 16 levels of NormalFloat, which span
            `±max|w|`. Their codes have no zero points and count as symmetric; the search also tries
            them mirrored, by a negative scale.
        short_scales: Whether scales have the 11 bits of float16 whatever their type is, for a form
            that stores them so where their exponents allow it.
    """

    bits: Literal[2, 3, 4, 7, 8]
    symmetric: bool
    search: Literal["none", "mse"]
    codebook: Literal["uniform", "nf4"] = "uniform"
    short_scales: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> Array | None:
        """What codes stand for where they are no integers, in steps of the scale."""
        return nf4_levels() if self.codebook == "nf4" else None

    def codes(self, steps: Array, zeros: Array) -> Array:
        """Return the codes nearest to numbers in steps of their scale; zero points are floats."""
        if self.levels is not None:
            return nearest_levels(steps, self.levels)
        integers: Array = np.clip(np.rint(steps) + zeros, 0, self.top)
        return integers

    def points(self, codes: Array, zeros: Array) -> Array:
        """Return what uint8 codes stand for in steps of their scale, float32."""
        if self.levels is not None:
            return np.take(self.levels, codes)
        return np.subtract(codes, zeros, dtype=np.float32)


class Codes(NamedTuple):
    """A rounded tile.

    Attributes:
        codes: uint8 `[block_size, blocks]`, valid until the next tile.
        scales: float32 `[blocks]`, each representable in the scale's storage type.
        zero_points: uint8 `[blocks]`.
        squared_error: Sum of the squared differences over the tile.
        squared_weight: Sum of the squared weights over the tile.
    """

    codes: Array
    scales: Array
    zero_points: Array
    squared_error: float
    squared_weight: float


class _Choice(NamedTuple):
    """A scale, its reciprocal, and a zero point for every block, float32 `[blocks]`."""

    scales: Array
    inverses: Array
    zeros: Array


def widen(source: Array, target: Array) -> None:
    """Copy float weights into a float32 buffer of the same shape.

    float16 goes through integers, five times faster than numpy's own conversion: the sign moves
    to bit 31, exponent and mantissa to where float32 has them, and a multiplication by 2**112
    mends the exponent bias, subnormals included. Infinities and NaN become numbers of at least
    65536, which no finite float16 is.
    """
    if source.dtype != np.float16:
        np.copyto(target, source, casting="unsafe")
        return
    bits = target.view(np.int32)
    np.copyto(bits, source.view(np.int16))
    np.left_shift(bits, np.int32(13), out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)
    np.multiply(target, np.float32(2.0**112), out=target)


class TileRounder:
    """Rounds tiles of one size or smaller, in buffers of its own; one per thread.

    Args:
        grid: What to round to.
        block_size: Weights in a block.
        blocks: Blocks of the largest tile.
        scale_dtype: How scales are stored. A scale is first rounded *up* to that type and then
            used, so that the codes fit the scale that the runtime reads.
    """

    def __init__(self, grid: Grid, block_size: int, blocks: int, scale_dtype: Any) -> None:
        self._grid = grid
        self._scale_dtype = np.dtype(scale_dtype)
        self._size = block_size
        self._weights = np.empty(block_size * blocks, np.float32)
        self._real = np.empty_like(self._weights)
        self._whole = np.empty_like(self._weights)
        self._codes = np.empty(block_size * blocks, np.uint8)
        # Only there may the nearest integer lie outside the grid; see `Grid.symmetric`.
        self._clips = grid.symmetric and grid.bits < 7 and grid.codebook == "uniform"

    def weights(self, blocks: int) -> Array:
        """Return the buffer `[block_size, blocks]` to put the next tile into."""
        return self._view(self._weights, blocks)

    def round(self, weights: Array) -> Codes | None:
        """Round the tile that was put into `weights`; None if some are immense or NaN."""
        low, high = np.minimum.reduce(weights, axis=0), np.maximum.reduce(weights, axis=0)
        bound = max(float(high.max()), -float(low.min()))
        if not bound < (65536 if self._scale_dtype == np.float16 else _IMMENSE):
            return None
        best, error = self._best_choice(weights, low, high)
        real = self._view(self._real, weights.shape[1])
        codes = self._view(self._codes, weights.shape[1])
        np.multiply(weights, best.inverses, out=real)
        if self._grid.levels is not None:
            codes[...] = nearest_levels(real, self._grid.levels)
        else:
            np.add(real, best.zeros + _MAGIC, out=real)
            if self._clips:
                np.minimum(real, np.float32(self._grid.top) + _MAGIC, out=real)
            np.copyto(codes, real.view(np.int32), casting="unsafe")
        # Squares that float32 does not hold take twice the time.
        wide = None if 1e-15 < bound < 1e15 else np.float64
        squared_weight = float(np.einsum("kn,kn->", weights, weights, dtype=wide))
        return Codes(codes, best.scales, best.zeros.astype(np.uint8), error, squared_weight)

    def _best_choice(self, weights: Array, low: Array, high: Array) -> tuple[_Choice, float]:
        """Return the choice of least squared error in each block, and the sum of these errors."""
        choices = self._choices(low, high)
        best = next(choices)
        best_errors = self._squared_errors(weights, best)
        for choice in choices:
            errors = self._squared_errors(weights, choice)
            better = errors < best_errors
            for kept, other in zip((*best, best_errors), (*choice, errors), strict=True):
                np.putmask(kept, better, other)
        return best, float(best_errors.sum(dtype=np.float64))

    def _choices(self, low: Array, high: Array) -> Iterator[_Choice]:
        """Yield the choices that the search compares, the plain one first."""
        grid = self._grid
        if grid.levels is not None:
            yield from self._level_choices(low, high)
            return
        if grid.symmetric:
            yield from self._symmetric_choices(low, high)
            return
        # Zero is always representable: a zero weight (padding, pruning) stays exactly zero.
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        # A hair above (high - low) / top, to make high / s - low / s < top in spite of rounding:
        # then round(high / s) - round(low / s) <= top, and no code needs clamping.
        plain = self._choice((high - low) * np.float32((1 + 2.0**-21) / grid.top))
        exact = low * -plain.inverses
        np.rint(exact, out=plain.zeros)
        below = np.floor(exact)
        yield plain
        if grid.search == "none":
            return
        # The rounded zero point shifts the grid by up to half a step, which wastes a part of it
        # at one end. For a zero point z chosen first, one of the two integers around the exact
        # one, the smallest scale that covers both ends is max(high / (top - z), -low / z). Where
        # z leaves no code for one end that scale is infinite and its error no number, which is
        # never the least; where it leaves none for an end that is zero, 0 / 0 is no bound.
        with np.errstate(divide="ignore", invalid="ignore"):
            for zeros in (below, np.minimum(below + 1, np.float32(grid.top))):
                covering = np.fmax(high / (grid.top - zeros), -low / zeros)
                yield self._choice(covering, zeros)

    def _symmetric_choices(self, low: Array, high: Array) -> Iterator[_Choice]:
        grid = self._grid
        zeros = np.full(low.shape, grid.middle, np.float32)
        largest = np.maximum(-low, high)
        evenly = self._choice(largest / np.float32(grid.middle - 1), zeros)
        if grid.bits >= 7:
            yield evenly
            return
        signs = np.where(high > -low, np.float32(-1), np.float32(1))
        scales, inverses, _ = self._choice(largest / np.float32(grid.middle), zeros)
        yield _Choice(scales * signs, inverses * signs, zeros.copy())
        if grid.search == "mse":
            yield evenly

    def _level_choices(self, low: Array, high: Array) -> Iterator[_Choice]:
        zeros = np.zeros(low.shape, np.float32)
        plain = self._choice(np.maximum(-low, high), zeros)
        mirrored = _Choice(-plain.scales, -plain.inverses, zeros.copy())
        yield plain
        if self._grid.search == "mse":
            yield mirrored

    def _choice(self, scales: Array, zeros: Array | None = None) -> _Choice:
        """Round non-negative scales up to the storage type; a block of zeros gets one."""
        dropped = _DROPPED_BITS[self._scale_dtype]
        if self._grid.short_scales:
            dropped = max(dropped, _DROPPED_BITS[np.dtype(np.float16)])
        mask = np.uint32((1 << dropped) - 1)
        stored = ((scales.view(np.uint32) + mask) & ~mask).view(np.float32)
        if self._scale_dtype == np.float16:
            small = stored < _FLOAT16_NORMAL
            if small.any():
                steps = np.ceil(scales * np.float32(2.0**24)) * np.float32(2.0**-24)
                np.copyto(stored, steps, where=small)
        np.copyto(stored, _FLOAT32_NORMAL, where=stored < _FLOAT32_NORMAL)
        np.copyto(stored, np.float32(1), where=scales == 0)
        return _Choice(
            stored, np.float32(1) / stored, np.empty_like(stored) if zeros is None else zeros
        )

    def _squared_errors(self, weights: Array, choice: _Choice) -> Array:
        """Return the sum of squared differences of each block, float64 `[blocks]`."""
        real = self._view(self._real, weights.shape[1])
        whole = self._view(self._whole, weights.shape[1])
        np.multiply(weights, choice.inverses, out=real)
        if self._grid.levels is not None:
            np.take(self._grid.levels, nearest_levels(real, self._grid.levels), out=whole)
        else:
            np.rint(real, out=whole)
        if self._clips:
            np.minimum(whole, np.float32(self._grid.top - self._grid.middle), out=whole)
        np.subtract(real, whole, out=real)
        np.multiply(real, real, out=real)
        # Adding halves, not np.sum: its order of summation depends on the shape of the tile.
        rows = self._size
        while rows > 1:
            kept = (rows + 1) // 2
            real[: rows - kept] += real[kept:rows]
            rows = kept
        errors: Array = real[0] * np.square(choice.scales, dtype=np.float64)
        return errors

    def _view(self, buffer: Array, blocks: int) -> Array:
        return buffer[: self._size * blocks].reshape(self._size, blocks)
