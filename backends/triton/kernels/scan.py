"""Keys and values taken into the results of a tile of queries, as all kernels of attention do it.

FlashAttention (Dao et al. 2022, 2023): keys and values pass by in blocks; the maximum m and the sum
l of each row's exponentials are kept, and what was summed so far is scaled by exp(m - m') when the
maximum grows. Exponentials are powers of 2, log2(e) being in the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LOG2_E", "scan"]

LOG2_E = 1.4426950408889634


@triton.jit
def capped(scores, cap, CAPPED: tl.constexpr):
    """Turn scaled scores into powers of 2: cap * tanh(scores / cap), times log2(e)."""
    if CAPPED:
        scores = cap - 2.0 * cap / (1.0 + tl.exp(2.0 * scores / cap))
        scores = scores * 1.4426950408889634
    return scores


@triton.jit
def scan(
    total, highest, norm, query,
    keys, values, mask, row_mask,
    stride_k, stride_v, stride_mask,
    begin, end, length, position, left, right, scale, cap,
    size, value_size,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    IEEE: tl.constexpr, WHOLE: tl.constexpr, VALUE_WHOLE: tl.constexpr,
    KEYS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin` to `end` into the result of a tile of queries."""
    channel = tl.arange(0, SIZE)
    value_channel = tl.arange(0, VALUE_SIZE)
    for start in tl.range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at = key.to(tl.int64)
        k_at = keys + at[:, None] * stride_k + channel[None, :]
        v_at = values + at[:, None] * stride_v + value_channel[None, :]
        k_mask = None
        v_mask = None
        if MASKED and WHOLE:
            k_mask = (key < length)[:, None]
        elif MASKED:
            k_mask = (key < length)[:, None] & (channel < size)[None, :]
        elif not WHOLE:
            k_mask = (channel < size)[None, :]
        if MASKED and VALUE_WHOLE:
            v_mask = (key < length)[:, None]
        elif MASKED:
            v_mask = (key < length)[:, None] & (value_channel < value_size)[None, :]
        elif not VALUE_WHOLE:
            v_mask = (value_channel < value_size)[None, :]
        k = tl.load(k_at) if k_mask is None else tl.load(k_at, mask=k_mask, other=0.0)
        v = tl.load(v_at) if v_mask is None else tl.load(v_at, mask=v_mask, other=0.0)
        if IEEE:
            scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.dot(query, tl.trans(k))
        scores = capped(scores * scale, cap, CAPPED)
        if MASKED:
            allowed = (key < length)[None, :]
            if LEFT:
                allowed = allowed & (key[None, :] >= position[:, None] - left)
            if RIGHT:
                allowed = allowed & (key[None, :] <= position[:, None] + right)
            if mask is not None:
                inside = row_mask[:, None] & (key < length)[None, :]
                at_mask = mask + at[None, :] * stride_mask
                if mask.dtype.scalar.element_ty == tl.int8:
                    allowed = allowed & (tl.load(at_mask, mask=inside, other=0) != 0)
                else:
                    bias = tl.load(at_mask, mask=inside, other=0.0).to(tl.float32)
                    # The least float32 times log2(e) would be -inf, which is not seen at all.
                    scores += tl.where(bias < -2.3586e38, bias, bias * 1.4426950408889634)
            scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has attended to nothing yet keeps 0 as its reference: -inf - -inf is NaN.
        reference = higher
        if MASKED:
            reference = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(highest - reference)
        norm = norm * shrink + tl.sum(weights, axis=1)
        total = total * shrink[:, None]
        if IEEE:
            total = tl.dot(weights, v, total, input_precision="ieee")
        else:
            total = tl.dot(weights.to(v.dtype), v, total)
        highest = higher
    return total, highest, norm
