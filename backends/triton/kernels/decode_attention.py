"""Attention of the newest tokens over a cache of keys and values.

The heads that share a head of keys are the rows of one tile, so that each element of the cache is
read once for all of them. The keys are split among programs, as one sequence has too few heads to
fill a GPU; `combine_splits` joins their results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.kernels.combine_splits import combine_launch
from lwc.backends.triton.kernels.flash_attention import mask_access
from lwc.backends.triton.kernels.scan import LOG2_E, scan
from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = ["MOST_ROWS", "MOST_SPLITS", "decode_kernel", "decode_operation"]

MOST_ROWS = 64
"""Rows of the tile: heads of a group times new tokens."""

MOST_SPLITS = 128
"""Parts of the keys: their results are joined by one program for each row."""


@triton.jit
def decode_kernel(
    q, k, v, mask, out, logarithm, key_lengths,
    queries, keys, group, left, scale, cap, size, value_size,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mask_batch, mask_head, mask_query, mask_key, out_batch, out_head, out_token, out_split,
    LEFT: tl.constexpr, CAPPED: tl.constexpr, IEEE: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    WHOLE: tl.constexpr, VALUE_WHOLE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    shared = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if key_lengths is not None:
        keys = tl.maximum(tl.minimum(keys, tl.load(key_lengths + batch)), 0)

    row = tl.arange(0, ROWS)
    known = row < group * queries
    token = row % queries
    head = shared * group + row // queries
    position = keys - queries + token
    channel = tl.arange(0, SIZE)
    held = known[:, None] & (channel < size)[None, :]
    from_row = q + batch * q_batch + head * q_head + token * q_token
    query = tl.load(from_row[:, None] + channel[None, :], mask=held, other=0.0)
    rows_of_mask = None
    if mask is not None:
        rows_of_mask = (mask + batch * mask_batch + head * mask_head + token * mask_query)[:, None]

    first = 0
    if LEFT:
        first = tl.maximum(keys - queries - left, 0) // KEYS * KEYS
    chunk = tl.cdiv(tl.cdiv(keys - first, splits), KEYS) * KEYS
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, keys)
    k += batch * k_batch + shared * k_head
    v += batch * v_batch + shared * v_head
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, VALUE_SIZE), tl.float32)
    all_end = begin
    if LEFT == 0 and mask is None:
        # Every new token attends to the keys before the first of them.
        all_end = tl.minimum(end, keys - queries + 1)
        all_end = begin + tl.maximum(all_end - begin, 0) // KEYS * KEYS
        total, highest, norm = scan(
            total, highest, norm, query, k, v, None, known,
            k_token, v_token, mask_key,
            begin, all_end, keys, position, left, 0, scale, cap, size, value_size,
            False, LEFT, True, CAPPED, IEEE, WHOLE, VALUE_WHOLE, KEYS, SIZE, VALUE_SIZE,
        )  # fmt: skip
    total, highest, norm = scan(
        total, highest, norm, query, k, v, rows_of_mask, known,
        k_token, v_token, mask_key,
        all_end, end, keys, position, left, 0, scale, cap, size, value_size,
        True, LEFT, True, CAPPED, IEEE, WHOLE, VALUE_WHOLE, KEYS, SIZE, VALUE_SIZE,
    )  # fmt: skip

    result = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    value_channel = tl.arange(0, VALUE_SIZE)
    held = known[:, None] & (value_channel < value_size)[None, :]
    to_row = out + batch * out_batch + head * out_head + token * out_token + split * out_split
    tl.store(to_row[:, None] + value_channel[None, :], result.to(out.dtype.element_ty), mask=held)
    if logarithm is not None:
        heads = tl.num_programs(1) * group
        at = ((batch * heads + head) * queries + token) * splits + split
        tl.store(logarithm + at, highest + tl.log2(norm), mask=known)


def decode_operation(
    q: Any,
    k: Any,
    v: Any,
    architecture: Architecture,
    *,
    mask: Any | None = None,
    key_lengths: Any | None = None,
    left: int | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Operation:
    """Describe attention of the newest tokens, which are the last of the keys.

    Args:
        q: [batch, heads, queries, size]; elements of a head side by side, as in `k` and `v`.
        k: [batch, groups, keys, size]; heads h of `q` read group h // (heads / groups).
        v: [batch, groups, keys, value size].
        architecture: What the tilings are chosen for.
        mask: As `flash_operation` takes it.
        key_lengths: Keys of each sequence that count, [batch], the new tokens' among them; those
            that exist at most.
        left: Keys before a token's position that it attends to; all when None.
        scale: Of the scores; 1 / sqrt(size) by default.
        cap: The scores s become cap * tanh(s / cap); 0 leaves them.
    """
    batch, heads, queries, size = q.shape
    groups, keys, value_size = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty(
        (batch, queries, heads, value_size), dtype=q.dtype, device=q.device
    ).transpose(1, 2)
    factor = size**-0.5 if scale is None else scale
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        splits = configuration["SPLITS"]
        target, logarithm = out, None
        if splits > 1:
            shape = (batch, heads, queries, splits, value_size)
            target = torch.empty(shape, dtype=torch.float32, device=q.device)
            logarithm = torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
        launch = Launch(
            kernel=decode_kernel,
            grid=(splits, groups, batch),
            arguments={
                "q": q, "k": k, "v": v, "mask": mask, "out": target, "logarithm": logarithm,
                "key_lengths": key_lengths, "queries": queries, "keys": keys,
                "group": heads // groups, "left": left or 0,
                "scale": factor if cap else factor * LOG2_E, "cap": float(cap),
                "size": size, "value_size": value_size,
                **dict(zip(("q_batch", "q_head", "q_token"), q.stride(), strict=False)),
                **dict(zip(("k_batch", "k_head", "k_token"), k.stride(), strict=False)),
                **dict(zip(("v_batch", "v_head", "v_token"), v.stride(), strict=False)),
                **dict(zip(("mask_batch", "mask_head", "mask_query", "mask_key"), mask_strides,
                           strict=True)),
                **dict(zip(("out_batch", "out_head", "out_token"), target.stride(), strict=False)),
                "out_split": target.stride(3) if splits > 1 else 0,
            },
            constants={
                "LEFT": left is not None, "CAPPED": cap > 0, "IEEE": q.dtype == torch.float32,
                "WHOLE": configuration["SIZE"] == size,
                "VALUE_WHOLE": configuration["VALUE_SIZE"] == value_size,
            },
            configuration=configuration,
            work=_work(q, k, v, mask, target, left, configuration),
            tiles=("ROWS", "KEYS", "SIZE", "VALUE_SIZE"),
        )  # fmt: skip
        return (launch,) if splits == 1 else (launch, combine_launch(target, logarithm, out))

    attended = keys if left is None else min(keys, left + queries)
    nbytes = (
        q.element_size()
        * batch
        * (heads * queries * (size + value_size) + groups * attended * (size + value_size))
    )
    if mask is not None:
        nbytes += mask_access(mask[..., :attended], 0).once
    return Operation(
        name="attention, decode",
        candidates=_candidates(q, k, v, attended, architecture),
        prepare=prepare,
        results=(out,),
        least=Least(nbytes, 2 * batch * heads * queries * attended * (size + value_size)),
        key=(q.dtype, batch, heads, groups, queries, triton.next_power_of_2(attended), size,
             value_size, left is not None, mask is not None, cap > 0),
    )  # fmt: skip


def _candidates(
    q: Any, k: Any, v: Any, attended: int, architecture: Architecture
) -> tuple[Configuration, ...]:
    """Return tilings with splits that fill the GPU, as far as their results weigh little.

    A part's results are written and read again in float32. Parts are at least so long that this
    is a twentieth of what they read.
    """
    batch, heads, queries, size = q.shape
    groups, value_size = k.shape[1], v.shape[3]
    rows = heads // groups * queries
    widths = {
        "SIZE": max(triton.next_power_of_2(size), 16),
        "VALUE_SIZE": max(triton.next_power_of_2(value_size), 16),
    }
    by_key = (size + value_size) * q.element_size()
    shortest = 20 * 8 * rows * (value_size + 1) / by_key
    wanted = 2 * architecture.multiprocessors / max(batch * groups, 1)
    # Blocks of keys of 16 KiB; in float32, which has no tensor cores, fewer find registers.
    columns = min(max(16384 // (widths["SIZE"] * q.element_size()), 16), 128)
    columns = min(columns, 32) if q.element_size() == 4 else columns
    half = max(columns // 2, 16)
    found: list[Configuration] = []
    for block, stages, factor in ((columns, 3, 1), (half, 4, 1), (columns, 3, 2), (half, 4, 2)):
        most = max(int(attended / max(shortest, block)), 1)
        splits = max(min(round(wanted * factor), most, MOST_SPLITS), 1)
        tiles = {"ROWS": max(triton.next_power_of_2(rows), 16), "KEYS": block, **widths}
        candidate = Configuration({**tiles, "SPLITS": splits}, warps=4, stages=stages)
        if str(candidate) not in map(str, found):
            found.append(candidate)
    return tuple(found)


def _work(
    q: Any, k: Any, v: Any, mask: Any | None, target: Any, left: int | None,
    configuration: Configuration,
) -> Work:  # fmt: skip
    """Count what the programs load and multiply; sequences are taken to be of full length."""
    batch, heads, queries, size = q.shape
    groups, keys, value_size = k.shape[1], k.shape[2], v.shape[3]
    rows, columns, splits = (configuration[name] for name in ("ROWS", "KEYS", "SPLITS"))
    first = 0 if left is None else max(keys - queries - left, 0) // columns * columns
    chunk = -(-(keys - first) // splits)
    chunk = -(-chunk // columns) * columns
    blocks = 0
    for split in range(splits):
        begin = first + split * chunk
        blocks += max(-(-(min(begin + chunk, keys) - begin) // columns), 0)
    own = q.numel() * q.element_size()
    written = target.numel() * target.element_size()
    accesses = [
        Access("q", own, own * splits),
        Access("partial" if splits > 1 else "out", written, written),
    ]
    for name, width in (("k", size), ("v", value_size)):
        read = batch * groups * (keys - first) * width * k.element_size()
        accesses.append(Access(name, read, read))
    if splits > 1:
        sums = 4 * batch * heads * queries * splits
        accesses.append(Access("logarithm", sums, sums))
    if mask is not None:
        accesses.append(mask_access(mask[..., first:], batch * heads * queries * (keys - first)))
    padded = configuration["SIZE"] + configuration["VALUE_SIZE"]
    return Work(
        tuple(accesses),
        2 * batch * groups * rows * columns * blocks * padded,
        str(q.dtype).removeprefix("torch."),
    )
