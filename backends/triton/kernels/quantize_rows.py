"""Rounding of activations to int8, each row by its largest magnitude.

A program holds a row in registers: one read, one write of a quarter or half of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = ["LONGEST", "quantize_rows_kernel", "quantize_rows_operation"]

LONGEST = 32768
"""Elements of the longest row: 32 in the registers of each of 1024 threads."""


@triton.jit
def quantize_rows_kernel(x, codes, scales, columns, stride_x, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    value = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(value)
    top = tl.max(magnitude, 0)
    step = tl.div_rn(top, 127.0)
    steps = tl.div_rn(value, tl.where(step == 0.0, 1.0, step))
    # Adding 1.5 * 2^23 leaves no bits for fractions: it rounds half to even.
    whole = (steps + 12582912.0) - 12582912.0
    broken = tl.max((magnitude < float("inf")).to(tl.int32) ^ 1, 0) != 0
    whole = tl.where(broken, 0.0, whole)
    tl.store(codes + row * columns + column, whole.to(tl.int8), mask=inside)
    tl.store(scales + row, tl.where(broken, float("nan"), step))


def quantize_rows_operation(x: Any) -> Operation:
    """Describe rounding of x [rows, columns] to int8 codes and float32 scales [rows].

    With `scale = max|x| / 127`, a code is `round(x / scale)`, half to even. The scale of a row with
    NaN or infinities is NaN.
    """
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows,), dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(columns)
    size = rows * columns * x.element_size()

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        accesses = (
            Access("x", size, size),
            Access("codes", rows * columns, rows * columns),
            Access("scales", 4 * rows, 4 * rows),
        )
        launch = Launch(
            kernel=quantize_rows_kernel,
            grid=(rows,),
            arguments={
                "x": x, "codes": codes, "scales": scales, "columns": columns,
                "stride_x": x.stride(0),
            },
            constants={},
            configuration=configuration,
            work=Work(accesses, 6 * rows * columns, "float32"),
        )  # fmt: skip
        return (launch,)

    return Operation(
        name="rows to int8",
        candidates=tuple(
            Configuration({"COLUMNS": width}, warps=warps, stages=1)
            for warps in (4, 8, 16, 32)
            if 128 <= width // warps <= 1024 or (warps == 4 and width < 512)
        ),
        prepare=prepare,
        results=(codes, scales),
        least=Least(size + rows * columns + 4 * rows, 6 * rows * columns),
        key=(x.dtype, columns, min(rows, 4096)),
    )
