"""How codes lie in memory: the layouts of MatMulNBits and of standard blocked tensors.

`com.microsoft::MatMulNBits` reads weights of `[outputs, inputs]` as uint8
`[outputs, blocks, block_size * bits / 8]`, scales as `[outputs, blocks]`, zero points as uint8
`[outputs, ceil(blocks * bits / 8)]`; with 4 bits two neighbours share a byte, the first in the
low half. Standard tensors keep the shape of the weight; onnx_ir packs their 4-bit elements.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

__all__ = ["pack_rows", "pack_tile", "unpack_rows"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def pack_tile(codes: Array, bits: int) -> Array:
    """Pack the codes of a tile of blocks.

    Args:
        codes: uint8 `[block_size, blocks]`; overwritten.
        bits: 4 or 8.

    Returns:
        uint8 `[blocks, block_size * bits / 8]`, each row as MatMulNBits reads a block.
    """
    if bits == 4:
        high = codes[1::2]
        np.left_shift(high, np.uint8(4), out=high)
        codes = np.bitwise_or(codes[0::2], high)
    packed = np.empty(codes.shape[::-1], np.uint8)
    # Row by row: numpy's own transposition takes the short axis as the inner one, at half the rate.
    for index, row in enumerate(codes):
        packed[:, index] = row
    return packed


def pack_rows(codes: Array, bits: int) -> Array:
    """Pack the last axis of a uint8 array; a row of odd length is filled up with a zero code."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def unpack_rows(packed: Array, bits: int, length: int) -> Array:
    """Undo `pack_rows`: uint8 codes with `length` elements on the last axis."""
    if bits == 8:
        return packed
    pairs = np.stack([packed & 0x0F, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :length]
