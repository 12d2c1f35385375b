"""com.microsoft::GroupQueryAttention: attention with a cache, causal unless told otherwise."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch

from lwc.backends.fx.ops.attention import as_heads, as_rows, softmax_or_zero
from lwc.backends.fx.ops.rotary import rotated, rows_at
from lwc.backends.fx.registry import op

__all__ = ["rows_of_tables", "split_heads", "written"]

Tensor: TypeAlias = torch.Tensor
Scales: TypeAlias = Literal["NONE", "PER_TENSOR", "PER_CHANNEL"]


@op("com.microsoft::GroupQueryAttention", values=(6,), zero="qk_output sliding_window_cache")
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
    head_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    causal: int = 1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    scale: float = 0,
    softcap: float = 0,
    smooth_softmax: int = 0,
    k_quant_type: Scales = "NONE",
    v_quant_type: Scales = "NONE",
    kv_cache_bit_width: int = 8,
    outputs: int = 1,
) -> Any:
    """Attend; returns the rows, and the cache with the new keys and values in it.

    `seqlens_k` is the length of each sequence less one, the new tokens included, and
    `total_sequence_length` that of the longest. Where it is the number of new tokens there is no
    past. A cache of integers holds round(x / scale), and 4-bit ones 8 more, two to a byte.
    """
    q, k, v = split_heads(query, key, value, num_heads, kv_num_heads)
    new = q.shape[2]
    total = total_sequence_length
    total = total[0] if isinstance(total, list) else total
    lengths = seqlens_k.reshape(-1).to(torch.int64) + 1
    past = lengths * 0 if new == total else lengths - new
    places = past.reshape(-1, 1) + torch.arange(new)
    if do_rotary:
        assert cos_cache is not None
        assert sin_cache is not None
        at = rows_of_tables(places, position_ids, prompt=new == total)
        width = 2 * cos_cache.shape[-1]
        cos, sin = rows_at(cos_cache, at), rows_at(sin_cache, at)
        q = rotated(q, cos, sin, interleaved=rotary_interleaved, width=width)
        k = rotated(k, cos, sin, interleaved=rotary_interleaved, width=width)
    stored_k = _stored(k, k_scale, k_quant_type, kv_cache_bit_width)
    stored_v = _stored(v, v_scale, v_quant_type, kv_cache_bit_width)
    present_k = written(past_key, stored_k, places, total)
    present_v = written(past_value, stored_v, places, total)
    keys = _read(present_k, k_scale, k_quant_type, kv_cache_bit_width, q.dtype)
    values = _read(present_v, v_scale, v_quant_type, kv_cache_bit_width, q.dtype)
    groups = num_heads // kv_num_heads
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)

    logits = torch.matmul(q, keys.mT) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    seen = torch.arange(keys.shape[2])
    if causal:
        visible = seen <= places.unsqueeze(-1)
    else:
        visible = (seen < lengths.reshape(-1, 1, 1)).expand(-1, new, -1)
    if local_window_size >= 0:
        visible = visible & (seen > places.unsqueeze(-1) - local_window_size)
    if attention_bias is not None:
        room = keys.shape[2] - attention_bias.shape[-1]
        logits = logits + torch.nn.functional.pad(attention_bias, [0, room])
    logits = torch.where(visible.unsqueeze(1), logits, torch.full_like(logits, -math.inf))
    y = as_rows(torch.matmul(_shares(logits, smooth_softmax, head_sink), values))
    return (y, present_k, present_v)[:outputs] if outputs > 1 else y


def split_heads(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as heads; keys may be heads, or packed with the queries."""
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        parts = [heads * size, kv_heads * size, kv_heads * size]
        query, key, value = torch.split(query, parts, dim=-1)
    k = key if key.dim() == 4 else as_heads(key, kv_heads)
    v = value if value.dim() == 4 else as_heads(value, kv_heads)
    return as_heads(query, heads), k, v


def rows_of_tables(places: Tensor, position_ids: Tensor | None, *, prompt: bool) -> Tensor:
    """Return by which rows of the tables tokens are turned.

    Of a first prompt the operator reads only the first position of the batch, and counts from it.
    """
    if position_ids is None:
        return places
    if not prompt:
        return position_ids.expand_as(places)
    return (position_ids[:1, :1] + torch.arange(places.shape[1])).expand_as(places)


def _shares(logits: Tensor, smooth: int, sink: Tensor | None) -> Tensor:
    """Softmax, where `smooth` adds a logit of 0 that takes a share, or `sink` one for each head.

    A query that sees no key gets zeros.
    """
    if sink is None and not smooth:
        return softmax_or_zero(logits)
    extra = logits.new_zeros((1, 1, 1, 1)) if sink is None else sink.reshape(1, -1, 1, 1)
    extra = extra.to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]


def written(past: Tensor | None, new: Tensor, places: Tensor, total: int) -> Tensor:
    """Put new keys or values at their places of a cache that holds `total` at least."""
    batch, heads, length, size = new.shape
    if past is None:
        room = new.new_zeros((batch, heads, total, size))
    else:
        missing = torch.sym_max(total - past.shape[2], 0)
        room = torch.cat([past, past.new_zeros((batch, heads, missing, size))], dim=2)
        before = torch.arange(room.shape[2]) < places[:, :1]
        room = torch.where(before[:, None, :, None], room, torch.zeros_like(room))
    index = places.reshape(batch, 1, length, 1).expand(new.shape)
    return torch.scatter(room, 2, index, new)


def _stored(x: Tensor, scale: Tensor | None, kind: Scales, bits: int) -> Tensor:
    if scale is None or kind == "NONE":
        return x
    steps = torch.round(x / _per_channel(scale, x))
    if bits == 8:
        return steps.clamp(-128, 127).to(torch.int8)
    codes = (steps.clamp(-8, 7) + 8).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _read(
    cache: Tensor, scale: Tensor | None, kind: Scales, bits: int, dtype: torch.dtype
) -> Tensor:
    if scale is None or kind == "NONE":
        return cache
    if bits == 8:
        numbers = cache.to(dtype)
    else:
        codes = torch.stack([cache & 15, cache >> 4], dim=-1).flatten(-2)
        numbers = codes.to(dtype) - 8
    return numbers * _per_channel(scale, numbers)


def _per_channel(scale: Tensor, x: Tensor) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape(1, x.shape[1], 1, x.shape[3])
