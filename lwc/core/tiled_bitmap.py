"""A sparse float16 matrix as a bitmap and pairs of values, in tiles of 128 x 64.

Tiled CSL says where each nonzero goes; here each pair of columns says whether it is there, and what
it takes is found by counting the bits before it. A pair with a nonzero is kept with both values, so
that it is loaded and placed as one word. At sparsity s, for nonzeros at random, that takes
1 - s^2 + 1 / 32 of a dense matrix: less than tiled CSL's 2 (1 - s). docs/tiled_csl.md shows both.

* `bits`: uint32 `[tile rows, tile columns, 128]`; bit c of a row of a tile is set where column 2c
  or 2c + 1 is not zero.
* `pairs`: float16 `[n, 2]`, those pairs row by row, each tile padded to a multiple of four with
  zeros, so that it begins at a multiple of 16 bytes.
* `offsets`: int32 `[tiles + 1]`, where each tile begins in `pairs`, in units of four, and the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lwc.core.errors import LwcError
from lwc.core.tiled_csl import TILE_COLUMNS, TILE_ROWS, checked_matrix, in_strips

__all__ = ["PAIRS", "TiledBitmap", "pack", "packed_bytes", "unpack"]

Array: TypeAlias = "np.ndarray[Any, Any]"

PAIRS = 4
"""Pairs that `offsets` counts as one."""


@dataclass(frozen=True)
class TiledBitmap:
    """A matrix as a bitmap and pairs of values.

    Attributes:
        rows: Rows of the matrix; the last tiles are padded with zeros.
        columns: Columns of the matrix, likewise.
        bits: uint32 `[tile rows, tile columns, 128]`.
        pairs: float16 `[4 * offsets[-1], 2]`.
        offsets: int32 `[tiles + 1]`.
    """

    rows: int
    columns: int
    bits: Array
    pairs: Array
    offsets: Array

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return int(self.bits.nbytes + self.pairs.nbytes + self.offsets.nbytes)

    @property
    def fullest(self) -> int:
        """Pairs of the tile that has most, with its padding."""
        return PAIRS * int(np.diff(self.offsets).max(initial=0))

    def check(self) -> None:
        """Check that the arrays fit each other and the shape.

        Raises:
            LwcError: They do not.
        """
        _places_of(self)


def packed_bytes(rows: int, columns: int, pairs: int) -> int:
    """Return the bytes that a matrix takes, without the pairs that pad its tiles."""
    tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    return 4 * pairs + tiles * TILE_ROWS * 4 + 4 * (tiles + 1)


def pack(matrix: Array) -> TiledBitmap:
    """Pack a matrix. Both zeros count as zero; subnormal numbers and infinities stay.

    Args:
        matrix: float16 `[rows, columns]`.

    Raises:
        LwcError: The matrix has another type or rank, NaN, or too many nonzeros for the offsets.
    """
    checked_matrix(matrix)
    rows, columns = matrix.shape
    tile_columns = -(-columns // TILE_COLUMNS)
    bits = np.zeros((-(-rows // TILE_ROWS), tile_columns, TILE_ROWS), np.uint32)
    parts, units = [np.empty((0, 2), np.float16)], [np.zeros(1, np.int64)]
    for index, strip in enumerate(in_strips(matrix)):
        both = strip.reshape(len(strip), TILE_ROWS, TILE_COLUMNS // 2, 2)
        both[both == 0] = 0  # negative zeros too
        filled = both.any(axis=-1)
        packed = np.packbits(filled, axis=-1, bitorder="little")
        bits[index] = packed.view("<u4")[..., 0]
        counts = filled.sum(axis=(1, 2))
        places, needed = _places(counts)
        pairs = np.zeros((PAIRS * int(needed.sum()), 2), np.float16)
        pairs[places] = both[filled]
        parts.append(pairs)
        units.append(needed)
    offsets = np.concatenate(units).cumsum()
    if offsets[-1] > np.iinfo(np.int32).max:
        raise LwcError("A matrix has more pairs than the offsets of its tiles can count.")
    return TiledBitmap(rows, columns, bits, np.concatenate(parts), offsets.astype(np.int32))


def unpack(packed: TiledBitmap) -> Array:
    """Return the matrix, float16 `[rows, columns]`; its zeros are positive.

    Raises:
        LwcError: The arrays do not fit each other or the shape.
    """
    filled, places = _places_of(packed)
    tiles = np.zeros((*filled.shape, 2), np.float16)
    tiles[filled] = packed.pairs[places]
    high, wide, _ = packed.bits.shape
    whole = tiles.reshape(high, wide, TILE_ROWS, TILE_COLUMNS).transpose(0, 2, 1, 3)
    joined = whole.reshape(high * TILE_ROWS, wide * TILE_COLUMNS)
    return np.ascontiguousarray(joined[: packed.rows, : packed.columns])


def _places_of(packed: TiledBitmap) -> tuple[Array, Array]:
    """Return which pairs of tiles are there, [tiles, 128, 32], and their places.

    Raises:
        LwcError: The arrays do not fit each other or the shape.
    """
    shape = (-(-packed.rows // TILE_ROWS), -(-packed.columns // TILE_COLUMNS), TILE_ROWS)
    if packed.bits.shape != shape:
        raise LwcError(
            f"A bitmap has shape {list(packed.bits.shape)}; its matrix needs {list(shape)}."
        )
    octets = packed.bits.astype("<u4").view(np.uint8)
    octets = octets.reshape(shape[0] * shape[1], TILE_ROWS, TILE_COLUMNS // 16)
    filled = np.unpackbits(octets, axis=-1, bitorder="little").astype(bool)
    places, needed = _places(filled.sum(axis=(1, 2)))
    offsets = np.append(0, needed.cumsum())
    if not np.array_equal(packed.offsets, offsets) or len(packed.pairs) != PAIRS * offsets[-1]:
        raise LwcError("Pairs and offsets do not fit the bitmap of their matrix.")
    return filled, places


def _places(counts: Array) -> tuple[Array, Array]:
    """Return the place of each pair of tiles with some counts, and the units of each tile."""
    needed = -(-counts // PAIRS)
    gaps = PAIRS * (needed.cumsum() - needed) - (counts.cumsum() - counts)
    places = np.arange(int(counts.sum())) + np.repeat(gaps, counts)
    return places, needed
