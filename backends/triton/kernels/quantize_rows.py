"""Rounding of activations to int8, each row by its largest magnitude.

A program holds a row in registers: one read, one write of a quarter or half of it. Rows that are
too long for that are read twice, in parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = ["quantize_rows_kernel", "quantize_rows_operation"]

HELD = 16384
"""Elements of a row that registers hold: 32 in those of each of 512 threads."""


@triton.jit
def largest(value):
    """Return the largest magnitude of a part of a row, infinite where one is no number."""
    magnitude = tl.abs(value)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), 0)


@triton.jit
def rounded(value, step, broken):
    """Return value / step, half to even: adding 1.5 * 2^23 leaves no bits for fractions."""
    steps = tl.div_rn(value, tl.where(step == 0.0, 1.0, step))
    whole = (steps + 12582912.0) - 12582912.0
    return tl.where(broken, 0.0, whole).to(tl.int8)


@triton.jit
def quantize_rows_kernel(
    x, codes, scales, columns, width, stride_x, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    here = x + row * stride_x + column
    value = tl.load(here, mask=column < columns, other=0.0).to(tl.float32)
    top = largest(value)
    for part in tl.range(1, PARTS):
        left = columns - part * COLUMNS
        other = tl.load(here + part * COLUMNS, mask=column < left, other=0.0)
        top = tl.maximum(top, largest(other.to(tl.float32)))
    broken = top == float("inf")
    step = tl.div_rn(top, 127.0)
    to = codes + row * width + column
    tl.store(to, rounded(value, step, broken), mask=column < width)
    for part in tl.range(1, PARTS):
        left = columns - part * COLUMNS
        other = tl.load(here + part * COLUMNS, mask=column < left, other=0.0).to(tl.float32)
        inside = column < width - part * COLUMNS
        tl.store(to + part * COLUMNS, rounded(other, step, broken), mask=inside)
    tl.store(scales + row, tl.where(broken, float("nan"), step))


def quantize_rows_operation(x: Any, width: int | None = None) -> Operation:
    """Describe rounding of x [rows, columns] to int8 codes [rows, width] and scales [rows].

    With `scale = max|x| / 127`, a code is `round(x / scale)`, half to even. The scale of a row with
    NaN or infinities is NaN. Zeros fill codes up to the width, which is that of `x` when None.
    """
    rows, columns = x.shape
    width = columns if width is None else width
    codes = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows,), dtype=torch.float32, device=x.device)
    held = min(triton.next_power_of_2(width), HELD)
    size = rows * columns * x.element_size()
    again = rows * max(columns - held, 0) * x.element_size()

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        accesses = (
            Access("x", size, size + again, columns * x.element_size()),
            Access("codes", rows * width, rows * width),
            Access("scales", 4 * rows, 4 * rows),
        )
        launch = Launch(
            kernel=quantize_rows_kernel,
            grid=(rows,),
            arguments={
                "x": x, "codes": codes, "scales": scales, "columns": columns, "width": width,
                "stride_x": x.stride(0),
            },
            constants={"PARTS": -(-width // held)},
            configuration=configuration,
            work=Work(accesses, 6 * rows * columns, "float32"),
        )  # fmt: skip
        return (launch,)

    return Operation(
        name="rows to int8",
        candidates=tuple(
            Configuration({"COLUMNS": held}, warps=warps, stages=1)
            for warps in (4, 8, 16)
            if 128 <= held // warps <= 1024 or (warps == 4 and held < 512)
        ),
        prepare=prepare,
        results=(codes, scales),
        least=Least(size + rows * width + 4 * rows, 6 * rows * columns),
        key=(x.dtype, columns, width, min(rows, 4096)),
    )
