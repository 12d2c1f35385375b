"""ONNX's attention operators with kernels for what lies between projections and cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.ops.attention import as_heads, as_rows, counted, opened, unpacked
from lwc.backends.fx.ops.grouped_attention import rows_of_tables, split_heads, written
from lwc.backends.triton import launch
from lwc.backends.triton.kernels.decode_attention import MOST_ROWS

__all__ = ["attention", "group_query_attention", "multi_head_attention", "packed_attention"]

Tensor: TypeAlias = torch.Tensor


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Any,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    causal: int = 1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    scale: float = 0.0,
    softcap: float = 0.0,
    outputs: int = 1,
) -> Any:
    """com.microsoft::GroupQueryAttention, as `lwc.backends.fx.ops` states it."""
    q, k, v = split_heads(query, key, value, num_heads, kv_num_heads)
    new, total = q.shape[2], total_sequence_length
    total = total[0] if isinstance(total, list) else total
    lengths = seqlens_k.reshape(-1).to(torch.int64) + 1
    prompt = new == total  # without a past; sequences may be padded behind their ends
    places = torch.arange(new).expand(q.shape[0], -1)
    if not prompt:
        places = places + (lengths - new).unsqueeze(-1)
    if do_rotary:
        at = rows_of_tables(places, position_ids, prompt=prompt)
        q, k = (
            launch.rotary(
                x.transpose(1, 2), cos_cache, sin_cache, at, interleaved=bool(rotary_interleaved)
            ).transpose(1, 2)
            for x in (q, k)
        )
    keys, values = written(past_key, k, places, total), written(past_value, v, places, total)
    mask = attention_bias
    if mask is not None:
        mask = torch.nn.functional.pad(mask, [0, keys.shape[2] - mask.shape[-1]])
    y = _attended(
        q, keys, values,
        causal=bool(causal),
        left=local_window_size - 1 if local_window_size >= 0 else None,
        offset=0 if prompt and causal else None,
        key_lengths=None if prompt and causal else lengths,
        mask=mask,
        scale=scale or None,
        cap=softcap,
    )  # fmt: skip
    return (as_rows(y), keys, values)[:outputs] if outputs > 1 else as_rows(y)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int = 1,
) -> Any:
    """The standard's Attention, as `lwc.backends.fx.ops` states it."""
    in_rows = q.dim() == 3
    if in_rows:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = as_heads(q, q_num_heads), as_heads(k, kv_num_heads), as_heads(v, kv_num_heads)
    offset: int | None = 0
    if lengths is not None:
        # None: the last query is at the last key.
        offset, lengths = None, counted(lengths, k.shape[2])
    if past_key is not None and past_value is not None:
        aligned = lengths is None and q.shape[2] == k.shape[2]
        offset = None if aligned else past_key.shape[2]
        k, v = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
    if mask is not None and mask.shape[-1] < k.shape[2]:
        hidden = False if mask.dtype == torch.bool else -torch.inf
        missing = k.shape[2] - mask.shape[-1]
        mask = torch.nn.functional.pad(mask, [0, missing], value=hidden)
    y = _attended(
        q, k, v,
        causal=bool(is_causal),
        left=left_window_size if left_window_size >= 0 else None,
        right=right_window_size if right_window_size >= 0 else None,
        offset=offset,
        key_lengths=lengths,
        mask=mask,
        scale=scale,
        cap=softcap,
    )  # fmt: skip
    y = as_rows(y) if in_rows else y
    return (y, k, v)[:outputs] if outputs > 1 else y


def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """com.microsoft::MultiHeadAttention, as `lwc.backends.fx.ops` states it."""
    q, k, v = unpacked(query, key, value, num_heads, bias)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
    mask = _filtered(
        key_padding_mask, attention_bias, q, k.shape[2], mask_filter_value, starts=False
    )
    y = as_rows(_attended(q, k, v, causal=bool(unidirectional), mask=mask, scale=scale or None))
    return (y, k, v)[:outputs] if outputs > 1 else y


def packed_attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    qkv_hidden_sizes: Sequence[int] | None = None,
    mask_filter_value: float = -10000.0,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """com.microsoft::Attention, as `lwc.backends.fx.ops` states it."""
    rows = torch.matmul(x, weights)
    rows = rows if bias is None else rows + bias
    sizes = list(qkv_hidden_sizes or [weights.shape[1] // 3] * 3)
    q, k, v = (as_heads(part, num_heads) for part in torch.split(rows, sizes, dim=-1))
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    spread = _filtered(mask, attention_bias, q, k.shape[2], mask_filter_value, starts=True)
    y = as_rows(_attended(q, k, v, causal=bool(unidirectional), mask=spread, scale=scale or None))
    return (y, torch.stack([k, v])) if outputs > 1 else y


def _filtered(
    mask: Tensor | None, bias: Tensor | None, q: Tensor, total: int, fill: float, *, starts: bool
) -> Tensor | None:
    """Return what is added to the scores: `fill` where a mask hides a key, and a bias."""
    if mask is None:
        return bias
    open_ = opened(mask, q.shape[0], q.shape[2], total, starts=starts)
    hidden = torch.where(open_, 0.0, fill).to(q.dtype)
    return hidden if bias is None else hidden + bias


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    left: int | None = None,
    right: int | None = None,
    offset: int | None = None,
    cap: float = 0.0,
    **rest: Any,
) -> Tensor:
    """Attend by the kernel for a cache where new tokens fit its tile, else by that for prompts.

    A negative cap is none, as to the operators.
    """
    rest["cap"] = max(cap, 0.0)
    queries, keys = q.shape[2], k.shape[2]
    newest = (causal or queries == 1) and right is None and offset is None and queries < keys
    if newest and q.shape[1] // k.shape[1] * queries <= MOST_ROWS:
        cached: Tensor = launch.decode_attention(q, k, v, left=left, **rest)
        return cached
    found: Tensor = launch.attention(
        q, k, v, causal=causal, window=(left, right), offset=offset, **rest
    )
    return found
