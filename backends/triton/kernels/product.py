"""What kernels of matrix products share: the order of their tiles, their ends, their tilings.

A product is y = x wᵀ, x [rows, depth], w [columns, depth]. A tile of the result is held transposed,
[COLUMNS, ROWS]: weights are then the first operand, which may lie in registers, where they are
unpacked, and a few rows need not be padded to the 64 of a warp group's instruction.

Few tiles cannot fill a GPU, so the depth is cut into parts that are summed by a second kernel, in
a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.kernels.activation import activate
from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Work

__all__ = ["Product", "finish", "place", "row_sizes", "steps_of", "sum_parts_kernel", "tilings"]

GROUP = 8
"""Tiles of columns that are worked on side by side, so that their weights stay in the cache."""

MOST_ACCUMULATORS = 128
"""32-bit accumulators of a thread."""

MOST_REGISTERS = 208
"""Registers of a thread by the estimate of a tiling; addresses and the like need the others."""

ERF_REGISTERS = 24
"""What the polynomials of erf need beside the sums."""

MOST_PARTS = 16

SUMMED = 512
"""Columns that a program of `sum_parts_kernel` sums."""


@triton.jit
def place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return the tile of columns and of rows of this program."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    in_group = GROUP * row_tiles
    first = program // in_group * GROUP
    width = tl.minimum(tl.cdiv(columns, COLUMNS) - first, GROUP)
    inside = program % in_group
    return first + inside % width, inside // width


@triton.jit
def steps_of(depth, DEPTH: tl.constexpr, SPLIT: tl.constexpr):
    """Return where the part of the depth of this program begins and ends, in steps of DEPTH."""
    steps = tl.cdiv(depth, DEPTH)
    each = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, steps)


@triton.jit
def ended(total, x_scale, w_scale, bias, row, column, rows, columns, FUNCTION: tl.constexpr):
    """Scale sums [columns, rows], add the bias, and activate."""
    value = total.to(tl.float32)
    if x_scale is not None:
        value = value * tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :]
    if w_scale is not None:
        value = value * tl.load(w_scale + column, mask=column < columns, other=0.0)[:, None]
    if bias is not None:
        shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        value = value + shift[:, None]
    if FUNCTION != "none":
        value = activate(value, FUNCTION)
    return value


@triton.jit
def finish(
    total, out, x_scale, w_scale, bias, row, column, rows, columns,
    FUNCTION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store sums [columns, rows]: as the result, or as a part of it."""
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    line = tl.min(row, 0)
    at = (row - line)[None, :] * columns + column[:, None]
    if SPLIT > 1:
        line += tl.program_id(1) * rows
    else:
        total = ended(total, x_scale, w_scale, bias, row, column, rows, columns, FUNCTION)
    here = out + line.to(tl.int64) * columns
    tl.store(here + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts_kernel(
    parts, x_scale, w_scale, bias, out, rows, columns,
    FUNCTION: tl.constexpr, SPLIT: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * SUMMED + tl.arange(0, SUMMED)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    at = row.to(tl.int64)[None, :] * columns + column[:, None]
    total = tl.zeros([SUMMED, 1], parts.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        line = (row + part * rows).to(tl.int64)[None, :] * columns
        total += tl.load(parts + line + column[:, None], mask=inside, other=0)
    value = ended(total, x_scale, w_scale, bias, row, column, rows, columns, FUNCTION)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Product:
    """A product and what ends it.

    Attributes:
        x: Activations, [rows, depth], the depth side by side.
        out: The result, [rows, columns].
        weights: Bytes of each tensor that describes the weights: a row of tiles loads all of it.
        operands: The type of the operands in the tensor cores.
        sums: The type that products are summed in.
        x_scale: Factors of rows, float32 [rows], or None.
        w_scale: Factors of columns, float32 [columns], or None.
        bias: Added then, [columns], or None.
        function: An activation, or "none".
    """

    x: Any
    out: Any
    weights: Mapping[str, int]
    operands: str
    sums: torch.dtype = torch.float32
    x_scale: Any | None = None
    w_scale: Any | None = None
    bias: Any | None = None
    function: str = "none"

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return int(self.out.shape[0])

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return int(self.out.shape[1])

    @property
    def depth(self) -> int:
        """What is summed over."""
        return int(self.x.shape[1])

    @property
    def least(self) -> Least:
        """The bound: everything once."""
        vectors = sum(_bytes(tensor) for tensor in (self.x_scale, self.w_scale, self.bias))
        tensors = _bytes(self.x) + _bytes(self.out) + sum(self.weights.values())
        return Least(vectors + tensors, 2 * self.rows * self.columns * self.depth)

    def launches(
        self,
        kernel: Any,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
        configuration: Configuration,
        padded_depth: int,
        again: Mapping[str, int] | None = None,
    ) -> tuple[Launch, ...]:
        """Return the launch of a kernel and, where the depth is cut, of the sum.

        Args:
            kernel: Has parameters `x`, `out`, `bias`, `rows`, `columns`, `depth` and `stride_x`.
            arguments: What it is given besides them.
            constants: What it is compiled for besides `FUNCTION`.
            configuration: Its tiling, with ROWS, COLUMNS, GROUP and SPLIT among it.
            padded_depth: The depth with what pads the tiles.
            again: How often a tile of the result loads some of the tensors of the weights.
        """
        row_tiles = -(-self.rows // configuration["ROWS"])
        column_tiles = -(-self.columns // configuration["COLUMNS"])
        split = configuration["SPLIT"]
        out, ends = self.out, self._ends
        if split > 1:
            shape = (split, *self.out.shape)
            out = torch.empty(shape, dtype=self.sums, device=self.out.device)
            ends = dict.fromkeys(ends)
        flops = 2 * row_tiles * configuration["ROWS"] * padded_depth
        flops *= column_tiles * configuration["COLUMNS"]
        given = {name: ends[name] for name in ends if name in kernel.arg_names}
        first = Launch(
            kernel=kernel,
            grid=(row_tiles * column_tiles, split),
            arguments={
                "x": self.x, "out": out, "rows": self.rows, "columns": self.columns,
                "depth": self.depth, "stride_x": self.x.stride(0), **given, **arguments,
            },
            constants={**constants, "FUNCTION": self.function},
            configuration=configuration,
            work=Work(
                (
                    *self._loads(configuration, row_tiles, column_tiles, again or {}),
                    *(self._vectors(row_tiles, column_tiles) if split == 1 else ()),
                    Access("out" if split == 1 else "parts", _bytes(out), _bytes(out)),
                ),
                flops,
                self.operands,
            ),
        )  # fmt: skip
        return (first,) if split == 1 else (first, self._sum(out, configuration))

    @property
    def _ends(self) -> dict[str, Any]:
        return {"x_scale": self.x_scale, "w_scale": self.w_scale, "bias": self.bias}

    def _loads(
        self,
        configuration: Configuration,
        row_tiles: int,
        column_tiles: int,
        again: Mapping[str, int],
    ) -> tuple[Access, ...]:
        """Count the operands; a group of columns passes all rows before the next one comes."""
        size = _bytes(self.x)
        weights = sum(self.weights.values())
        group = min(configuration["GROUP"], column_tiles)
        flying = weights * group // column_tiles + size // row_tiles
        return (
            Access("x", size, size * column_tiles, size + flying),
            *(
                Access(name, once, once * row_tiles * again.get(name, 1), flying)
                for name, once in self.weights.items()
            ),
        )  # fmt: skip

    def _vectors(self, row_tiles: int, column_tiles: int) -> tuple[Access, ...]:
        times = {"x_scale": column_tiles, "w_scale": row_tiles, "bias": row_tiles}
        return tuple(
            Access(name, _bytes(tensor), _bytes(tensor) * times[name])
            for name, tensor in self._ends.items()
            if tensor is not None
        )

    def _sum(self, parts: Any, configuration: Configuration) -> Launch:
        blocks = -(-self.columns // SUMMED)
        out = _bytes(self.out)
        return Launch(
            kernel=sum_parts_kernel,
            grid=(self.rows, blocks),
            arguments={
                "parts": parts, "out": self.out, "rows": self.rows, "columns": self.columns,
                **self._ends,
            },
            constants={"FUNCTION": self.function, "SUMMED": SUMMED},
            configuration=Configuration({"SPLIT": configuration["SPLIT"]}, warps=4, stages=1),
            work=Work(
                (
                    Access("parts", _bytes(parts), _bytes(parts)),
                    *self._vectors(self.rows, blocks),
                    Access("out", out, out),
                ),
                parts.numel(),
                "float32",
            ),
        )  # fmt: skip


def row_sizes(rows: int, most: int = 128) -> tuple[int, ...]:
    """Return sizes of tiles for some rows, the least first; one covers few rows."""
    whole = max(16, triton.next_power_of_2(rows))
    if whole <= 64:
        return (whole,)
    return tuple(size for size in (64, 128, 256) if size <= min(whole, most))


def tilings(
    product: Product,
    architecture: Architecture,
    *,
    sizes: Mapping[str, tuple[int, ...]],
    steps: Callable[[Mapping[str, int]], int],
    shared: Callable[[Mapping[str, int]], int],
    registers: Callable[[Mapping[str, int], int], int],
    stages: tuple[int, ...] = (4, 3, 2),
) -> tuple[Configuration, ...]:
    """Return tilings that an architecture has registers and shared memory for.

    First come those that fill it, by the bytes that their programs ask for, then the others, which
    may be faster where the last wave is short.

    Args:
        product: What is computed.
        architecture: What it is computed on.
        sizes: Of ROWS, COLUMNS and others, what is tried.
        steps: Steps of the loop over the depth with some sizes.
        shared: Bytes of a stage.
        registers: Registers of a thread for operands, with some warps.
        stages: Stages to try; the first that fits is taken.
    """
    found = []
    for rows in sizes["ROWS"]:
        for columns in sizes["COLUMNS"]:
            rest = {name: value for name, value in sizes.items() if name not in ("ROWS", "COLUMNS")}
            for others in _choices(rest):
                tiles = {"ROWS": rows, "COLUMNS": columns, **others}
                warps = 4 if rows * columns <= 64 * 128 else 8
                used = registers(tiles, warps) + rows * columns // (32 * warps)
                used += ERF_REGISTERS if product.function == "gelu" else 0
                if rows * columns > MOST_ACCUMULATORS * 32 * warps or used > MOST_REGISTERS:
                    continue
                depth = [n for n in stages if n * shared(tiles) <= architecture.shared_per_block]
                if not depth:
                    continue
                programs = -(-product.rows // rows) * -(-product.columns // columns)
                split = _parts(product, tiles, steps(tiles), architecture)
                tiles |= {"GROUP": GROUP, "SPLIT": split}
                full = programs * split >= architecture.multiprocessors
                found.append((not full, _asked(product, tiles, split), warps, depth[0], tiles))
    found.sort(key=lambda entry: entry[:4])
    return tuple(
        Configuration(tiles, warps=warps, stages=stages) for *_, warps, stages, tiles in found
    )


def _choices(sizes: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    found: list[dict[str, int]] = [{}]
    for name, values in sizes.items():
        found = [{**chosen, name: value} for chosen in found for value in values]
    return found


def _parts(
    product: Product, tiles: Mapping[str, int], steps: int, architecture: Architecture
) -> int:
    """Return the parts of the depth: enough to fill the GPU, each with four steps to run ahead in.

    More are taken where they fill the last wave and cost at most a twentieth more bytes.
    """
    programs = -(-product.rows // tiles["ROWS"]) * -(-product.columns // tiles["COLUMNS"])
    whole = _asked(product, tiles, 1)

    def waves(parts: int) -> float:
        return -(-programs * parts // architecture.multiprocessors) / parts

    parts = 1
    while steps >= 8 * parts and parts < MOST_PARTS:
        lacking = programs * parts < architecture.multiprocessors
        cheap = _asked(product, tiles, 2 * parts) <= 1.05 * whole
        if not lacking and not (cheap and waves(2 * parts) < 0.95 * waves(parts)):
            break
        parts *= 2
    return parts


def _asked(product: Product, tiles: Mapping[str, int], parts: int) -> int:
    """Return the bytes of operands and parts that programs ask for."""
    row_tiles = -(-product.rows // tiles["ROWS"])
    column_tiles = -(-product.columns // tiles["COLUMNS"])
    written = 8 * parts * product.rows * product.columns if parts > 1 else 0
    return _bytes(product.x) * column_tiles + sum(product.weights.values()) * row_tiles + written


def _bytes(tensor: Any | None) -> int:
    return 0 if tensor is None else int(tensor.numel() * tensor.element_size())
