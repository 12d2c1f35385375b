"""Tiled CSL, the layout in which Flash-LLM keeps a sparse float16 matrix, bit for bit.

A matrix is cut into tiles of 128 x 64, row by row of tiles. `nonzeros` holds them one after the
other: a nonzero is a uint32 with the value's bits in the low half and, in the high half, the place
in shared memory it is written to, `row * 64 + (column ^ (row % 8) << 3)`. `tile_offsets` holds
where each tile begins, in units of four nonzeros, then the end twice. docs/tiled_csl.md has an
example.

A warp writes 32 nonzeros at a time, and those that fall into one bank wait for each other; so a
tile's nonzeros are dealt out from the fullest bank, always, which `encode` does without a loop:
nonzero number h of a bank is taken when all banks are down to h, the banks in order.

Xia et al., "Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model
Inference with Unstructured Sparsity", VLDB 2024, section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lwc.core.errors import LwcError

__all__ = [
    "TILE_COLUMNS",
    "TILE_ROWS",
    "TiledCsl",
    "bank_conflicts",
    "checked_matrix",
    "decode",
    "encode",
    "encoded_bytes",
    "in_strips",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

TILE_ROWS = 128
TILE_COLUMNS = 64
TILE_ELEMENTS = TILE_ROWS * TILE_COLUMNS

VECTOR = 4
"""Nonzeros that a thread loads at once."""

LANES = 32
"""Threads of a warp, and banks of shared memory; a bank is four bytes wide, two values."""

BANK_ELEMENTS = TILE_ELEMENTS // LANES

IDLE = np.iinfo(np.uint16).max
"""The word of a thread that writes nothing."""


@dataclass(frozen=True)
class TiledCsl:
    """A matrix in tiled CSL.

    Attributes:
        rows: Rows of the matrix; the last tiles are padded with zeros.
        columns: Columns of the matrix, likewise.
        nonzeros: uint32 `[4 * tile_offsets[-1]]`.
        tile_offsets: int32 `[tiles + 2]`.
    """

    rows: int
    columns: int
    nonzeros: Array
    tile_offsets: Array

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return int(self.nonzeros.nbytes + self.tile_offsets.nbytes)


def encoded_bytes(rows: int, columns: int, nonzeros: int) -> int:
    """Return the bytes that a matrix takes, without what pads its tiles to whole vectors.

    Against float16 that is 2 (1 - s) at sparsity s: less than dense above 50 %.
    """
    tiles = -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    return 4 * nonzeros + 4 * (tiles + 2)


def encode(matrix: Array, *, reorder: bool = True) -> TiledCsl:
    """Encode a matrix as Flash-LLM's `InitSparseMatrixA_API` does.

    Both zeros count as zero and are left out; subnormal numbers and infinities stay.

    Args:
        matrix: float16 `[rows, columns]`.
        reorder: Whether nonzeros are dealt out by bank. If not, they keep the order of the matrix,
            as with `InitSparseMatrixA_API_NoReorder`.

    Raises:
        LwcError: The matrix has another type or rank, NaN, or too many nonzeros for the offsets.
    """
    checked_matrix(matrix)
    rows, columns = matrix.shape
    strip_of = _dealt if reorder else _in_order
    parts, counts = [np.empty(0, np.uint32)], [np.zeros(1, np.int64)]
    for strip in in_strips(matrix.view(np.uint16)):
        nonzeros, totals = strip_of(strip)
        parts.append(nonzeros)
        counts.append(totals)
    offsets = np.concatenate(counts).cumsum() // VECTOR
    if offsets[-1] > np.iinfo(np.int32).max:
        raise LwcError("A matrix has more nonzeros than the offsets of tiled CSL can count.")
    return TiledCsl(
        rows, columns, np.concatenate(parts), np.append(offsets, offsets[-1]).astype(np.int32)
    )


def decode(encoded: TiledCsl) -> Array:
    """Return the matrix, float16 `[rows, columns]`; its zeros are positive.

    Raises:
        LwcError: Offsets do not fit the shape or the nonzeros, or a place is outside of its tile.
    """
    tile_rows = -(-encoded.rows // TILE_ROWS)
    tile_columns = -(-encoded.columns // TILE_COLUMNS)
    tiles = _tile_of_each(encoded, tile_rows * tile_columns)
    places = encoded.nonzeros >> 16
    if places.size and int(places.max()) >= TILE_ELEMENTS:
        raise LwcError(f"A nonzero of tiled CSL has place {int(places.max())}, outside of a tile.")
    dense = np.zeros((tile_rows * tile_columns, TILE_ELEMENTS), np.uint16)
    values = (encoded.nonzeros & 0xFFFF).astype(np.uint16)
    filled = (values & 0x7FFF) != 0  # zeros that pad a tile could lie on a nonzero
    dense[tiles[filled], places[filled]] = values[filled]
    permuted = dense.reshape(tile_rows, tile_columns, TILE_ELEMENTS)
    matrix = _swizzled(permuted).reshape(tile_rows, tile_columns, TILE_ROWS, TILE_COLUMNS)
    whole = matrix.transpose(0, 2, 1, 3).reshape(tile_rows * TILE_ROWS, tile_columns * TILE_COLUMNS)
    return np.ascontiguousarray(whole[: encoded.rows, : encoded.columns]).view(np.float16)


def bank_conflicts(encoded: TiledCsl) -> int:
    """Count the cycles that writing the nonzeros to shared memory waits for busy banks.

    A warp's 32 threads hold a vector each and write its nonzeros one after the other. A write takes
    as many cycles as the busiest bank has different words; all above one are counted.
    """
    tiles = _tile_of_each(encoded, len(encoded.tile_offsets) - 2)
    starts = encoded.tile_offsets.astype(np.int64) * VECTOR
    index = np.arange(len(encoded.nonzeros)) - starts[tiles]
    groups = -(-np.diff(starts)[:-1] // (VECTOR * LANES))
    first_group = np.cumsum(groups) - groups
    group = first_group[tiles] + index // (VECTOR * LANES)
    writes = int(groups.sum()) * VECTOR
    write = group * VECTOR + index % VECTOR
    words = np.full((writes, LANES), IDLE, np.uint16)
    words[write, index // VECTOR % LANES] = encoded.nonzeros >> 17
    words.sort(axis=1)
    waits = words != IDLE
    waits[:, 1:] &= words[:, 1:] != words[:, :-1]
    write, thread = waits.nonzero()
    busy = np.bincount(write * LANES + words[write, thread] % LANES, minlength=writes * LANES)
    # The last group of a tile has at least one vector, so that no write is empty.
    return int(busy.reshape(writes, LANES).max(axis=1, initial=0).sum()) - writes


def checked_matrix(matrix: Array) -> None:
    """Raise where a matrix cannot be encoded.

    Raises:
        LwcError: It is not float16 `[rows, columns]`, or has NaN, which Flash-LLM's own encoder
            takes for zero.
    """
    if matrix.dtype != np.float16 or matrix.ndim != 2:
        raise LwcError(
            f"A matrix to be packed is {matrix.dtype} {list(matrix.shape)}, not float16 of rank 2."
        )
    if np.isnan(matrix).any():
        raise LwcError("A matrix to be packed has NaN, which sparse layouts take for zero.")


def in_strips(matrix: Array) -> list[Array]:
    """Cut a matrix, padded, into rows of tiles, each `[tiles, 128, 64]`."""
    rows, columns = matrix.shape
    strips = []
    for start in range(0, rows, TILE_ROWS):
        strip = matrix[start : start + TILE_ROWS]
        padded = np.pad(strip, [(0, TILE_ROWS - len(strip)), (0, -columns % TILE_COLUMNS)])
        tiles = padded.reshape(TILE_ROWS, padded.shape[1] // TILE_COLUMNS, TILE_COLUMNS).transpose(
            1, 0, 2
        )
        strips.append(np.ascontiguousarray(tiles))
    return strips


def _swizzled(tiles: Array) -> Array:
    """Exchange column c of row r with column `c ^ (r % 8) << 3`: groups of eight columns."""
    groups = tiles.reshape(*tiles.shape[:-1], TILE_ROWS // 8, 8, 8, 8)
    row, group = np.ogrid[:8, :8]
    found: Array = groups[..., row, group ^ row, :]
    return found


def _dealt(strip: Array) -> tuple[Array, Array]:
    """Encode a row of tiles by bank.

    Args:
        strip: uint16 `[tiles, 128, 64]`.

    Returns:
        The nonzeros of all tiles, and how many each tile has.
    """
    tiles = len(strip)
    values = _swizzled(strip.reshape(tiles, TILE_ELEMENTS)).reshape(tiles, TILE_ROWS, LANES, 2)
    by_bank = values.transpose(0, 2, 1, 3).reshape(tiles, LANES, BANK_ELEMENTS)
    grid = np.arange(TILE_ELEMENTS, dtype=np.uint32).reshape(TILE_ROWS, LANES, 2)
    places = grid.transpose(1, 0, 2).reshape(LANES, BANK_ELEMENTS)
    filled = (by_bank & 0x7FFF) != 0
    heights = filled.cumsum(axis=2, dtype=np.int32)
    counts = heights[..., -1].copy()
    # Nonzero number h of a bank lies in line 256 - h: reading line by line is the order of dealing.
    lines = np.zeros((tiles, BANK_ELEMENTS, LANES), np.uint32)
    tile, bank, element = filled.nonzero()
    line = BANK_ELEMENTS - heights[tile, bank, element]
    lines[tile, line, bank] = by_bank[tile, bank, element] | places[bank, element] << 16
    padding = -counts.sum(axis=1) % VECTOR
    first_zeros = filled.argmin(axis=2)
    for number in range(VECTOR - 1):
        (padded,) = (padding > number).nonzero()
        emptiest = counts[padded].argmin(axis=1)
        counts[padded, emptiest] += 1
        line = BANK_ELEMENTS - counts[padded, emptiest]
        lines[padded, line, emptiest] = places[emptiest, first_zeros[padded, emptiest]] << 16
    present = np.arange(BANK_ELEMENTS, 0, -1)[:, None] <= counts[:, None, :]
    totals = counts.sum(axis=1)
    dealt = lines[present]
    nonzeros = np.empty_like(dealt)
    nonzeros[_destinations(totals)] = dealt
    return nonzeros, totals


def _destinations(totals: Array) -> Array:
    """Return where the nonzeros go in the order in which they are dealt, for tiles of some sizes.

    What does not fill 32 vectors is dealt first and written last. Both are dealt onto stacks, one
    for each lane, and written from their tops.
    """
    starts = np.cumsum(totals) - totals
    tile = np.repeat(np.arange(len(totals)), totals)
    number = np.arange(int(totals.sum())) - starts[tile]
    rounds, lanes = np.divmod(totals // VECTOR, LANES)
    tail = (lanes * VECTOR)[tile]
    short = np.maximum(lanes, 1)[tile]
    last = number // short, number % short
    turn = number - tail
    main = turn // LANES, turn % LANES
    rounds = rounds[tile]
    layer = rounds - 1 - main[0] // VECTOR
    in_main = layer * VECTOR * LANES + main[1] * VECTOR + VECTOR - 1 - main[0] % VECTOR
    in_tail = rounds * VECTOR * LANES + last[1] * VECTOR + VECTOR - 1 - last[0]
    found: Array = starts[tile] + np.where(turn < 0, in_tail, in_main)
    return found


def _in_order(strip: Array) -> tuple[Array, Array]:
    """Encode a row of tiles in the order of the matrix; the first zeros pad a tile."""
    tiles = len(strip)
    values = strip.reshape(tiles, TILE_ELEMENTS)
    row, column = np.divmod(np.arange(TILE_ELEMENTS, dtype=np.uint32), TILE_COLUMNS)
    places = row * TILE_COLUMNS + (column ^ (row % 8 << 3))
    filled = (values & 0x7FFF) != 0
    padding = -filled.sum(axis=1) % VECTOR
    kept = filled | ((~filled).cumsum(axis=1) <= padding[:, None])
    # Unlike the other encoder, this one writes the zero it finds, with its sign.
    return (values | places << 16)[kept], kept.sum(axis=1)


def _tile_of_each(encoded: TiledCsl, tiles: int) -> Array:
    """Return the tile of each nonzero.

    Raises:
        LwcError: The offsets do not fit.
    """
    offsets = encoded.tile_offsets.astype(np.int64)
    counts = np.diff(offsets)
    if (
        len(offsets) != tiles + 2
        or offsets[0] != 0
        or counts.min() < 0
        or counts[-1] != 0
        or offsets[-1] * VECTOR != len(encoded.nonzeros)
    ):
        raise LwcError(f"Offsets of tiled CSL do not fit {tiles} tiles and their nonzeros.")
    found: Array = np.repeat(np.arange(tiles), counts[:-1] * VECTOR)
    return found
