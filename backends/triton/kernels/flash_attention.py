"""Attention of a prompt: the scores of a tile of queries live in registers only.

Blocks of keys that every query of the tile attends to are computed without a mask; those on the
diagonal, at the edge of a window or at the end of the keys with one; others are not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.kernels.scan import LOG2_E, scan
from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = [
    "LARGEST",
    "Attended",
    "flash_kernel",
    "flash_operation",
    "mask_access",
]

LARGEST = 256
"""Size of the largest head: of a larger one the sums of a tile find no registers."""

FILLED = tl.constexpr(16)
"""Rows that are filled at a time: few, for their addresses would take the registers of a tile."""


@triton.jit
def span(starts, sequence, tokens):
    """Return where a sequence begins and its length, among the tokens whatever `starts` holds."""
    first = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), tokens).to(tl.int64)
    last = tl.minimum(tl.load(starts + sequence + 1), tokens).to(tl.int64)
    return first, tl.maximum(last - first, 0).to(tl.int32)


@triton.jit
def fill(out, begin, end, out_token, value_size, value, VALUE_SIZE: tl.constexpr):
    """Store a value in the rows from `begin` to `end`."""
    channel = tl.arange(0, VALUE_SIZE)
    for start in tl.range(begin, end, FILLED):
        row = start + tl.arange(0, FILLED)
        held = (row < end)[:, None] & (channel < value_size)[None, :]
        target = out + row.to(tl.int64)[:, None] * out_token + channel[None, :]
        tl.store(target, tl.full(held.shape, value, out.dtype.element_ty), mask=held)


@triton.jit
def fill_rest(
    out, starts, sequences, tokens, out_token, value_size,
    QUERIES: tl.constexpr, VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """Leave no token as memory was found: 0 where it is of no sequence, NaN beyond the longest."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first, length = span(starts, 0, tokens)
    if program == 0:
        fill(out, 0, first, out_token, value_size, 0.0, VALUE_SIZE)
    first, length = span(starts, sequences - 1, tokens)
    ahead = first + length + program * FILLED
    for start in tl.range(ahead, tokens, programs * FILLED):
        end = tl.minimum(start + FILLED, tokens)
        fill(out, start, end, out_token, value_size, 0.0, VALUE_SIZE)
    for sequence in tl.range(program, sequences, programs):
        first, length = span(starts, sequence, tokens)
        beyond = first + programs * QUERIES
        fill(out, beyond, first + length, out_token, value_size, float("nan"), VALUE_SIZE)


