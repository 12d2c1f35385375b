"""Round-to-nearest: real blocks to integers, a scale and a zero point, by plain numpy.

A block is a run of `block_size` weights that share one scale `s` and one integer zero point `z`;
a weight `w` is stored as the code `q = clamp(round(w / s) + z, 0, 2**bits - 1)` and read back as
`s * (q - z)`. Everything here works on a *tile* `[blocks, block_size, columns]` small enough for
the processor's cache, in buffers that are reused, elementwise along blocks and columns: results
do not depend on how a weight is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

__all__ = ["Codes", "Grid", "TileRounder", "widen"]

Array: TypeAlias = "np.ndarray[Any, Any]"

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
    """The integers a block may be rounded to, and how the block's scale is chosen.

    Attributes:
        bits: Bits of a code.
        symmetric: Whether the zero point is fixed at `2**(bits - 1)`. Then 8-bit codes span
            `±max|w| / 127`, and 4-bit codes use their extra negative step: the weight of the
            largest magnitude becomes -8 exactly, with a negative scale where it is positive.
        search: `none` takes the scale from the range of the block, zero included; `mse` tries a
            few (scale, zero point) pairs and keeps the one of least squared error.
    """

    bits: Literal[4, 8]
    symmetric: bool
    search: Literal["none", "mse"]

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)


class Codes(NamedTuple):
    """A rounded tile.

    Attributes:
        codes: uint8 `[blocks, block_size, columns]`, valid until the next tile.
        scales: float32 `[blocks, columns]`, each representable in the scale's storage type.
        zero_points: uint8 `[blocks, columns]`.
        squared_error: Sum of the squared differences over the tile.
        squared_weight: Sum of the squared weights over the tile.
    """

    codes: Array
    scales: Array
    zero_points: Array
    squared_error: float
    squared_weight: float


def widen(source: Array, target: Array) -> None:
    """Copy float weights into a float32 buffer of the same shape.

    float16 goes through integers, three times faster than numpy's own conversion: the sign moves
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
    """Rounds tiles of one shape or smaller, in buffers of its own; one per thread.

    Args:
        grid: What to round to.
        shape: The largest tile, `[blocks, block_size, columns]`.
        scale_dtype: How scales are stored. A scale is first rounded *up* to that type and then
            used, so that the codes fit the scale that the runtime reads.
    """

    def __init__(self, grid: Grid, shape: tuple[int, int, int], scale_dtype: Any) -> None:
        self._grid = grid
        self._scale_dtype = np.dtype(scale_dtype)
        size = int(np.prod(shape))
        self._weights = np.empty(size, np.float32)
        self._real = np.empty(size, np.float32)
        self._whole = np.empty(size, np.float32)
        self._codes = np.empty(size, np.uint8)

    def weights(self, shape: tuple[int, int, int]) -> Array:
        """Return the buffer `[blocks, block_size, columns]` to put the next tile into."""
        return self._view(self._weights, shape)

    def round(self, weights: Array) -> Codes | None:
        """Round the tile that was put into `weights`; None if it holds infinities or NaN."""
        low, high = weights.min(axis=1), weights.max(axis=1)
        bound = max(float(high.max()), -float(low.min()))
        if not bound < (65536 if self._scale_dtype == np.float16 else np.inf):
            return None
        scales, zeros, error = self._best_parameters(weights, low, high)
        real, codes = self._view(self._whole, weights.shape), self._view(self._codes, weights.shape)
        self._divide(weights, scales, zeros, real)
        np.rint(real, out=real)
        np.clip(real, 0, self._grid.top, out=real)
        np.copyto(codes, real, casting="unsafe")
        squared_weight = float(np.einsum("bkn,bkn->", weights, weights))
        return Codes(codes, scales, zeros.astype(np.uint8), error, squared_weight)

    def _best_parameters(
        self, weights: Array, low: Array, high: Array
    ) -> tuple[Array, Array, float]:
        """Return scales and zero points (both float32) and the squared error they leave."""
        candidates = self._candidates(low, high)
        best_scales, best_zeros = next(candidates)
        best_errors = self._squared_errors(weights, best_scales, best_zeros)
        for scales, zeros in candidates:
            errors = self._squared_errors(weights, scales, zeros)
            better = errors < best_errors
            np.copyto(best_scales, scales, where=better)
            np.copyto(best_zeros, zeros, where=better)
            np.copyto(best_errors, errors, where=better)
        return best_scales, best_zeros, float(best_errors.sum(dtype=np.float64))

    def _candidates(self, low: Array, high: Array) -> Iterator[tuple[Array, Array]]:
        """Yield pairs of (scale, zero point), the plain choice first."""
        grid = self._grid
        if grid.symmetric:
            yield from self._symmetric_candidates(low, high)
            return
        # Zero is always representable: a zero weight (padding, pruning) stays exactly zero.
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = self._storable((high - low) / np.float32(grid.top))
        exact = -low / scales
        yield scales, np.rint(exact)
        if grid.search == "none":
            return
        # The rounded zero point shifts the grid by up to half a step, which clips one end and
        # wastes the other. For a zero point z chosen first, one of the two integers around the
        # exact one, the smallest scale that covers both ends is max(high / (top - z), -low / z).
        # At z = 0 or z = top the covered end may lie on one side only: 0 / 0 is then no bound.
        for zeros in (np.floor(exact), np.ceil(exact)):
            np.minimum(zeros, np.float32(grid.top), out=zeros)
            with np.errstate(divide="ignore", invalid="ignore"):
                covering = np.fmax(high / (grid.top - zeros), -low / zeros)
            possible = covering < np.inf
            np.copyto(covering, scales, where=~possible)
            np.copyto(zeros, np.rint(exact), where=~possible)
            yield self._storable(covering), zeros

    def _symmetric_candidates(self, low: Array, high: Array) -> Iterator[tuple[Array, Array]]:
        grid = self._grid
        zeros = np.full(low.shape, grid.middle, np.float32)
        largest = np.maximum(-low, high)
        evenly = self._storable(largest / np.float32(grid.middle - 1))
        if grid.bits == 8:
            yield evenly, zeros
            return
        signs = np.where(high > -low, np.float32(-1), np.float32(1))
        yield self._storable(largest / np.float32(grid.middle)) * signs, zeros
        if grid.search == "mse":
            yield evenly, zeros.copy()

    def _storable(self, scales: Array) -> Array:
        """Round non-negative scales up to the storage type; a block of zeros gets one."""
        dropped = _DROPPED_BITS[self._scale_dtype]
        mask = np.uint32((1 << dropped) - 1)
        stored = ((scales.view(np.uint32) + mask) & ~mask).view(np.float32)
        if self._scale_dtype == np.float16:
            small = stored < _FLOAT16_NORMAL
            if small.any():
                steps = np.ceil(scales * np.float32(2.0**24)) * np.float32(2.0**-24)
                stored = np.where(small, steps, stored)
        return np.where(stored < _FLOAT32_NORMAL, np.float32(1), stored)

    def _squared_errors(self, weights: Array, scales: Array, zeros: Array) -> Array:
        """Return the sum of squared differences of each block, `[blocks, columns]`."""
        real = self._view(self._real, weights.shape)
        whole = self._view(self._whole, weights.shape)
        self._divide(weights, scales, zeros, real)
        np.rint(real, out=whole)
        np.clip(whole, 0, self._grid.top, out=whole)
        np.subtract(real, whole, out=real)
        np.multiply(real, real, out=real)
        # Adding halves, not np.sum: its order of summation depends on the shape of the tile.
        rows = real.shape[1]
        while rows > 1:
            kept = (rows + 1) // 2
            real[:, : rows - kept] += real[:, kept:rows]
            rows = kept
        errors: Array = real[:, 0] * (scales * scales)
        return errors

    @staticmethod
    def _divide(weights: Array, scales: Array, zeros: Array, out: Array) -> None:
        np.multiply(weights, (np.float32(1) / scales)[:, None], out=out)
        np.add(out, zeros[:, None], out=out)

    @staticmethod
    def _view(buffer: Array, shape: tuple[int, ...]) -> Array:
        return buffer[: int(np.prod(shape))].reshape(shape)
