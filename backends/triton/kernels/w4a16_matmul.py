"""Products of 16-bit activations and weights of 4 bits, which become numbers in registers.

A scale, and where there is one a zero point, belongs to a group of inputs of a column. Two groups
lie together: a byte holds the code of an input of the first group in its low half, that of the same
input of the second one in its high half, so that each half of a load is a tile of one group and
codes need not be sorted.

A code c becomes a number without a conversion: the bits of 1024 + c in float16 (128 + c in
bfloat16) are those of 1024 with c in the last ones. The difference to 1024 + zero is exact; its
product with the scale is rounded once.
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

__all__ = ["w4a16_kernel", "w4a16_operation"]


@triton.jit
def numbers(code, zero, scale, dtype: tl.constexpr):
    """Return (code - zero) * scale; code [COLUMNS, PIECE], the others [COLUMNS]."""
    if dtype == tl.float16:
        whole = (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        middle = (zero.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16:
        whole = (code.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        middle = (zero.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        whole = code.to(dtype)
        middle = zero.to(dtype)
    return (whole - middle[:, None]) * scale.to(dtype)[:, None]


@triton.jit
def w4a16_kernel(
    x, codes, scales, zeros, bias, out, rows, columns, depth, stride_x,
    WHOLE: tl.constexpr, IEEE: tl.constexpr, FUNCTION: tl.constexpr, GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    column_tile, row_tile = place(rows, columns, ROWS, COLUMNS, GROUP)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    inside = column < columns
    pairs = tl.cdiv(depth, 2 * GROUP_SIZE)
    pieces: tl.constexpr = GROUP_SIZE // PIECE
    inner = tl.arange(0, PIECE)
    x_at = x + row.to(tl.int64)[None, :] * stride_x
    codes_at = codes + column.to(tl.int64)[:, None] * (pairs * GROUP_SIZE) + inner[None, :]
    first, last = steps_of(pairs * pieces, 1, SPLIT)
    precision: tl.constexpr = "ieee" if IEEE else None
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for step in tl.range(first, last):
        pair = step // pieces
        at = step % pieces * PIECE
        k = pair * 2 * GROUP_SIZE + at + inner
        x_mask = (row < rows)[None, :]
        if WHOLE:
            low_mask = x_mask
            high_mask = x_mask
        else:
            low_mask = x_mask & (k < depth)[:, None]
            high_mask = x_mask & (k + GROUP_SIZE < depth)[:, None]
        both = tl.load(codes_at + (pair * GROUP_SIZE + at), mask=inside[:, None], other=0)
        scale = tl.load(scales + pair * columns + column, mask=inside, other=0)
        if zeros is not None:
            zero = tl.load(zeros + pair * columns + column, mask=inside, other=0)
        else:
            zero = tl.full([COLUMNS], 0x88, tl.uint8)
        low_x = tl.load(x_at + k[:, None], mask=low_mask, other=0.0)
        low_scale = scale.to(tl.uint16).to(tl.float16, bitcast=True)
        low = numbers(both & 15, zero & 15, low_scale, x.dtype.element_ty)
        total = tl.dot(low, low_x, total, input_precision=precision)
        high_x = tl.load(x_at + (k + GROUP_SIZE)[:, None], mask=high_mask, other=0.0)
        high_scale = (scale >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        high = numbers(both >> 4, zero >> 4, high_scale, x.dtype.element_ty)
        total = tl.dot(high, high_x, total, input_precision=precision)
    finish(total, out, None, None, bias, row, column, rows, columns, FUNCTION, SPLIT)


def w4a16_operation(
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any | None,
    bias: Any | None,
    architecture: Architecture,
    *,
    columns: int,
    group_size: int,
    function: str = "none",
) -> Operation:
    """Describe function(x wᵀ + bias), w = (code - zero) * scale.

    Args:
        x: Activations, [rows, depth], the depth side by side.
        codes: uint8 [columns, pairs, group_size]: two groups a pair, padded to whole pairs.
        scales: uint32 [pairs, columns] as int32: the float16 of the first group in the low half.
        zeros: uint8 [pairs, columns], the first group in the low half; 8 where None.
        bias: [columns] or None.
        architecture: What the tilings are chosen for.
        columns: Columns of the result.
        group_size: Inputs that share a scale: 32, 64 or 128.
        function: An activation, or "none".
    """
    rows, depth = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    weights = {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    product = Product(
        x,
        out,
        {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()},
        str(x.dtype).removeprefix("torch."),
        bias=bias,
        function=function,
    )
    padded = -(-depth // (2 * group_size)) * 2 * group_size

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        return product.launches(
            w4a16_kernel,
            {"codes": codes, "scales": scales, "zeros": zeros},
            {
                "WHOLE": depth == padded,
                "IEEE": x.dtype == torch.float32,
                "GROUP_SIZE": group_size,
            },
            configuration,
            padded,
            again=dict.fromkeys(("scales", "zeros"), group_size // configuration["PIECE"]),
        )

    return Operation(
        name="w4a16 product",
        candidates=_candidates(product, group_size, architecture),
        prepare=prepare,
        results=(out,),
        least=product.least,
        key=(
            x.dtype, columns, depth, group_size, min(triton.next_power_of_2(rows), 4096), function,
        ),
    )  # fmt: skip


def _candidates(
    product: Product, group_size: int, architecture: Architecture
) -> tuple[Configuration, ...]:
    element: int = product.x.element_size()

    def shared(tiles: Mapping[str, int]) -> int:
        return (
            tiles["PIECE"] * (tiles["COLUMNS"] + 2 * element * tiles["ROWS"]) + 5 * tiles["COLUMNS"]
        )

    def registers(tiles: Mapping[str, int], warps: int) -> int:
        # The codes of both groups and their numbers.
        weights = tiles["COLUMNS"] * tiles["PIECE"] * (1 + 2 * element) // 4
        return 40 + weights // (32 * warps)

    return tilings(
        product,
        architecture,
        sizes={
            "ROWS": row_sizes(product.rows),
            "COLUMNS": (64, 128, 256),
            "PIECE": tuple(size for size in (64, 32) if size <= group_size),
        },
        steps=lambda tiles: -(-product.depth // (2 * group_size)) * (group_size // tiles["PIECE"]),
        shared=shared,
        registers=registers,
    )
