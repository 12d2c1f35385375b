"""Flash-LLM's product with weights in tiled CSL, in Gluon: compiled, and never run.

Gluon, Triton's language of layouts, has the scatter to shared memory that tiled CSL is made for,
but no interpreter. What is checked is that the kernel compiles, to what instructions and with how
many registers. Where results are needed, `tiled_bitmap_matmul` gives them.

As in Flash-LLM (Xia et al. 2023, section 4), registers receive the nonzeros of the next tile while
the tensor cores multiply this one; then they are scattered into the other one of two dense tiles,
which was cleared before. A nonzero says itself where it goes: the place is that of the swizzled
layout the tensor cores' loads read without bank conflicts.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from lwc.backends.triton.operation import Access, Configuration, Launch, Work
from lwc.core.tiled_csl import TILE_COLUMNS, TILE_ROWS

__all__ = ["tiled_csl_kernel", "tiled_csl_launch"]


@gluon.jit
def nonzeros_of(nonzeros, offsets, tile, LAYOUT: gl.constexpr, CAPACITY: gl.constexpr):
    """Load the vectors of a tile; those behind the last are it again, and written once more."""
    start = gl.load(offsets + tile)
    count = gl.load(offsets + tile + 1) - start
    vector = gl.arange(0, CAPACITY // 4, layout=gl.SliceLayout(1, LAYOUT))
    element = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    number = gl.minimum(vector, count - 1)[:, None] * 4 + element[None, :]
    here = nonzeros + start.to(gl.int64) * 4
    filled = (vector < CAPACITY * count)[:, None]  # none of an empty tile
    return gl.load(here + number, mask=filled, other=0), count


@gluon.jit
def scatter(words, count, tile, CLEAR: gl.constexpr):
    """Clear a dense tile, flat, and write nonzeros to their places."""
    tile.store(gl.zeros([tile.shape[0]], gl.float16, layout=CLEAR))
    gl.barrier()
    if count > 0:
        dealt = words.reshape([words.shape[0] * 4])
        values = dealt.to(gl.uint16).to(gl.float16, bitcast=True)
        tile.scatter(values, dealt >> 16, 0)


@gluon.jit
def fetch(x_at, to, row, rows, k, depth):
    """Copy a tile of activations to shared memory ahead of its use."""
    async_copy.async_load(to, x_at + k[None, :], mask=(row < rows)[:, None] & (k < depth)[None, :])
    async_copy.commit_group()


@gluon.jit
def tiled_csl_kernel(
    x, nonzeros, offsets, out, rows, columns, depth, stride_x,
    CAPACITY: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
    ROWS: gl.constexpr, SPLIT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8]
    )
    vectors: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    clear: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    weights = gl.allocate_shared_memory(gl.float16, [2, HEIGHT * WIDTH], flat)
    numbers = gl.allocate_shared_memory(gl.float16, [2, ROWS, WIDTH], swizzled)

    column_tile = gl.program_id(0)
    tiles = gl.cdiv(depth, WIDTH)
    each = gl.cdiv(tiles, SPLIT)
    first = gl.program_id(2) * each
    last = gl.minimum(first + each, tiles)
    row = gl.program_id(1) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, loads))
    inner = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, loads))
    x_at = x + row.to(gl.int64)[:, None] * stride_x
    base = column_tile * tiles
    total = gl.zeros([HEIGHT, ROWS], gl.float32, layout=sums)

    words, count = nonzeros_of(nonzeros, offsets, base + first, vectors, CAPACITY)
    fetch(x_at, numbers.index(0), row, rows, first * WIDTH + inner, depth)
    scatter(words, count, weights.index(0), clear)
    for step in range(first, last):
        now = (step - first) % 2
        ahead = gl.minimum(step + 1, last - 1)
        words, count = nonzeros_of(nonzeros, offsets, base + ahead, vectors, CAPACITY)
        async_copy.wait_group(0)
        gl.barrier()
        fetch(x_at, numbers.index(1 - now), row, rows, ahead * WIDTH + inner, depth)
        tile = weights.index(now).reinterpret(gl.float16, [HEIGHT, WIDTH], swizzled)
        w = tile.load(gl.DotOperandLayout(0, sums, 2))
        other = numbers.index(now).permute([1, 0]).load(gl.DotOperandLayout(1, sums, 2))
        total = mma_v2(w, other, total)
        scatter(words, count, weights.index(1 - now), clear)
    async_copy.wait_group(0)

    line = gl.program_id(1) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, sums))
    column = column_tile * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, sums))
    at = (line + gl.program_id(2) * rows).to(gl.int64)[None, :] * columns + column[:, None]
    inside = (column < columns)[:, None] & (line < rows)[None, :]
    gl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def tiled_csl_launch(
    x: Any,
    nonzeros: Any,
    offsets: Any,
    out: Any,
    *,
    fullest: int,
    configuration: Configuration,
) -> Launch:
    """Describe x wᵀ with w as `lwc.core.tiled_csl` encodes it, in parts of the depth.

    Args:
        x: Activations, float16 [rows, depth], the depth side by side in multiples of eight.
        nonzeros: int32 [n], the bits of the words; the places that they name are trusted.
        offsets: int32 [tiles + 2], trusted likewise.
        out: float32 [parts, rows, columns].
        fullest: Nonzeros of the tile that has most.
        configuration: ROWS and SPLIT, and the warps.
    """
    parts, rows, columns = out.shape
    depth = x.shape[1]
    row_tiles = -(-rows // configuration["ROWS"])
    column_tiles = -(-columns // TILE_ROWS)
    tiles = -(-depth // TILE_COLUMNS)
    size, words, ends = rows * depth * 2, nonzeros.numel() * 4, offsets.numel() * 4
    work = Work(
        (
            Access("x", size, size * column_tiles),
            Access("nonzeros", words, words * row_tiles, size + words // column_tiles),
            Access("offsets", ends, ends * row_tiles),
            Access("out", out.numel() * 4, out.numel() * 4),
        ),
        2 * row_tiles * configuration["ROWS"] * column_tiles * tiles * TILE_ROWS * TILE_COLUMNS,
        "float16",
    )
    return Launch(
        kernel=tiled_csl_kernel,
        grid=(column_tiles, row_tiles, parts),
        arguments={
            "x": x, "nonzeros": nonzeros, "offsets": offsets, "out": out, "rows": rows,
            "columns": columns, "depth": depth, "stride_x": x.stride(0),
        },
        constants={
            "CAPACITY": max(triton.next_power_of_2(fullest), 1024), "HEIGHT": TILE_ROWS,
            "WIDTH": TILE_COLUMNS, "WARPS": configuration.warps,
        },
        configuration=configuration,
        work=work,
    )  # fmt: skip
