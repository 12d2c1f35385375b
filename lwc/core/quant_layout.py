"""How codes of `lwc::DynamicQuantMatMul` lie in memory: in tiles of 16 columns.

A tile holds its columns' codes, four inputs of a column side by side: a *line* is uint8 `[16, 4]`,
and with 8 bits a tile is lines one after the other. With fewer bits several lines share bytes, so
that a shift and a mask of 64 bytes give a whole line:

* 4 bits: a line in the low halves, the next in the high halves;
* 2 bits: four lines, the first in the lowest bits;
* 3 bits, for eight lines: two times 64 bytes with the two low bits of four lines each, as above,
  then 64 bytes with the high bits of all eight, the first in the lowest.

Inputs are padded to a multiple of 32 and columns to whole tiles, with zeros. Scales and zero points
are `[tiles, blocks, 16]`. All three may also be flat.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

__all__ = ["STEP", "TILE", "pack_codes", "pack_columns", "packed_bytes", "unpack_codes"]

Array: TypeAlias = "np.ndarray[Any, Any]"

TILE = 16
"""Columns of a tile."""

STEP = 32
"""Inputs are padded to a multiple of this."""


def packed_bytes(inputs: int, columns: int, bits: int) -> int:
    """Return the bytes that codes take."""
    return -(-columns // TILE) * -(-inputs // STEP) * STEP * TILE * bits // 8


def pack_codes(codes: Array, bits: int) -> Array:
    """Pack codes.

    Args:
        codes: uint8 `[inputs, columns]`, below `2**bits`.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 `[tiles, bytes of a tile]`.
    """
    inputs, columns = codes.shape
    padded = np.pad(codes, [(0, -inputs % STEP), (0, -columns % TILE)])
    lines = padded.reshape(-1, 4, padded.shape[1] // TILE, TILE).transpose(2, 0, 3, 1)
    if bits == 8:
        packed = lines
    elif bits == 3:
        groups = lines.reshape(len(lines), -1, 8, TILE, 4)
        low = _joined(groups.reshape(len(lines), -1, 2, 4, TILE, 4) & np.uint8(3), 2)
        high = _joined(groups >> np.uint8(2), 1)
        packed = np.concatenate([low, high[:, :, None]], axis=2)
    else:
        packed = _joined(lines.reshape(len(lines), -1, 8 // bits, TILE, 4), bits)
    return np.ascontiguousarray(packed).reshape(len(lines), -1)


def unpack_codes(packed: Array, bits: int, inputs: int, columns: int) -> Array:
    """Undo `pack_codes`, also of a flat array: uint8 `[inputs, columns]`."""
    tiles = -(-columns // TILE)
    if bits == 8:
        lines = packed.reshape(tiles, -1, TILE, 4)
    elif bits == 3:
        planes = packed.reshape(tiles, -1, 3, TILE, 4)
        low = _split(planes[:, :, :2], 2).reshape(tiles, -1, TILE, 4)
        lines = low | _split(planes[:, :, 2], 1).reshape(low.shape) << np.uint8(2)
    else:
        lines = _split(packed.reshape(tiles, -1, TILE, 4), bits).reshape(tiles, -1, TILE, 4)
    return lines.transpose(1, 3, 0, 2).reshape(-1, tiles * TILE)[:inputs, :columns]


def pack_columns(rows: Array) -> Array:
    """Bring scales or zero points from `[blocks, columns]` to `[tiles, blocks, 16]`."""
    blocks, columns = rows.shape
    padded = np.pad(rows, [(0, 0), (0, -columns % TILE)])
    return np.ascontiguousarray(padded.reshape(blocks, -1, TILE).transpose(1, 0, 2))


def _joined(lines: Array, bits: int) -> Array:
    """Put the lines of the third axis from the end into one, each in its bits of a byte."""
    packed = np.zeros_like(lines[..., 0, :, :])
    for place in range(lines.shape[-3]):
        packed |= lines[..., place, :, :] << np.uint8(bits * place)
    return packed


def _split(lines: Array, bits: int) -> Array:
    """Undo `_joined`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
    return (lines[..., None, :, :] >> shifts) & np.uint8((1 << bits) - 1)
