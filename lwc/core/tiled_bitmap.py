"""A sparse float16 matrix as a bitmap and its nonzeros, in tiles of 128 x 64.

Tiled CSL says where each nonzero goes; here each element says whether it is there, and what it
takes is found by counting the bits before it. A place costs a bit instead of 16 for each nonzero:
the layout is smaller than dense above 6.25 % sparsity. docs/tiled_csl.md shows both.

* `bits`: uint64 `[tile rows, tile columns, 128]`; bit c of a row of a tile is set where column c is
  not zero.
* `values`: the nonzeros of a tile row by row, each tile padded to a multiple of eight with zeros,
  so that it begins at a multiple of 16 bytes.
* `offsets`: int32 `[tiles + 1]`, where each tile begins in `values`, in units of eight, and the
  end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lwc.core.errors import LwcError
from lwc.core.tiled_csl import TILE_COLUMNS, TILE_ROWS, checked_matrix, in_strips

__all__ = ["UNIT", "TiledBitmap", "pack", "packed_bytes", "unpack"]

Array: TypeAlias = "np.ndarray[Any, Any]"

UNIT = 8
"""Values that `offsets` counts as one."""


@dataclass(frozen=True)
class TiledBitmap:
    """A matrix as a bitmap and its nonzeros.

    Attributes:
        rows: Rows of the matrix; the last tiles are padded with zeros.
        columns: Columns of the matrix, likewise.
        bits: uint64 `[tile rows, tile columns, 128]`.
        values: float16 `[8 * offsets[-1]]`.
        offsets: int32 `[tiles + 1]`.
    """

    rows: int
    columns: int
    bits: Array
    values: Array
    offsets: Array

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return int(self.bits.nbytes + self.values.nbytes + self.offsets.nbytes)

    @property
    def fullest(self) -> int:
        """Values of the tile that has most, with its padding."""
        return UNIT * int(np.diff(self.offsets).max(initial=0))


def packed_bytes(rows: int, columns: int, nonzeros: int) -> int:
    """Return the bytes that a matrix takes, without what pads the values of its tiles.

    Against float16 that is 1 - s + 1 / 16 at sparsity s.
    """
    tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    return 2 * nonzeros + tiles * TILE_ROWS * 8 + 4 * (tiles + 1)


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
    bits = np.zeros((-(-rows // TILE_ROWS), tile_columns, TILE_ROWS), np.uint64)
    parts, units = [np.empty(0, np.float16)], [np.zeros(1, np.int64)]
    for index, strip in enumerate(in_strips(matrix)):
        filled = strip != 0
        packed = np.packbits(filled, axis=-1, bitorder="little")
        bits[index] = packed.view("<u8")[..., 0]
        counts = filled.sum(axis=(1, 2))
        places, needed = _places(counts)
        values = np.zeros(UNIT * int(needed.sum()), np.float16)
        values[places] = strip[filled]
        parts.append(values)
        units.append(needed)
    offsets = np.concatenate(units).cumsum()
    if offsets[-1] > np.iinfo(np.int32).max:
        raise LwcError("A matrix has more nonzeros than the offsets of its tiles can count.")
    return TiledBitmap(rows, columns, bits, np.concatenate(parts), offsets.astype(np.int32))


def unpack(packed: TiledBitmap) -> Array:
    """Return the matrix, float16 `[rows, columns]`; its zeros are positive.

    Raises:
        LwcError: The arrays do not fit each other or the shape.
    """
    shape = (-(-packed.rows // TILE_ROWS), -(-packed.columns // TILE_COLUMNS), TILE_ROWS)
    if packed.bits.shape != shape:
        raise LwcError(
            f"A bitmap has shape {list(packed.bits.shape)}; its matrix needs {list(shape)}."
        )
    octets = packed.bits.astype("<u8").view(np.uint8)
    octets = octets.reshape(shape[0] * shape[1], TILE_ROWS, TILE_COLUMNS // 8)
    filled = np.unpackbits(octets, axis=-1, bitorder="little").astype(bool)
    places, needed = _places(filled.sum(axis=(1, 2)))
    offsets = np.append(0, needed.cumsum())
    if not np.array_equal(packed.offsets, offsets) or len(packed.values) != UNIT * offsets[-1]:
        raise LwcError("Values and offsets do not fit the bitmap of their matrix.")
    tiles = np.zeros(filled.shape, np.float16)
    tiles[filled] = packed.values[places]
    whole = tiles.reshape(*shape, TILE_COLUMNS).transpose(0, 2, 1, 3)
    joined = whole.reshape(shape[0] * TILE_ROWS, shape[1] * TILE_COLUMNS)
    return np.ascontiguousarray(joined[: packed.rows, : packed.columns])


def _places(counts: Array) -> tuple[Array, Array]:
    """Return the place of each nonzero of tiles with some counts, and the units of each tile."""
    needed = -(-counts // UNIT)
    gaps = UNIT * (needed.cumsum() - needed) - (counts.cumsum() - counts)
    places = np.arange(int(counts.sum())) + np.repeat(gaps, counts)
    return places, needed
