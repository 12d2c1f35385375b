"""Products with sparse weights: loaded as sparse, multiplied as dense (Flash-LLM, Xia et al. 2023).

Weights lie as `lwc.core.tiled_bitmap` packs them. While the tensor cores multiply a tile, the bits
and pairs of the next ones are copied to shared memory. A pair of elements of a tile is the one
whose number is that of the bits set before it. A thread has whole bytes of bits: their counts are
summed over the tile, and within a byte it goes from bit to bit, so that neighbouring threads take
neighbouring pairs, which lie in different banks.

With a bit for each element there would be less to load, but expanding takes a quarter more
instructions, and they, not memory, bound the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.kernels.product import (
    Product,
    finish,
    place,
    row_sizes,
    steps_of,
    tilings,
)
from lwc.backends.triton.operation import Configuration, Launch, Operation
from lwc.core.tiled_bitmap import PAIRS
from lwc.core.tiled_csl import TILE_COLUMNS, TILE_ROWS

__all__ = ["tiled_bitmap_kernel", "tiled_bitmap_operation"]


@triton.jit
def in_turn(a, b, c, d, e, f, g, h):
    """Return a[0], b[0], .., h[0], a[1], ..."""
    even = tl.interleave(tl.interleave(a, e), tl.interleave(c, g))
    odd = tl.interleave(tl.interleave(b, f), tl.interleave(d, h))
    return tl.interleave(even, odd)


@triton.jit
def expanded(bits, pairs, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile [HEIGHT, WIDTH] of its bits, in bytes, and the pairs they stand for."""
    byte = bits.to(tl.uint32)
    twos = byte - ((byte >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    count = ((fours + (fours >> 4)) & 15).to(tl.int32)
    a, b, c, d = (byte & 1) != 0, (byte & 2) != 0, (byte & 4) != 0, (byte & 8) != 0
    e, f, g, h = (byte & 16) != 0, (byte & 32) != 0, (byte & 64) != 0, (byte & 128) != 0
    n0 = tl.cumsum(count, 0) - count
    n1 = n0 + a.to(tl.int32)
    n2 = n1 + b.to(tl.int32)
    n3 = n2 + c.to(tl.int32)
    n4 = n3 + d.to(tl.int32)
    n5 = n4 + e.to(tl.int32)
    n6 = n5 + f.to(tl.int32)
    n7 = n6 + g.to(tl.int32)
    found = tl.gather(pairs, in_turn(n0, n1, n2, n3, n4, n5, n6, n7), 0)
    found = tl.where(in_turn(a, b, c, d, e, f, g, h), found, 0)
    even = found.to(tl.uint16).to(tl.float16, bitcast=True)
    odd = (found >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.interleave(even, odd), [HEIGHT, WIDTH])


@triton.jit
def tile_of(
    bits, pairs, offsets, units, tile, present,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Load a tile and expand it; zeros, and no load, where `present` is 0.

    Whatever the offsets are, no more than the `units` of pairs that exist are loaded.
    """
    octets: tl.constexpr = HEIGHT * WIDTH // 16
    start = tl.load(offsets + tile, mask=present > 0, other=0)
    end = tl.load(offsets + tile + 1, mask=present > 0, other=0)
    start = tl.minimum(tl.maximum(start, 0), units)
    count = tl.minimum(end - start, units - start) * UNIT
    octet = tl.arange(0, octets)
    own = tl.load(bits + tile.to(tl.int64) * octets + octet, mask=octet < present * octets, other=0)
    number = tl.arange(0, CAPACITY)
    here = pairs + start.to(tl.int64) * UNIT
    filled = tl.load(here + number, mask=number < count, other=0)
    return expanded(own, filled, HEIGHT, WIDTH)


@triton.jit
def tiled_bitmap_kernel(
    x, bits, pairs, offsets, bias, out, rows, columns, depth, units, stride_x,
    WHOLE: tl.constexpr, IEEE: tl.constexpr, FUNCTION: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, CAPACITY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    column_tile, row_tile = place(rows, columns, ROWS, COLUMNS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    x_at = x + row.to(tl.int64)[None, :] * stride_x
    tiles = tl.cdiv(depth, WIDTH)
    upper = column_tile * (COLUMNS // HEIGHT)
    below_too = tl.minimum(tl.cdiv(columns, HEIGHT) - upper - 1, 1)
    first, last = steps_of(depth, WIDTH, SPLIT)
    precision: tl.constexpr = "ieee" if IEEE else None
    total = tl.zeros([HEIGHT, ROWS], tl.float32)
    below = tl.zeros([HEIGHT, ROWS], tl.float32)
    for step in tl.range(first, last):
        k = step * WIDTH + tl.arange(0, WIDTH)
        mask = (row < rows)[None, :]
        if not WHOLE:
            mask = mask & (k < depth)[:, None]
        numbers = tl.load(x_at + k[:, None], mask=mask, other=0.0)
        w = tile_of(
            bits, pairs, offsets, units, upper * tiles + step, 1, HEIGHT, WIDTH, UNIT, CAPACITY
        )
        total = tl.dot(w.to(numbers.dtype), numbers, total, input_precision=precision)
        if COLUMNS > HEIGHT:
            w = tile_of(
                bits, pairs, offsets, units, (upper + 1) * tiles + step, below_too,
                HEIGHT, WIDTH, UNIT, CAPACITY,
            )  # fmt: skip
            below = tl.dot(w.to(numbers.dtype), numbers, below, input_precision=precision)
    column = column_tile * COLUMNS + tl.arange(0, HEIGHT)
    finish(total, out, None, None, bias, row, column, rows, columns, FUNCTION, SPLIT)
    if COLUMNS > HEIGHT:
        column += HEIGHT
        finish(below, out, None, None, bias, row, column, rows, columns, FUNCTION, SPLIT)


def tiled_bitmap_operation(
    x: Any,
    bits: Any,
    pairs: Any,
    offsets: Any,
    bias: Any | None,
    architecture: Architecture,
    *,
    columns: int,
    fullest: int,
    function: str = "none",
) -> Operation:
    """Describe function(x wᵀ + bias) with sparse w [columns, depth].

    Args:
        x: Activations, [rows, depth], the depth side by side.
        bits: uint8 [tiles of columns, tiles of the depth, 512]: the bytes of the bitmap.
        pairs: int32 [n], pairs of values, the first in the low half; n is a multiple of four.
        offsets: int32 [tiles + 1].
        bias: [columns] or None.
        architecture: What the tilings are chosen for.
        columns: Columns of the result.
        fullest: Pairs of the tile that has most.
        function: An activation, or "none".
    """
    rows, depth = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    weights = {"bits": bits, "pairs": pairs, "offsets": offsets}
    product = Product(
        x,
        out,
        {
            "bits": bits.numel(),
            "pairs": pairs.numel() * 4,
            "offsets": offsets.numel() * 4 - 4,
        },
        str(x.dtype).removeprefix("torch."),
        bias=bias,
        function=function,
    )
    # A zero after the last pair of a tile looks at the next place.
    capacity = min(max(triton.next_power_of_2(fullest + 1), 512), TILE_ROWS * TILE_COLUMNS // 2)

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        return product.launches(
            tiled_bitmap_kernel,
            {**weights, "units": pairs.numel() // PAIRS},
            {
                "WHOLE": depth % TILE_COLUMNS == 0, "IEEE": x.dtype == torch.float32,
                "HEIGHT": TILE_ROWS, "WIDTH": TILE_COLUMNS, "UNIT": PAIRS, "CAPACITY": capacity,
            },
            configuration,
            -(-depth // TILE_COLUMNS) * TILE_COLUMNS,
            again={"offsets": 2},
        )  # fmt: skip

    return Operation(
        name="product with sparse weights",
        candidates=_candidates(product, capacity, architecture),
        prepare=prepare,
        results=(out,),
        least=product.least,
        key=(x.dtype, columns, depth, capacity, min(triton.next_power_of_2(rows), 4096), function),
    )


def _candidates(
    product: Product, capacity: int, architecture: Architecture
) -> tuple[Configuration, ...]:
    element: int = product.x.element_size()

    def shared(tiles: Mapping[str, int]) -> int:
        sparse = 4 * capacity + TILE_ROWS * TILE_COLUMNS // 16
        dense = tiles["ROWS"] * TILE_COLUMNS * element
        # The pairs once more, not for each stage, but counted so.
        return tiles["COLUMNS"] // TILE_ROWS * sparse + dense + 2 * capacity

    # Hopper takes the second operand from shared memory, Blackwell keeps sums in its own.
    kept = 1.0 if architecture.capability < 90 else 0.6

    def registers(tiles: Mapping[str, int], warps: int) -> int:
        # Numbers and values of a tile's elements.
        return 40 + int(kept * 2 * TILE_ROWS * TILE_COLUMNS // (32 * warps) * 3 // 4)

    return tilings(
        product,
        architecture,
        sizes={"ROWS": row_sizes(product.rows, 256), "COLUMNS": (TILE_ROWS, 2 * TILE_ROWS)},
        steps=lambda tiles: -(-product.depth // TILE_COLUMNS),
        shared=shared,
        registers=registers,
        stages=(3, 2),
    )
