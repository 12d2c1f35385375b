"""Results of attention over parts of the keys, joined into the result over all of them.

Each part brings its own softmax's result and the logarithm of the sum it was divided by: the joined
result is the mean of the parts' weighted by these sums (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lwc.backends.triton.operation import Access, Configuration, Launch, Work

__all__ = ["combine_kernel", "combine_launch"]


@triton.jit
def combine_kernel(
    partial, logarithm, out,
    heads, queries, splits, value_size,
    out_batch, out_head, out_token,
    SPLITS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    split = tl.arange(0, SPLITS)
    present = split < splits
    sums = tl.load(logarithm + row * splits + split, mask=present, other=float("-inf"))
    highest = tl.max(sums, axis=0)
    weights = tl.exp2(sums - tl.where(highest == float("-inf"), 0.0, highest))
    norm = tl.sum(weights, axis=0)
    channel = tl.arange(0, VALUE_SIZE)
    inside = channel < value_size
    parts = partial + (row * splits + split[:, None]) * value_size + channel[None, :]
    mask = present[:, None] & inside[None, :]
    total = tl.sum(tl.load(parts, mask=mask, other=0.0) * weights[:, None], axis=0)
    result = total / tl.where(norm == 0.0, 1.0, norm)
    target = out + batch * out_batch + head * out_head + token * out_token + channel
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def combine_launch(partial: Any, logarithm: Any, out: Any) -> Launch:
    """Describe the launch.

    Args:
        partial: Results of the parts, [batch, heads, queries, splits, value size], float32.
        logarithm: Base 2, of their sums, [batch, heads, queries, splits], float32.
        out: [batch, heads, queries, value size].
    """
    batch, heads, queries, splits, value_size = partial.shape
    rows = batch * heads * queries
    out_batch, out_head, out_token, _ = out.stride()
    sizes = {
        "partial": 4 * rows * splits * value_size,
        "logarithm": 4 * rows * splits,
        "out": rows * value_size * out.element_size(),
    }
    tiles = {
        "SPLITS": triton.next_power_of_2(splits),
        "VALUE_SIZE": triton.next_power_of_2(value_size),
    }
    # 32 partial results a thread, 64 where that would be too many threads.
    warps = min(max(tiles["SPLITS"] * tiles["VALUE_SIZE"] // 1024, 1), 16)
    return Launch(
        kernel=combine_kernel,
        grid=(rows,),
        arguments={
            "partial": partial, "logarithm": logarithm, "out": out, "heads": heads,
            "queries": queries, "splits": splits, "value_size": value_size,
            "out_batch": out_batch, "out_head": out_head, "out_token": out_token,
        },
        constants={},
        configuration=Configuration(tiles, warps=warps, stages=1),
        work=Work(
            tuple(Access(name, size, size) for name, size in sizes.items()),
            2 * rows * splits * value_size,
            "float32",
        ),
    )  # fmt: skip
