"""Quantizing one weight after another without holding a model: read, round, spill, let go."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir

from lwc.core.quant_layout import TILE, pack_codes, pack_columns, unpack_codes
from lwc.core.weights import WeightStore, reading_once
from lwc.passes.quantization.gptq import Rounded
from lwc.passes.quantization.packing import pack_rows, pack_tile
from lwc.passes.quantization.rounding import Codes, Grid, TileRounder, widen

__all__ = ["Layout", "QuantizedWeight", "WeightSpec", "in_threads", "packed", "quantize"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Layout: TypeAlias = Literal["matmulnbits", "bnb4", "table", "qdq", "tiles"]

_TILE_ELEMENTS = 1 << 18
_TILE_COLUMNS = 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class WeightSpec:
    """What to make of one weight.

    Attributes:
        grid: The integers and the choice of scales.
        block_size: Weights per block along the inputs; 0 is one block for all inputs.
        transposed: Whether the tensor lies as `[outputs, inputs]` (embedding tables, Gemm with
            transB) rather than `[inputs, outputs]` (MatMul).
        layout: How the result lies in memory.
    """

    grid: Grid
    block_size: int
    transposed: bool
    layout: Layout


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight, its tensors in memory or, after `spill`, in a file.

    Attributes:
        codes: `matmulnbits`: uint8 `[outputs, blocks, block_size * bits / 8]`. `table`: the
            same bytes as `[outputs, inputs * bits / 8]`. `bnb4`: uint8 `[outputs * inputs / 2]`,
            the first of two codes in the upper half of a byte. `qdq`: uint4, int4, uint8 or int8
            in the shape of the weight; of a codebook, uint4 with the inputs' axis in two,
            `[blocks, block_size, outputs]` or `[outputs, blocks, block_size]`. `tiles`: as
            `lwc.core.quant_layout` packs them, flat.
        scales: `[outputs, blocks]`, for `bnb4` flat. `qdq`: as the weight, the inputs' axis in
            blocks; `[outputs]` where one block spans all inputs. Of a codebook as the codes, with
            an extent of 1 for `block_size`. `tiles`: `[tiles, blocks, 16]`, flat.
        zero_points: None when symmetric. uint8, rows packed like codes; `qdq` and `tiles`: as the
            scales.
        relative_error: Frobenius norm of the difference over that of the weight.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    relative_error: float

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        zeros = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros

    def scaled(self, factors: Array, spec: WeightSpec) -> QuantizedWeight:
        """Return the same with each output multiplied by a factor, `[outputs]`."""
        array = self.scales.numpy()
        if spec.layout == "tiles":
            each = pack_columns(factors[None])
            tiled = array.astype(np.float32).reshape(len(each), -1, TILE) * each
            return replace(self, scales=ir.Tensor(_small(tiled.astype(np.float32).reshape(-1))))
        if spec.layout != "qdq" or spec.transposed:  # outputs are the first axis
            scales = array.reshape(len(factors), -1) * factors[:, None]
        else:
            scales = array * factors
        return replace(self, scales=ir.Tensor(scales.reshape(array.shape).astype(array.dtype)))

    def values(self, spec: WeightSpec, shape: tuple[int, int]) -> Array:
        """Return what the codes stand for, float32 `[inputs, outputs]`.

        Args:
            spec: Of the layouts `qdq` and `tiles`, symmetric, with one scale for each output.
            shape: Inputs and outputs.
        """
        assert spec.block_size == 0
        assert spec.grid.symmetric
        scales = self.scales.numpy().astype(np.float32)
        if spec.layout == "tiles":
            codes = unpack_codes(self.codes.numpy(), spec.grid.bits, *shape).astype(np.float32)
            return (codes - spec.grid.middle) * scales.ravel()[: shape[1]]
        codes = self.codes.numpy().astype(np.float32)
        return (codes.T if spec.transposed else codes) * scales

    def spill(self, store: WeightStore) -> QuantizedWeight:
        """Return the same with its tensors in `store`."""
        zeros = None if self.zero_points is None else store.put_tensor(self.zero_points)
        codes, scales = store.put_tensor(self.codes), store.put_tensor(self.scales)
        return QuantizedWeight(codes, scales, zeros, self.relative_error)


def quantize(tensor: ir.TensorProtocol, spec: WeightSpec) -> QuantizedWeight | None:
    """Quantize a matrix of floats tile by tile.

    The matrix is read once, in the order of its file. Returns None if it holds infinities, NaN,
    or magnitudes from 2**100 on.
    """
    with reading_once(tensor) as array:
        rows, columns = array.shape
        inputs, outputs = (columns, rows) if spec.transposed else (rows, columns)
        size = spec.block_size or inputs
        blocks = -(-inputs // size)
        sink = _Sink(spec, outputs, blocks, size)
        tiles = _Tiles(array, spec.transposed, size)
        rounder = TileRounder(spec.grid, size, tiles.largest, array.dtype)
        error = total = 0.0
        for here in tiles:
            weights = rounder.weights(here.columns)
            tiles.load(here, weights)
            rounded = rounder.round(weights)
            if rounded is None:
                return None
            sink.take(here, rounded)
            error += rounded.squared_error
            total += rounded.squared_weight
        dtype = array.dtype
    relative_error = float(np.sqrt(error / total)) if total else 0.0
    return sink.finish(dtype, inputs, relative_error)


def packed(
    rounded: Rounded, spec: WeightSpec, dtype: Any, relative_error: float
) -> QuantizedWeight:
    """Bring codes, scales and zero points into the layout of their use.

    Args:
        rounded: The weight on its grid.
        spec: What it was to be made of.
        dtype: Type of the weight, in which scales are stored.
        relative_error: See `QuantizedWeight`.
    """
    inputs, outputs = rounded.codes.shape
    sink = _Sink(spec, outputs, len(rounded.scales), spec.block_size or inputs)
    sink.fill(rounded)
    return sink.finish(dtype, inputs, relative_error)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], upcoming: Callable[[Item], None]
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by one thread more than there are processors.

    One of them is expected to wait for the disk; numpy lets the others run while it works.
    `upcoming(item)` is called, in a thread of its own, somewhat before the item's turn. At most a
    few results wait to be taken; leaving the loop early drops what has not begun.
    """
    workers = len(os.sched_getaffinity(0)) + 1
    pool = ThreadPoolExecutor(workers)
    ahead = ThreadPoolExecutor(1)
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items[: 2 * workers]:
            ahead.submit(upcoming, item)
        for index, item in enumerate(items):
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
            if index + 2 * workers < len(items):
                ahead.submit(upcoming, items[index + 2 * workers])
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        ahead.shutdown(cancel_futures=True)


