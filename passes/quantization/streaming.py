"""Quantizing one weight after another without holding a model: read, round, spill, let go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir

from lwc.core.weights import WeightStore, reading
from lwc.passes.quantization.packing import pack_rows, pack_tile
from lwc.passes.quantization.rounding import Grid, TileRounder, widen

__all__ = ["Layout", "QuantizedWeight", "WeightSpec", "in_threads", "quantize"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Layout: TypeAlias = Literal["matmulnbits", "table", "qdq"]

_TILE_ELEMENTS = 1 << 17
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
    """A quantized weight, its tensors in the module's spill file.

    Attributes:
        codes: `matmulnbits`: uint8 `[outputs, blocks, block_size * bits / 8]`. `table`: the
            same bytes as `[outputs, inputs * bits / 8]`. `qdq`: uint4, int4, uint8 or int8 in
            the shape of the weight.
        scales: `[outputs, blocks]`. `qdq`: as the weight, the inputs' axis in blocks;
            `[outputs]` where one block spans all inputs.
        zero_points: None when symmetric. uint8, rows packed like codes; `qdq`: as the scales.
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


def quantize(
    tensor: ir.TensorProtocol, spec: WeightSpec, store: WeightStore
) -> QuantizedWeight | None:
    """Quantize a matrix of floats tile by tile and put the result into `store`.

    The matrix is read once, in the order of its file. Returns None if it holds infinities or NaN.
    """
    with reading(tensor) as array:
        matrix = array.T if spec.transposed else array
        inputs, outputs = matrix.shape
        size = spec.block_size or inputs
        blocks = -(-inputs // size)
        sink = _Sink(spec, inputs, outputs, blocks, size)
        columns = min(outputs, _TILE_COLUMNS, max(1, _TILE_ELEMENTS // size))
        depth = min(blocks, max(1, _TILE_ELEMENTS // (size * columns)))
        rounder = TileRounder(spec.grid, (depth, size, columns), array.dtype)
        error = total = 0.0
        for first, column in _tiles(blocks, outputs, depth, columns, spec.transposed):
            part = matrix[first * size : (first + depth) * size, column : column + columns]
            count = -(-part.shape[0] // size)
            tile = rounder.weights((count, size, part.shape[1]))
            flat = tile.reshape(count * size, part.shape[1])
            widen(part, flat[: part.shape[0]])
            flat[part.shape[0] :] = 0
            rounded = rounder.round(tile)
            if rounded is None:
                return None
            sink.take(first, column, rounded.codes, rounded.scales, rounded.zero_points)
            error += rounded.squared_error
            total += rounded.squared_weight
        dtype = array.dtype
    return sink.finish(store, dtype, float(np.sqrt(error / total)) if total else 0.0)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], upcoming: Callable[[Item], None]
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by as many threads as the process has processors.

    numpy lets other threads run while it works. `upcoming(item)` is called, in a thread of its
    own, somewhat before the item's turn. Leaving the loop early drops what has not begun.
    """
    workers = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers)
    ahead = ThreadPoolExecutor(1)
    try:
        for item in items[:workers]:
            ahead.submit(upcoming, item)

        def task(index: int) -> Result:
            if index + workers < len(items):
                ahead.submit(upcoming, items[index + workers])
            return function(items[index])

        yield from pool.map(task, range(len(items)))
    finally:
        pool.shutdown(cancel_futures=True)
        ahead.shutdown(cancel_futures=True)


def _tiles(
    blocks: int, outputs: int, depth: int, columns: int, transposed: bool
) -> Iterator[tuple[int, int]]:
    """Yield (first block, first column) of each tile, in the order of the file."""
    if transposed:
        for column in range(0, outputs, columns):
            for first in range(0, blocks, depth):
                yield first, column
    else:
        for first in range(0, blocks, depth):
            for column in range(0, outputs, columns):
                yield first, column


class _Sink:
    """Collects tiles into the tensors of one weight."""

    def __init__(self, spec: WeightSpec, inputs: int, outputs: int, blocks: int, size: int) -> None:
        self._spec = spec
        self._inputs = inputs
        self._size = size
        if spec.layout != "qdq":
            packed = size * spec.grid.bits // 8
            self._codes: Array = np.empty((outputs, blocks, packed), np.uint8)
        else:
            self._codes = np.empty(
                (outputs, inputs) if spec.transposed else (inputs, outputs), np.uint8
            )
        self._scales = np.empty((outputs, blocks), np.float32)
        self._zeros = np.empty((outputs, blocks), np.uint8)

    def take(self, first: int, column: int, codes: Array, scales: Array, zeros: Array) -> None:
        """Put a tile at its place; `codes` may be overwritten."""
        count, size, columns = codes.shape
        here = slice(column, column + columns), slice(first, first + count)
        self._scales[here] = scales.T
        self._zeros[here] = zeros.T
        if self._spec.layout != "qdq":
            pack_tile(codes, self._spec.grid.bits, self._codes[here])
            return
        matrix = self._codes.T if self._spec.transposed else self._codes
        flat = codes.reshape(count * size, columns)[: self._inputs - first * size]
        matrix[first * size : first * size + len(flat), here[0]] = flat

    def finish(self, store: WeightStore, dtype: Any, relative_error: float) -> QuantizedWeight:
        """Spill the tensors."""
        grid = self._spec.grid
        scales = self._scales.astype(dtype)
        if self._spec.layout != "qdq":
            codes: Array = self._codes
            if self._spec.layout == "table":
                codes = codes.reshape(len(codes), -1)
            zeros = None if grid.symmetric else store.put(pack_rows(self._zeros, grid.bits))
            return QuantizedWeight(store.put(codes), store.put(scales), zeros, relative_error)
        # Signed types hold symmetric codes: their zero point is then 0, the default.
        kind = _QDQ_TYPES[grid.bits, grid.symmetric]
        codes, zero_points = self._codes, self._zeros
        if grid.symmetric:
            np.subtract(codes, np.uint8(grid.middle), out=codes)
            codes = codes.view(np.int8)
        if self._spec.block_size == 0:
            scales, zero_points = scales[:, 0], zero_points[:, 0]
        elif not self._spec.transposed:
            scales, zero_points = np.ascontiguousarray(scales.T), zero_points.T
        return QuantizedWeight(
            _put_integers(store, codes, kind),
            store.put(scales),
            None if grid.symmetric else _put_integers(store, zero_points, kind),
            relative_error,
        )


_QDQ_TYPES = {
    (4, False): ir.DataType.UINT4,
    (4, True): ir.DataType.INT4,
    (8, False): ir.DataType.UINT8,
    (8, True): ir.DataType.INT8,
}


def _put_integers(store: WeightStore, values: Array, kind: ir.DataType) -> ir.TensorProtocol:
    if kind.bitwidth == 8:
        return store.put(np.ascontiguousarray(values))
    packed = pack_rows(np.ascontiguousarray(values).reshape(-1).view(np.uint8) & 0x0F, 4)
    return store.put_tensor(ir.PackedTensor(packed, kind, shape=values.shape))
