"""Products of int8 activations and int8 weights in the int8 tensor cores, summed in int32.

A row of activations has a scale and so has a column of the result: both are applied to the exact
sums. Activations are rounded by `quantize_rows`.
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

__all__ = ["w8a8_kernel", "w8a8_operation"]


@triton.jit
def w8a8_kernel(
    x, w, x_scale, w_scale, bias, out, rows, columns, depth, stride_x, stride_w,
    WHOLE: tl.constexpr, FUNCTION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    column_tile, row_tile = place(rows, columns, ROWS, COLUMNS, GROUP)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    x_at = x + row.to(tl.int64)[None, :] * stride_x
    w_at = w + column.to(tl.int64)[:, None] * stride_w
    first, last = steps_of(depth, PIECES * DEPTH, SPLIT)
    total = tl.zeros([COLUMNS, ROWS], tl.int32)
    for step in tl.range(first, last):
        for piece in tl.static_range(PIECES):
            k = (step * PIECES + piece) * DEPTH + tl.arange(0, DEPTH)
            w_mask = (column < columns)[:, None]
            x_mask = (row < rows)[None, :]
            if not WHOLE:
                w_mask = w_mask & (k < depth)[None, :]
                x_mask = x_mask & (k < depth)[:, None]
            codes = tl.load(w_at + k[None, :], mask=w_mask, other=0)
            numbers = tl.load(x_at + k[:, None], mask=x_mask, other=0)
            total = tl.dot(codes, numbers, total, out_dtype=tl.int32)
    finish(total, out, x_scale, w_scale, bias, row, column, rows, columns, FUNCTION, SPLIT)


def w8a8_operation(
    x: Any,
    x_scale: Any,
    w: Any,
    w_scale: Any,
    bias: Any | None,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    function: str = "none",
) -> Operation:
    """Describe function(x wᵀ * x_scale * w_scale + bias).

    Args:
        x: Rounded activations, int8 [rows, depth], the depth side by side.
        x_scale: float32 [rows].
        w: Weights, int8 [columns, depth], the depth side by side.
        w_scale: float32 [columns].
        bias: [columns] or None.
        architecture: What the tilings are chosen for.
        dtype: The type of the result.
        function: An activation, or "none".
    """
    rows, depth = x.shape
    columns = w.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    product = Product(
        x, out, {"w": columns * depth}, "int8", torch.int32, x_scale, w_scale, bias, function
    )

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        step = configuration["DEPTH"] * configuration["PIECES"]
        return product.launches(
            w8a8_kernel,
            {"w": w, "stride_w": w.stride(0)},
            {"WHOLE": depth % step == 0},
            configuration,
            -(-depth // step) * step,
        )

    return Operation(
        name="w8a8 product",
        candidates=_candidates(product, architecture),
        prepare=prepare,
        results=(out,),
        least=product.least,
        key=(columns, depth, min(triton.next_power_of_2(rows), 4096), dtype, function),
    )


def _candidates(product: Product, architecture: Architecture) -> tuple[Configuration, ...]:
    # Before Hopper operands pass through registers, and Triton carries those of a single product
    # from one step of a loop to the next, each number in a register of its own.
    in_registers = architecture.capability < 90

    def shared(tiles: Mapping[str, int]) -> int:
        return (tiles["ROWS"] + tiles["COLUMNS"]) * tiles["DEPTH"] * tiles["PIECES"]

    def registers(tiles: Mapping[str, int], warps: int) -> int:
        operands = (tiles["ROWS"] + tiles["COLUMNS"]) * tiles["DEPTH"] // 4
        return 40 + (operands // (16 * warps) if in_registers else 0)

    return tilings(
        product,
        architecture,
        sizes={
            "ROWS": row_sizes(product.rows, 256),
            # A tile of 256 columns is two in tensor memory, which are read into registers at once.
            "COLUMNS": (64, 128) if architecture.tensor_memory else (64, 128, 256),
            "DEPTH": (64, 32) if in_registers else (128, 64),
            "PIECES": (2,) if in_registers else (1,),
        },
        steps=lambda tiles: -(-product.depth // (tiles["DEPTH"] * tiles["PIECES"])),
        shared=shared,
        registers=registers,
    )