class _Tile(NamedTuple):
    """Some blocks of some outputs.

    Attributes:
        outputs: Which outputs.
        blocks: Which blocks of their inputs.
        order: Axes of `[outputs, blocks]` in the order in which a tile's columns run.
    """

    outputs: slice
    blocks: slice
    order: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Extents of both axes, in the order of the tile's columns."""
        extents = [taken.stop - taken.start for taken in (self.outputs, self.blocks)]
        return extents[self.order[0]], extents[self.order[1]]

    @property
    def columns(self) -> int:
        """Number of blocks, which are the columns of the tile."""
        return math.prod(self.shape)

    def place(self, tensor: Array) -> Array:
        """Return this tile's part of a tensor `[outputs, blocks, ...]`, axes in its order."""
        return tensor[self.outputs, self.blocks].swapaxes(0, self.order[0])


class _Tiles:
    """A weight cut into tiles that fit the processor's cache, in the order of its file.

    Args:
        array: `[inputs, outputs]`, or `[outputs, inputs]` if transposed.
        transposed: Which.
        size: Weights in a block.

    Attributes:
        largest: Blocks in the largest tile.
    """

    def __init__(self, array: Array, transposed: bool, size: int) -> None:
        self._array = array
        self._transposed = transposed
        self._size = size
        inputs, self._outputs = array.shape[::-1] if transposed else array.shape
        self._blocks = -(-inputs // size)
        room = max(1, _TILE_ELEMENTS // size)
        if transposed:
            self._depth = min(self._blocks, room)
            self._columns = min(self._outputs, max(1, room // self._depth))
        else:
            self._columns = min(self._outputs, _TILE_COLUMNS, room)
            self._depth = min(self._blocks, max(1, room // self._columns))
        self.largest = self._depth * self._columns
        self._turned = np.empty(self.largest * size if transposed else 0, array.dtype)

    def __iter__(self) -> Iterator[_Tile]:
        columns = _slices(self._outputs, self._columns)
        depths = _slices(self._blocks, self._depth)
        if self._transposed:
            yield from (_Tile(c, d, (0, 1)) for c in columns for d in depths)
        else:
            yield from (_Tile(c, d, (1, 0)) for d in depths for c in columns)

    def load(self, tile: _Tile, weights: Array) -> None:
        """Widen a tile into float32 `[block_size, blocks]`; a block cut short ends in zeros."""
        inputs = slice(tile.blocks.start * self._size, tile.blocks.stop * self._size)
        target = weights.reshape(self._size, *tile.shape)
        if self._transposed:
            part = self._array[tile.outputs, inputs]
            whole = part.shape[1] // self._size
            blocks = part[:, : whole * self._size].reshape(len(part), whole, self._size)
            # Turned in the narrow type: each cache line is then used up while it is there.
            turned = self._turned[: blocks.size].reshape(self._size, len(part), whole)
            np.copyto(turned, blocks.transpose(2, 0, 1))
            widen(turned, target[:, :, :whole])
            ending, last = part[:, whole * self._size :].T, target[:, :, whole:]
        else:
            part = self._array[inputs, tile.outputs]
            whole = len(part) // self._size
            blocks = part[: whole * self._size].reshape(whole, self._size, part.shape[1])
            widen(blocks.swapaxes(0, 1), target[:, :whole])
            ending, last = part[whole * self._size :], target[:, whole:]
        if last.size:
            last = last.reshape(self._size, -1)
            widen(ending, last[: len(ending)])
            last[len(ending) :] = 0


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class _Sink:
    """Collects tiles into the tensors of one weight."""

    def __init__(self, spec: WeightSpec, outputs: int, blocks: int, size: int) -> None:
        self._spec = spec
        self._size = size
        self._whole = spec.layout in ("qdq", "tiles")  # codes lie as the weight does, unpacked
        if not self._whole:
            self._codes: Array = np.empty((outputs, blocks, size * spec.grid.bits // 8), np.uint8)
        elif spec.transposed:
            self._codes = np.empty((outputs, blocks * size), np.uint8)
        else:
            self._codes = np.empty((blocks * size, outputs), np.uint8)
        self._scales = np.empty((outputs, blocks), np.float32)
        self._zeros = np.empty((outputs, blocks), np.uint8)

    def take(self, tile: _Tile, rounded: Codes) -> None:
        """Put a tile at its place."""
        tile.place(self._scales)[...] = rounded.scales.reshape(tile.shape)
        tile.place(self._zeros)[...] = rounded.zero_points.reshape(tile.shape)
        if not self._whole:
            packed = pack_tile(rounded.codes, self._spec.grid.bits)
            # A block is moved as one element.
            element = f"V{packed.shape[1]}"
            whole = self._codes.view(element)[..., 0]
            tile.place(whole)[...] = packed.view(element).reshape(tile.shape)
            return
        codes = rounded.codes.reshape(self._size, *tile.shape)
        if self._spec.transposed:
            blocks = self._codes.reshape(len(self._codes), -1, self._size)
            blocks[tile.outputs, tile.blocks] = codes.transpose(1, 2, 0)
        else:
            blocks = self._codes.reshape(-1, self._size, self._codes.shape[1])
            blocks[tile.blocks, :, tile.outputs] = codes.swapaxes(0, 1)

    def fill(self, rounded: Rounded) -> None:
        """Take a whole weight."""
        inputs, outputs = rounded.codes.shape
        self._scales[...] = rounded.scales.T
        self._zeros[...] = rounded.zeros.T
        if self._whole:
            target = self._codes.T if self._spec.transposed else self._codes
            target[:inputs] = rounded.codes
            return
        codes = np.zeros((outputs, self._scales.shape[1] * self._size), np.uint8)
        codes[:, :inputs] = rounded.codes.T
        blocks = codes.reshape(*self._scales.shape, self._size)
        self._codes[...] = pack_rows(blocks, self._spec.grid.bits)

    def finish(self, dtype: Any, inputs: int, relative_error: float) -> QuantizedWeight:
        """Bring the tensors into their final form."""
        grid = self._spec.grid
        if self._spec.layout == "tiles":
            tiles = self._codes.T if self._spec.transposed else self._codes
            return QuantizedWeight(
                ir.Tensor(pack_codes(tiles[:inputs], grid.bits).reshape(-1)),
                ir.Tensor(_small(pack_columns(self._scales.T).reshape(-1))),
                None if grid.symmetric else ir.Tensor(pack_columns(self._zeros.T).reshape(-1)),
                relative_error,
            )
        scales: Array = self._scales.astype(dtype)
        if not self._whole:
            codes: Array = self._codes
            if self._spec.layout == "table":
                codes = codes.reshape(len(codes), -1)
            elif self._spec.layout == "bnb4":
                codes, scales = (codes << 4 | codes >> 4).reshape(-1), scales.reshape(-1)
            zeros = None if grid.symmetric else ir.Tensor(pack_rows(self._zeros, grid.bits))
            return QuantizedWeight(ir.Tensor(codes), ir.Tensor(scales), zeros, relative_error)
        if grid.codebook != "uniform":
            shape, along = (*scales.shape, self._size), (*scales.shape, 1)
            if not self._spec.transposed:
                scales = np.ascontiguousarray(scales.T)
                shape, along = (len(scales), self._size, -1), (len(scales), 1, -1)
            split = _integers(self._codes.reshape(shape), ir.DataType.UINT4)
            return QuantizedWeight(split, ir.Tensor(scales.reshape(along)), None, relative_error)
        # Signed types hold symmetric codes: their zero point is then 0, the default.
        kind = _QDQ_TYPES[grid.bits, grid.symmetric]
        codes, zero_points = self._codes, self._zeros
        codes = codes[:, :inputs] if self._spec.transposed else codes[:inputs]
        if grid.symmetric:
            np.subtract(codes, np.uint8(grid.middle), out=codes)
            codes = codes.view(np.int8)
        if self._spec.block_size == 0:
            scales, zero_points = scales[:, 0], zero_points[:, 0]
        elif not self._spec.transposed:
            scales, zero_points = np.ascontiguousarray(scales.T), zero_points.T
        return QuantizedWeight(
            _integers(codes, kind),
            ir.Tensor(np.ascontiguousarray(scales)),
            None if grid.symmetric else _integers(zero_points, kind),
            relative_error,
        )


def _small(scales: Array) -> Array:
    """Return scales in float16, where that changes none by more than 2**-11 of itself.

    Those of a grid with `short_scales` it does not change at all.
    """
    with np.errstate(over="ignore"):
        short = scales.astype(np.float16)
    off = np.abs(short.astype(np.float32) - scales)
    return short if np.all(off <= np.abs(scales) * np.float32(2.0**-11)) else scales


_QDQ_TYPES = {
    (4, False): ir.DataType.UINT4,
    (4, True): ir.DataType.INT4,
    (7, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (8, True): ir.DataType.INT8,
}


def _integers(values: Array, kind: ir.DataType) -> ir.TensorProtocol:
    if kind.bitwidth == 8:
        return ir.Tensor(np.ascontiguousarray(values))
    packed = pack_rows(np.ascontiguousarray(values).reshape(-1).view(np.uint8) & 0x0F, 4)
    return ir.PackedTensor(packed, kind, shape=values.shape)
