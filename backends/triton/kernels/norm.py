"""RMSNorm and LayerNorm of rows, with the sum of a residual stream before it.

A program holds whole rows in registers: one read, one write. It walks over many blocks of rows, so
that the weight is loaded once by each program and not once by each row.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = ["LONGEST", "norm_kernel", "norm_operation"]

LONGEST = 16384
"""Elements of the longest row: 32 of values in the registers of each of 512 threads."""


@triton.jit
def norm_kernel(
    x, residual, weight, bias, out, total,
    rows, columns, stride_x, stride_residual, eps,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    if weight is not None:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        packed = row[:, None] * columns + column[None, :]
        if residual is not None:
            other = residual + row[:, None] * stride_residual + column[None, :]
            value += tl.load(other, mask=mask, other=0.0).to(tl.float32)
            # The norm is that of the sum as it is stored, as if it had been added apart.
            value = value.to(total.dtype.element_ty).to(tl.float32)
            tl.store(total + packed, value.to(total.dtype.element_ty), mask=mask)
        if CENTRED:
            mean = tl.sum(value, axis=1) / columns
            value = tl.where(mask, value - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
        value = value * scale[:, None]
        if weight is not None:
            value = value * factor[None, :]
        if bias is not None:
            value = value + shift[None, :]
        tl.store(out + packed, value.to(out.dtype.element_ty), mask=mask)


def norm_operation(
    x: Any,
    weight: Any | None,
    bias: Any | None,
    residual: Any | None,
    architecture: Architecture,
    *,
    eps: float,
    centred: bool,
) -> Operation:
    """Describe the norm of each row of `x`.

    Args:
        x: Rows, [rows, columns], whose columns lie side by side.
        weight: Factors, [columns].
        bias: Added after the factors, [columns].
        residual: Added to `x` first, as `x` is laid out; the sum is the second result.
        architecture: What the tilings are chosen for.
        eps: Added to the mean square.
        centred: LayerNorm; otherwise RMSNorm.
    """
    rows, columns = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        blocks = -(-rows // configuration["ROWS"])
        programs = min(
            blocks, architecture.multiprocessors * _resident(configuration, architecture)
        )
        vectors = [("weight", weight), ("bias", bias)]
        accesses = [
            Access(name, size, size)
            for name, tensor in (("x", x), ("residual", residual), ("out", out), ("total", total))
            if tensor is not None
            for size in [rows * columns * tensor.element_size()]
        ] + [
            Access(name, size, size * programs)
            for name, tensor in vectors
            if tensor is not None
            for size in [columns * tensor.element_size()]
        ]
        launch = Launch(
            kernel=norm_kernel,
            grid=(programs,),
            arguments={
                "x": x, "residual": residual, "weight": weight, "bias": bias,
                "out": out, "total": total, "rows": rows, "columns": columns,
                "stride_x": x.stride(0),
                "stride_residual": 0 if residual is None else residual.stride(0),
                "eps": float(eps),
            },
            constants={"CENTRED": centred},
            configuration=configuration,
            work=Work(tuple(accesses), 5 * rows * columns, "float32"),
        )  # fmt: skip
        return (launch,)

    given = [tensor for tensor in (x, residual, weight, bias, out, total) if tensor is not None]
    return Operation(
        name="layer norm" if centred else "rms norm",
        candidates=_candidates(rows, columns),
        prepare=prepare,
        results=(out,) if total is None else (out, total),
        least=Least(sum(prod(t.shape) * t.element_size() for t in given), 5 * rows * columns),
        key=(x.dtype, columns, min(rows, 4096), residual is not None, centred),
    )


def _resident(configuration: Configuration, architecture: Architecture) -> int:
    """Return the blocks of an SM, with registers as the compiler was seen to need them."""
    elements = configuration["ROWS"] * configuration["COLUMNS"]
    per_thread = elements // (32 * configuration.warps)
    registers = 24 + 9 * per_thread // 4
    return architecture.resident_blocks(registers=registers, shared=0, warps=configuration.warps)


def _candidates(rows: int, columns: int) -> tuple[Configuration, ...]:
    """Return tilings of 8 to 32 elements a thread, short rows several at a time."""
    width = triton.next_power_of_2(max(columns, 1))
    found: list[Configuration] = []
    for per_thread in (16, 8, 32):
        threads = min(max(width // per_thread, 128), 512)
        if width // threads > 32:
            continue
        block = min(max(threads * per_thread // width, 1), triton.next_power_of_2(rows))
        tiles = {"ROWS": block, "COLUMNS": width}
        candidate = Configuration(tiles, warps=threads // 32, stages=1)
        if str(candidate) not in map(str, found):
            found.append(candidate)
    return tuple(found)