@triton.jit
def flash_kernel(
    q, k, v, mask, out, query_starts, key_starts, key_lengths,
    queries, keys, group, offset, left, right, scale, cap, size, value_size,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mask_batch, mask_head, mask_query, mask_key, out_batch, out_head, out_token,
    ALIGNED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    IEEE: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    WHOLE: tl.constexpr, VALUE_WHOLE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # The last tiles of a causal prompt have the most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q += batch * q_batch + head * q_head
    out += batch * out_batch + head * out_head
    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    if query_starts is not None:
        sequences = tl.num_programs(2) - 1
        if batch == sequences:
            fill_rest(
                out, query_starts, sequences, queries, out_token, value_size, QUERIES, VALUE_SIZE
            )
            return
        first, queries = span(query_starts, batch, queries)
        q += first * q_token
        out += first * out_token
        first, keys = span(key_starts, batch, keys)
        k += first * k_token
        v += first * v_token
    if key_lengths is not None:
        keys = tl.maximum(tl.minimum(keys, tl.load(key_lengths + batch)), 0)
    if ALIGNED:
        offset = keys - queries
    if tile * QUERIES < queries:
        row = tile * QUERIES + tl.arange(0, QUERIES)
        known = row < queries
        at = row.to(tl.int64)
        position = row + offset
        channel = tl.arange(0, SIZE)
        held = known[:, None] & (channel < size)[None, :]
        query = tl.load(q + at[:, None] * q_token + channel[None, :], mask=held, other=0.0)
        rows_of_mask = None
        if mask is not None:
            base = mask + batch * mask_batch + head * mask_head
            rows_of_mask = base + at[:, None] * mask_query

        # Keys that some query of the tile attends to, and those that all of them do.
        earliest = tile * QUERIES + offset
        latest = tl.minimum(tile * QUERIES + QUERIES, queries) - 1 + offset
        begin = 0
        end = keys
        all_begin = 0
        all_end = keys
        if LEFT:
            begin = tl.maximum(earliest - left, 0) // KEYS * KEYS
            all_begin = tl.maximum(latest - left + KEYS - 1, 0) // KEYS * KEYS
        if RIGHT:
            end = tl.maximum(tl.minimum(latest + right + 1, keys), 0)
            all_end = tl.maximum(tl.minimum(earliest + right + 1, keys), 0)
        all_end = tl.maximum(all_end // KEYS * KEYS, all_begin)

        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        norm = tl.zeros((QUERIES,), tl.float32)
        total = tl.zeros((QUERIES, VALUE_SIZE), tl.float32)
        if mask is not None:
            # Inside of the branch the last product is waited for; behind it, wgmma would be
            # taken one at a time, for the sums that come from where no key is.
            if begin < end:
                total, highest, norm = scan(
                    total, highest, norm, query, k, v, rows_of_mask, known,
                    k_token, v_token, mask_key,
                    begin, end, keys, position, left, right, scale, cap, size, value_size,
                    True, LEFT, RIGHT, CAPPED, IEEE, WHOLE, VALUE_WHOLE, KEYS, SIZE, VALUE_SIZE,
                )  # fmt: skip
        else:
            if LEFT:
                total, highest, norm = scan(
                    total, highest, norm, query, k, v, None, known,
                    k_token, v_token, mask_key,
                    begin, tl.minimum(all_begin, end), keys, position, left, right, scale, cap,
                    size, value_size,
                    True, LEFT, RIGHT, CAPPED, IEEE, WHOLE, VALUE_WHOLE, KEYS, SIZE, VALUE_SIZE,
                )  # fmt: skip
            total, highest, norm = scan(
                total, highest, norm, query, k, v, None, known,
                k_token, v_token, mask_key,
                all_begin, all_end, keys, position, left, right, scale, cap, size, value_size,
                False, LEFT, RIGHT, CAPPED, IEEE, WHOLE, VALUE_WHOLE, KEYS, SIZE, VALUE_SIZE,
            )  # fmt: skip
            total, highest, norm = scan(
                total, highest, norm, query, k, v, None, known,
                k_token, v_token, mask_key,
                all_end, end, keys, position, left, right, scale, cap, size, value_size,
                True, LEFT, RIGHT, CAPPED, IEEE, WHOLE, VALUE_WHOLE, KEYS, SIZE, VALUE_SIZE,
            )  # fmt: skip

        # A query that attends to nothing gives 0, as it does not come to a mean of nothing.
        result = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
        value_channel = tl.arange(0, VALUE_SIZE)
        held = known[:, None] & (value_channel < value_size)[None, :]
        target = out + at[:, None] * out_token + value_channel[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=held)


@dataclass(frozen=True)
class Attended:
    """Which keys a query attends to, by positions.

    Attributes:
        left: Keys before the query's position; all when None.
        right: Keys after it; all when None. Causal attention has 0.
        offset: Position of the first query among the keys; by default the last query is at the
            last key.
    """

    left: int | None = None
    right: int | None = None
    offset: int | None = None

    def bounds(self, first: int, last: int, queries: int, keys: int) -> tuple[int, int]:
        """Return begin and end of the keys that queries `first` to `last` attend to."""
        offset = keys - queries if self.offset is None else self.offset
        begin = 0 if self.left is None else max(first + offset - self.left, 0)
        end = keys if self.right is None else min(max(last + offset + self.right + 1, 0), keys)
        return begin, end

    def pairs(self, queries: int, keys: int) -> int:
        """Return how many queries and keys meet, without a walk over the queries."""
        offset = keys - queries if self.offset is None else self.offset
        left = queries + keys + abs(offset) if self.left is None else self.left
        right = queries + keys + abs(offset) if self.right is None else self.right

        def before(position: int) -> int:
            """Sum up the keys before a position that begins here and moves on with the query."""
            first = min(max(-position, 0), queries)
            last = min(max(keys - position, 0), queries)
            moving = (last - first) * (first + last - 1 + 2 * position) // 2
            return moving + (queries - last) * keys

        return max(before(offset + right + 1) - before(offset - left), 0)


def flash_operation(
    q: Any,
    k: Any,
    v: Any,
    attended: Attended,
    architecture: Architecture,
    *,
    mask: Any | None = None,
    query_starts: Any | None = None,
    key_starts: Any | None = None,
    key_lengths: Any | None = None,
    longest: tuple[int, int] | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Operation:
    """Describe attention of many queries.

    Args:
        q: [batch, heads, queries, size]; elements of a head side by side, as in `k` and `v`.
        k: [batch, groups, keys, size]; heads h of `q` read group h // (heads / groups).
        v: [batch, groups, keys, value size].
        attended: Which keys by position.
        architecture: What the tilings are chosen for.
        mask: Added to the scaled scores, or int8 where 0 leaves a key out; [batch, heads, queries,
            keys], with strides 0 where it is broadcast.
        query_starts: Where sequences begin among the tokens of `q`, whose batch is then 1, and
            where the last ends, [sequences + 1]. Nothing beyond the tokens is touched, whatever it
            holds; a token of no sequence gives 0.
        key_starts: Likewise for `k` and `v`.
        key_lengths: Keys of each sequence that count, [batch]; those that exist at most.
        longest: Queries and keys of the longest sequence, with `query_starts`: queries beyond it
            may become NaN.
        scale: Of the scores; 1 / sqrt(size) by default.
        cap: The scores s become cap * tanh(s / cap); 0 leaves them.
    """
    batch, heads, queries, size = q.shape
    groups, keys, value_size = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty(
        (batch, queries, heads, value_size), dtype=q.dtype, device=q.device
    ).transpose(1, 2)
    tokens = {"queries": queries, "keys": keys}
    if query_starts is not None:
        batch = query_starts.shape[0] - 1
        assert longest is not None
        queries, keys = longest
    factor = size**-0.5 if scale is None else scale
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        tiles = -(-queries // configuration["QUERIES"])
        launch = Launch(
            kernel=flash_kernel,
            grid=(tiles, heads, batch if query_starts is None else batch + 1),
            arguments={
                "q": q, "k": k, "v": v, "mask": mask, "out": out, "query_starts": query_starts,
                "key_starts": key_starts, "key_lengths": key_lengths,
                **tokens, "group": heads // groups,
                "offset": attended.offset or 0, "left": attended.left or 0,
                "right": attended.right or 0,
                "scale": factor if cap else factor * LOG2_E, "cap": float(cap),
                "size": size, "value_size": value_size,
                **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("out", out),
                **dict(zip(("mask_batch", "mask_head", "mask_query", "mask_key"), mask_strides,
                           strict=True)),
            },
            constants={
                "ALIGNED": attended.offset is None, "LEFT": attended.left is not None,
                "RIGHT": attended.right is not None, "CAPPED": cap > 0,
                "IEEE": q.dtype == torch.float32,
                "WHOLE": configuration["SIZE"] == size,
                "VALUE_WHOLE": configuration["VALUE_SIZE"] == value_size,
            },
            configuration=configuration,
            work=_work(q, k, v, mask, attended, configuration, architecture, batch, queries, keys),
        )  # fmt: skip
        return (launch,)

    return Operation(
        name="attention, prefill",
        candidates=_candidates(
            q, value_size, queries, batch, architecture,
            window=attended.left is not None, capped=cap > 0, masked=mask is not None,
        ),
        prepare=prepare,
        results=(out,),
        least=_least(q, k, v, mask, attended, batch, queries, keys),
        key=(q.dtype, size, value_size, heads // groups, _near(queries), _near(keys),
             attended.left is not None, attended.right is not None, mask is not None, cap > 0),
    )  # fmt: skip


# Queries, keys, warps and stages of tiles by the oldest architecture they are for, the bytes of an
# element and the size of a head: as tall as they compile without spills, since what is loaded falls
# with the height, then some that leave room for a second block.
_TILINGS: dict[tuple[int, int, int], tuple[tuple[int, int, int, int], ...]] = {
    (80, 2, 64): ((256, 32, 8, 3), (256, 64, 8, 2), (128, 64, 8, 3)),
    (80, 2, 128): ((128, 64, 8, 3), (128, 32, 8, 3), (256, 16, 8, 2)),
    (80, 2, 256): ((64, 64, 8, 2), (64, 32, 8, 2)),
    (90, 2, 64): ((256, 64, 16, 2), (256, 64, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    (90, 2, 128): ((256, 32, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3)),
    (90, 2, 256): ((128, 32, 8, 2), (128, 64, 8, 2)),
    (100, 2, 64): ((256, 32, 8, 3), (256, 64, 8, 2), (128, 64, 8, 4)),
    (100, 2, 128): ((256, 32, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3)),
    (100, 2, 256): ((128, 32, 8, 2), (64, 64, 8, 2)),
    (80, 4, 64): ((128, 32, 16, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
    (80, 4, 128): ((64, 32, 8, 2), (32, 32, 4, 2)),
    (80, 4, 256): ((32, 16, 8, 2),),
    (90, 4, 128): ((64, 16, 8, 2), (32, 32, 4, 2)),
}
# A window's edge is one more loop, a cap a few more numbers, and a mask lies beside the scores:
# where that takes more registers than there are, other tiles take their place.
_WINDOWED = {(80, 2, 256): ((64, 32, 8, 2),)}
_CAPPED = {(100, 2, 128): ((128, 64, 8, 3), (128, 32, 8, 3))}
_MASKED = {
    (90, 2, 64): ((256, 64, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    (100, 2, 128): ((128, 64, 8, 3), (128, 32, 8, 3)),
}
_SHORT = (64, 32, 8, 2)


def _candidates(
    q: Any, value_size: int, queries: int, batch: int, architecture: Architecture, *,
    window: bool, capped: bool, masked: bool,
) -> tuple[Configuration, ...]:  # fmt: skip
    """Return the tilings for an architecture, the best guess first.

    Where tall tiles are too few for the GPU's multiprocessors, lower ones come first.
    """
    heads, size, element = q.shape[1], q.shape[3], q.element_size()
    widths = {
        "SIZE": max(triton.next_power_of_2(size), 16),
        "VALUE_SIZE": max(triton.next_power_of_2(value_size), 16),
    }
    widest = max(*widths.values(), 64)
    key = max(
        known
        for known in _TILINGS
        if known[0] <= architecture.capability and known[1:] == (element, widest)
    )
    listed = _TILINGS[key]
    for asked, other in ((window, _WINDOWED), (capped, _CAPPED), (masked, _MASKED)):
        listed = other.get(key, listed) if asked else listed
    short = () if element == 4 or _SHORT in listed else (_SHORT,)
    found: list[Configuration] = []
    for rows, keys, warps, stages in (*listed, *short):
        tall = min(rows, max(triton.next_power_of_2(queries), 16))
        found.append(
            Configuration(
                {"QUERIES": tall, "KEYS": keys, **widths}, warps if tall > 32 else 4, stages
            )
        )

    def too_few(tiling: Configuration) -> int:
        programs = -(-queries // tiling["QUERIES"]) * heads * batch
        return tiling["QUERIES"] if programs < architecture.multiprocessors else 0

    return tuple(sorted(found, key=too_few))


def _strides(name: str, tensor: Any) -> dict[str, int]:
    batch, head, token, _ = tensor.stride()
    if tensor.shape[0] == 1:
        batch = 0  # sequences packed into one share it
    return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}


def _near(length: int) -> int:
    """Return a length that stands for those of about as many tokens."""
    return int(triton.next_power_of_2(length))


def _work(
    q: Any, k: Any, v: Any, mask: Any | None, attended: Attended, configuration: Configuration,
    architecture: Architecture, batch: int, queries: int, keys: int,
) -> Work:  # fmt: skip
    """Count what the tiles load and multiply; sequences are taken to be of full length."""
    heads, groups, element = q.shape[1], k.shape[1], q.element_size()
    rows, columns = configuration["QUERIES"], configuration["KEYS"]
    tiles = -(-queries // rows)
    loaded = blocks = masked = 0
    for tile in range(tiles):
        last = min((tile + 1) * rows, queries) - 1
        begin, end = attended.bounds(tile * rows, last, queries, keys)
        begin = begin // columns * columns
        count = max(-(-(end - begin) // columns), 0)
        blocks += count
        loaded += max(min(begin + count * columns, keys) - begin, 0)
        masked += (last + 1 - tile * rows) * max(min(begin + count * columns, keys) - begin, 0)
    own = batch * heads * queries * element
    touched = _touched(attended, queries, keys) * batch * groups * element
    # Programs that run at the same time share the keys of their heads.
    flying = 2 * architecture.multiprocessors / max(tiles, 1) * groups / heads + 1
    reach = int(flying * keys * (k.shape[3] + v.shape[3]) * element)
    accesses = [
        Access("q", own * q.shape[3], own * q.shape[3]),
        Access("out", own * v.shape[3], own * v.shape[3]),
    ]
    accesses += [
        Access(name, touched * width, batch * heads * loaded * width * element, reach)
        for name, width in (("k", k.shape[3]), ("v", v.shape[3]))
    ]
    if mask is not None:
        accesses.append(mask_access(mask, batch * heads * masked))
    padded = configuration["SIZE"] + configuration["VALUE_SIZE"]
    return Work(
        tuple(accesses),
        2 * batch * heads * blocks * rows * columns * padded,
        str(q.dtype).removeprefix("torch."),
    )


def mask_access(mask: Any, loaded: int) -> Access:
    """Return the access to a mask, broadcast by strides 0, of which `loaded` elements are read."""
    own = prod(extent for extent, stride in zip(mask.shape, mask.stride(), strict=True) if stride)
    return Access("mask", own * mask.element_size(), loaded * mask.element_size())


def _touched(attended: Attended, queries: int, keys: int) -> int:
    """Return how many keys any query attends to."""
    begin, end = attended.bounds(0, queries - 1, queries, keys)
    return max(end - begin, 0)


def _least(
    q: Any, k: Any, v: Any, mask: Any | None, attended: Attended, batch: int, queries: int,
    keys: int,
) -> Least:  # fmt: skip
    heads, groups, element = q.shape[1], k.shape[1], q.element_size()
    pairs = attended.pairs(queries, keys)
    width = q.shape[3] + v.shape[3]
    touched = _touched(attended, queries, keys)
    nbytes = batch * element * width * (heads * queries + groups * touched)
    if mask is not None:
        nbytes += mask_access(mask, 0).once
    return Least(nbytes, 2 * batch * heads * pairs * width)
