"""Weights as the kernels of products read them, made from what ONNX models hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeAlias

import numpy as np

from lwc.backends.triton.availability import require_triton
from lwc.core.dialect import DynamicQuantMatMul
from lwc.core.errors import LwcError
from lwc.core.quant_layout import TILE, unpack_codes
from lwc.core.tiled_bitmap import TiledBitmap
from lwc.core.tiled_csl import TILE_COLUMNS, TILE_ROWS

__all__ = ["GROUP_SIZES", "SparseWeights", "W4Weights", "W8Weights", "column_order"]

Array: TypeAlias = "np.ndarray[Any, Any]"

GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale of 4-bit weights."""


@dataclass(frozen=True)
class _Weights:
    columns: int
    depth: int

    def to(self, device: Any) -> Self:
        """Return the weights with their tensors on a device."""
        moved: Mapping[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if hasattr(value := getattr(self, field.name), "to")
        }
        return replace(self, **moved)

    @property
    def layout(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """Shape and type of each tensor, by its name, as kernels read them: without gaps."""
        raise NotImplementedError

    def _empty(self) -> Self:
        import torch

        made: Any = {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.layout.items()
        }
        return replace(self, **made)


@dataclass(frozen=True)
class W8Weights(_Weights):
    """Weights of 8 bits with a scale for each column.

    Attributes:
        columns: Columns of the result.
        depth: What is summed over.
        codes: int8 [columns, width]: zeros fill the depth up to a multiple of 16, so that rows are
            copied in units of 16 bytes.
        scales: float32 [columns].
    """

    codes: Any
    scales: Any

    @classmethod
    def pack(cls, codes: Array, scales: Array) -> W8Weights:
        """Take int8 codes [columns, depth] and scales [columns]."""
        _check(codes, np.int8, 2)
        if scales.shape != codes.shape[:1]:
            raise LwcError(f"scales have shape {list(scales.shape)}, not {[len(codes)]}")
        columns, depth = codes.shape
        whole = np.pad(codes, [(0, 0), (0, -depth % 16)])
        return cls(columns, depth, _tensor(whole), _tensor(scales.astype(np.float32)))

    @classmethod
    def from_dialect(cls, node: DynamicQuantMatMul, codes: Array, scales: Array) -> W8Weights:
        """Take the weights of a `lwc::DynamicQuantMatMul` of 8 bits and one block.

        Raises:
            LwcError: It has other bits, blocks or zero points.
        """
        if node.bits != 8 or node.block_size or node.zero_points:
            raise LwcError(
                f"{node.name} {node.overload} is not what the W8A8 kernel computes",
                remedy="quantize to 8 bits, symmetrically, with a scale for each column",
            )
        order = column_order(node)
        numbers = unpack_codes(codes, 8, node.K, node.N)[:, order].astype(np.int16) - 128
        return cls.pack(numbers.astype(np.int8).T, scales.reshape(-1)[order])

    @classmethod
    def empty(cls, *, columns: int, depth: int) -> W8Weights:
        """Return weights whose tensors have their shapes and types, and no content yet."""
        return cls(columns, depth, None, None)._empty()

    @property
    def layout(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """See `_Weights.layout`."""
        import torch

        width = -(-self.depth // 16) * 16
        return {
            "codes": ((self.columns, width), torch.int8),
            "scales": ((self.columns,), torch.float32),
        }


@dataclass(frozen=True)
class W4Weights(_Weights):
    """Weights of 4 bits with a scale for each column and group of inputs.

    Attributes:
        columns: Columns of the result.
        depth: What is summed over.
        group_size: Inputs of a group.
        codes: uint8 [columns, pairs, group_size]: input i of the first group of a pair in the low
            half of byte i, of the second one in the high half.
        scales: int32 [pairs, columns]: float16 bits of the first group in the low half.
        zeros: uint8 [pairs, columns], likewise; 8 everywhere where None.
    """

    group_size: int
    codes: Any
    scales: Any
    zeros: Any | None

    @classmethod
    def pack(cls, codes: Array, scales: Array, zeros: Array | None, group_size: int) -> W4Weights:
        """Take codes and what belongs to their groups. Scales are rounded to float16, to 2^-11.

        Args:
            codes: uint8 [columns, depth], below 16.
            scales: [columns, groups].
            zeros: uint8 [columns, groups], below 16, or None.
            group_size: 32, 64 or 128.

        Raises:
            LwcError: Shapes do not fit, or float16 does not hold a scale so.
        """
        _check(codes, np.uint8, 2)
        columns, depth = codes.shape
        if group_size not in GROUP_SIZES:
            raise LwcError(f"groups of {group_size} inputs are not among {GROUP_SIZES}")
        groups = -(-depth // group_size)
        for name, array in (("scales", scales), ("zeros", zeros)):
            if array is not None and array.shape != (columns, groups):
                raise LwcError(f"{name} have shape {list(array.shape)}, not {[columns, groups]}")
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16)
        if not np.isfinite(halves).all():
            raise LwcError("a scale of 4-bit weights is too large for float16, or not a number")
        exact = scales.astype(np.float64)
        if (np.abs(halves - exact) > 2.0**-11 * np.abs(exact)).any():
            raise LwcError("a scale of 4-bit weights is too small for float16")
        pairs = -(-groups // 2)
        whole = np.pad(codes, [(0, 0), (0, pairs * 2 * group_size - depth)])
        sides = whole.reshape(columns, pairs, 2, group_size)
        bits = _paired(halves.view(np.uint16).astype(np.uint32), 16)
        return cls(
            columns,
            depth,
            group_size,
            _tensor(sides[:, :, 0] | sides[:, :, 1] << 4),
            _tensor(bits.view(np.int32)),
            None if zeros is None else _tensor(_paired(zeros, 4)),
        )

    @classmethod
    def from_matmul_nbits(
        cls, codes: Array, scales: Array, zeros: Array | None, *, depth: int, block_size: int
    ) -> W4Weights:
        """Take the weights of a `com.microsoft::MatMulNBits` of 4 bits.

        Args:
            codes: uint8 [columns, blocks, block_size / 2], even inputs in low halves.
            scales: [columns * blocks].
            zeros: uint8 [columns * ceil(blocks / 2)], even blocks in low halves, or None.
            depth: K.
            block_size: Inputs of a block.

        Raises:
            LwcError: As `pack`.
        """
        columns, blocks = codes.shape[:2]
        inputs = _halves(codes).reshape(columns, -1)[:, :depth]
        middles = None
        if zeros is not None:
            middles = _halves(zeros.reshape(columns, -1))[:, :blocks]
        return cls.pack(inputs, scales.reshape(columns, blocks), middles, block_size)

    @classmethod
    def from_dialect(
        cls, node: DynamicQuantMatMul, codes: Array, scales: Array, zeros: Array | None
    ) -> W4Weights:
        """Take the weights of a `lwc::DynamicQuantMatMul` of 4 bits.

        Blocks that are several groups long, or one for all inputs, give their scale to each group.

        Raises:
            LwcError: It has other bits, or blocks that are no whole groups; or as `pack`.
        """
        size = next((each for each in reversed(GROUP_SIZES) if node.block_size % each == 0), 0)
        if node.bits != 4 or not size:
            raise LwcError(
                f"{node.name} {node.overload} is not what the W4A16 kernel computes",
                remedy=f"quantize to 4 bits, in blocks of a multiple of {GROUP_SIZES[0]}",
            )
        order, groups = column_order(node), -(-node.K // size)
        again = node.block_size // size if node.block_size else groups

        def by_group(values: Array) -> Array:
            by_column = values.reshape(-(-node.N // TILE), -1, TILE).transpose(0, 2, 1)
            rows = by_column.reshape(-1, by_column.shape[-1])[order]
            return np.repeat(rows, again, axis=1)[:, :groups]

        return cls.pack(
            unpack_codes(codes, 4, node.K, node.N)[:, order].T,
            by_group(scales),
            None if zeros is None else by_group(zeros),
            size,
        )

    @classmethod
    def empty(cls, *, columns: int, depth: int, group_size: int, zeros: bool) -> W4Weights:
        """Return weights whose tensors have their shapes and types, and no content yet."""
        made = cls(columns, depth, group_size, None, None, None)._empty()
        return made if zeros else replace(made, zeros=None)

    @property
    def layout(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """See `_Weights.layout`; zeros may be absent."""
        import torch

        pairs = -(-self.depth // (2 * self.group_size))
        return {
            "codes": ((self.columns, pairs, self.group_size), torch.uint8),
            "scales": ((pairs, self.columns), torch.int32),
            "zeros": ((pairs, self.columns), torch.uint8),
        }


@dataclass(frozen=True)
class SparseWeights(_Weights):
    """Sparse float16 weights as `lwc.core.tiled_bitmap` packs them.

    Attributes:
        columns: Columns of the result: rows of the packed matrix.
        depth: What is summed over.
        fullest: Pairs of the tile that has most.
        bits: uint8 [tiles of columns, tiles of the depth, 512].
        pairs: int32, the first value of a pair in the low half.
        offsets: int32 [tiles + 1].
    """

    fullest: int
    bits: Any
    pairs: Any
    offsets: Any

    @classmethod
    def of(cls, packed: TiledBitmap) -> SparseWeights:
        """Take a packed matrix [columns, depth].

        Raises:
            LwcError: Its arrays do not fit each other.
        """
        packed.check()
        octets = packed.bits.astype("<u4").view(np.uint8)
        return cls(
            packed.rows,
            packed.columns,
            packed.fullest,
            _tensor(octets),
            _tensor(packed.pairs.view(np.int32).reshape(-1)),
            _tensor(packed.offsets),
        )

    @property
    def layout(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """See `_Weights.layout`; there may be any number of pairs."""
        import torch

        tiles = -(-self.columns // TILE_ROWS), -(-self.depth // TILE_COLUMNS)
        return {
            "bits": ((*tiles, TILE_ROWS * TILE_COLUMNS // 16), torch.uint8),
            "pairs": ((self.pairs.numel(),), torch.int32),
            "offsets": ((tiles[0] * tiles[1] + 1,), torch.int32),
        }


def column_order(node: DynamicQuantMatMul) -> Array:
    """Return the columns of a product in the order kernels have them: all of a gate first.

    The dialect has tiles of the gate and of what it gates in turn.
    """
    columns = np.arange(node.N)
    if not node.gated:
        return columns
    return columns.reshape(-1, 2, TILE).transpose(1, 0, 2).reshape(-1)


def _paired(groups: Array, bits: int) -> Array:
    """Bring [columns, groups] to [pairs, columns], the second group of a pair above the first."""
    padded = np.pad(groups, [(0, 0), (0, groups.shape[1] % 2)])
    found: Array = padded[:, 0::2] | padded[:, 1::2] << np.array(bits, groups.dtype)
    return found.T


def _halves(octets: Array) -> Array:
    """Return the low and the high half of each byte, in turn, along the last axis."""
    found: Array = np.stack([octets & 15, octets >> 4], axis=-1)
    return found.reshape(*octets.shape[:-1], 2 * octets.shape[-1])


def _check(array: Array, dtype: Any, rank: int) -> None:
    if array.dtype != dtype or array.ndim != rank:
        raise LwcError(
            f"codes are {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} of rank {rank}"
        )


def _tensor(array: Array) -> Any:
    require_triton()
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
