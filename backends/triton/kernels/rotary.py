"""Rotary position embedding of heads, in halves or interleaved pairs.

A program takes a few tokens and walks over their heads, so that the angles of a token are loaded
once, not once for each head. Queries and keys packed side by side are rotated by one launch.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = ["rotary_kernel", "rotary_operation"]


@triton.jit
def rotary_kernel(
    x, cos, sin, positions, out,
    tokens, length, heads, half, size, rows,
    stride_batch, stride_token, stride_head, table_batch,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    known = token < tokens
    batch, place = token // length, token % length
    there = known
    if positions is None:
        row = batch * table_batch + place
    else:
        row = tl.load(positions + token, mask=known, other=0).to(tl.int64)
        there = known & (row >= 0) & (row < rows)
    angle = tl.arange(0, HALF)
    angles = there[:, None] & (angle < half)[None, :]
    table = row[:, None] * half + angle[None, :]
    # A token whose position is no row of the table shows it: it becomes NaN.
    c = tl.load(cos + table, mask=angles, other=float("nan")).to(tl.float32)[:, None, :]
    s = tl.load(sin + table, mask=angles, other=float("nan")).to(tl.float32)[:, None, :]
    from_token = (batch * stride_batch + place * stride_token)[:, None, None]
    to_token = (token * heads * size)[:, None, None]

    for start in tl.range(tl.program_id(1) * HEADS, heads, tl.num_programs(1) * HEADS):
        head = start + tl.arange(0, HEADS)
        held = known[:, None, None] & (head < heads)[None, :, None]
        source = x + from_token + (head * stride_head)[None, :, None]
        target = out + to_token + (head * size)[None, :, None]
        if INTERLEAVED:
            pair = tl.arange(0, 2 * HALF)[None, None, :]
            mask = held & (pair < 2 * half)
            both = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(both, (TOKENS, HEADS, HALF, 2)))
            turned = tl.join(first * c - second * s, second * c + first * s)
            turned = tl.reshape(turned, (TOKENS, HEADS, 2 * HALF))
            tl.store(target + pair, turned.to(out.dtype.element_ty), mask=mask)
        else:
            mask = held & (angle < half)[None, None, :]
            low = source + angle[None, None, :]
            first = tl.load(low, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(low + half, mask=mask, other=0.0).to(tl.float32)
            low = target + angle[None, None, :]
            tl.store(low, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
            tl.store(low + half, (second * c + first * s).to(out.dtype.element_ty), mask=mask)
        if REST:
            at = 2 * half + tl.arange(0, REST)[None, None, :]
            mask = held & (at < size)
            tl.store(target + at, tl.load(source + at, mask=mask), mask=mask)


def rotary_operation(
    x: Any, cos: Any, sin: Any, positions: Any | None, architecture: Architecture,
    *, interleaved: bool,
) -> Operation:  # fmt: skip
    """Describe the rotation of `x`.

    Args:
        x: [batch, length, heads, size], elements of a head side by side.
        cos: [rows, half], or [batch, length, half] without `positions`; contiguous.
        sin: As `cos`.
        positions: Rows of `cos` by token, [batch, length], contiguous; the token's index if None.
        architecture: What the tilings are chosen for.
        interleaved: Pairs are neighbours; otherwise element i belongs to i + half.
    """
    batch, length, heads, size = x.shape
    half = cos.shape[-1]
    tokens = batch * length
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = prod(cos.shape[:-1])
    used = min(tokens if positions is not None or cos.ndim == 3 else length, rows)

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        blocks = -(-tokens // configuration["TOKENS"])
        parts = min(
            max(architecture.multiprocessors // blocks, 1), -(-heads // configuration["HEADS"])
        )
        whole = tokens * heads * size * x.element_size()
        turned = half * cos.element_size()
        accesses = [Access("x", whole, whole), Access("out", whole, whole)]
        accesses += [
            Access(name, used * turned, tokens * parts * turned, reach=2 * whole // batch)
            for name in ("cos", "sin")
        ]
        if positions is not None:
            indices = tokens * positions.element_size()
            accesses.append(Access("positions", indices, indices * parts))
        launch = Launch(
            kernel=rotary_kernel,
            grid=(blocks, parts),
            arguments={
                "x": x, "cos": cos, "sin": sin, "positions": positions, "out": out,
                "tokens": tokens, "length": length, "heads": heads, "half": half, "size": size,
                "rows": rows, "stride_batch": x.stride(0), "stride_token": x.stride(1),
                "stride_head": x.stride(2), "table_batch": length if cos.ndim == 3 else 0,
            },
            constants={"INTERLEAVED": interleaved},
            configuration=configuration,
            work=Work(tuple(accesses), 6 * tokens * heads * half, "float32"),
        )  # fmt: skip
        return (launch,)

    nbytes = 2 * prod(x.shape) * x.element_size() + 2 * used * half * cos.element_size()
    if positions is not None:
        nbytes += tokens * positions.element_size()
    return Operation(
        name="rotary, interleaved" if interleaved else "rotary",
        candidates=_candidates(tokens, heads, half, size),
        prepare=prepare,
        results=(out,),
        least=Least(nbytes, 6 * tokens * heads * half),
        key=(x.dtype, heads, half, size, min(tokens, 4096), interleaved),
    )


def _candidates(tokens: int, heads: int, half: int, size: int) -> tuple[Configuration, ...]:
    """Return tilings of about 16 pairs a thread, and of 8."""
    width = triton.next_power_of_2(max(half, 1))
    rest = triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0
    most = triton.next_power_of_2(max(heads, 1))
    found = []
    for pairs in (1024, 2048):
        block = min(max(pairs // width, 1), most)
        few = min(max(pairs // (width * block), 1), triton.next_power_of_2(tokens))
        tiles = {"TOKENS": few, "HEADS": block, "HALF": width, "REST": rest}
        found.append(Configuration(tiles, warps=4, stages=1))
    return tuple(found)
