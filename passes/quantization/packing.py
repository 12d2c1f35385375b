"""How codes lie in memory: the layouts of MatMulNBits and of standard blocked tensors.

`com.microsoft::MatMulNBits` reads weights of `[outputs, inputs]` as uint8
`[outputs, blocks, block_size * bits / 8]`, scales as `[outputs, blocks]`, zero points as uint8
`[outputs, ceil(blocks * bits / 8)]`; with 4 bits two neighbours share a byte, with 2 bits four, the
first in the lowest bits. Standard tensors keep the shape of the weight; onnx_ir packs their 4-bit
elements.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

__all__ = ["pack_rows", "pack_tile", "unpack_rows"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def pack_tile(codes: Array, bits: int) -> Array:
    """Pack the codes of a tile of blocks.

    Args:
        codes: uint8 `[block_size, blocks]`.
        bits: 2, 4 or 8.

    Returns:
        uint8 `[blocks, block_size * bits / 8]`, each row as MatMulNBits reads a block.
    """
    codes = _joined(codes, bits)
    packed = np.empty(codes.shape[::-1], np.uint8)
    # Row by row: numpy's own transposition takes the short axis as the inner one, at half the rate.
    for index, row in enumerate(codes):
        packed[:, index] = row
    return packed


def pack_rows(codes: Array, bits: int) -> Array:
    """Pack the last axis of a uint8 array; a row that leaves room is filled up with zero codes."""
    spare = -codes.shape[-1] % (8 // bits)
    if spare:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, spare)])
    return np.moveaxis(_joined(np.moveaxis(codes, -1, 0), bits), 0, -1)


def unpack_rows(packed: Array, bits: int, length: int) -> Array:
    """Undo `pack_rows`: uint8 codes with `length` elements on the last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(*packed.shape[:-1], -1)[..., :length]


def _joined(codes: Array, bits: int) -> Array:
    """Put neighbours on the first axis into one byte."""
    each = 8 // bits
    packed: Array = codes[0::each]
    for place in range(1, each):
        packed = packed | (codes[place::each] << np.uint8(bits * place))
    return packed
