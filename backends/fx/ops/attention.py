"""Attention of the standard, and ONNX Runtime's MultiHeadAttention and Attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from lwc.backends.fx.registry import op
from lwc.core.errors import LwcError

__all__ = ["as_heads", "as_rows", "bias_of", "counted", "opened", "softmax_or_zero", "unpacked"]

Tensor: TypeAlias = torch.Tensor


def as_heads(x: Tensor, heads: int) -> Tensor:
    """Bring `[batch, length, heads * size]` to `[batch, heads, length, size]`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def as_rows(x: Tensor) -> Tensor:
    """Bring `[batch, heads, length, size]` to `[batch, length, heads * size]`."""
    return x.transpose(1, 2).flatten(2)


def softmax_or_zero(logits: Tensor) -> Tensor:
    """Softmax over the last axis; a row where all is -inf, or which is empty, gives zeros."""
    if isinstance(logits.shape[-1], int) and logits.shape[-1] == 0:
        return logits
    hidden = logits.amax(-1, keepdim=True) == -math.inf
    shown = torch.where(hidden, torch.zeros_like(logits), logits)
    return torch.where(hidden, torch.zeros_like(logits), torch.softmax(shown, -1))


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads so that each query head has its own."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


@op("Attention", types="softmax_precision")
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
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0,
    softmax_precision: torch.dtype | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int = 1,
) -> Any:
    """Attend; returns the rows, keys and values with what was before them, and the products.

    Query `i` sees key `j` up to `j = i + offset`, where `offset` is the length of the past, or
    `lengths` less the number of queries where keys and values are a buffer with room at the end.
    """
    in_rows = q.dim() == 3
    if in_rows:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = as_heads(q, q_num_heads), as_heads(k, kv_num_heads), as_heads(v, kv_num_heads)
    offset: Any = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
    elif lengths is not None:
        lengths = counted(lengths, k.shape[2])
        offset = (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    root = math.sqrt(abs(factor))
    keys, values = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    products = torch.matmul(q * math.copysign(root, factor), (keys * root).mT)
    capped = torch.tanh(products / softcap) * softcap if softcap > 0 else products
    bias = bias_of(mask, keys.shape[2], q.dtype)
    visible = _visible(
        q.shape[2], keys.shape[2], offset, is_causal, left_window_size, right_window_size
    )
    if lengths is not None:
        filled = torch.arange(keys.shape[2]) < lengths.reshape(-1, 1, 1, 1)
        visible = filled if visible is None else visible & filled
    logits = capped if bias is None else capped + bias
    if visible is not None:
        logits = torch.where(visible, logits, torch.full_like(logits, -math.inf))
    precise = logits if softmax_precision is None else logits.to(softmax_precision)
    shares = softmax_or_zero(precise).to(q.dtype)
    # The standard lets values have a type of their own.
    both = torch.promote_types(q.dtype, v.dtype)
    y = torch.matmul(shares.to(both), values.to(both)).to(q.dtype)
    y = as_rows(y) if in_rows else y
    shown = (products, capped, logits, shares)[qk_matmul_output_mode]
    return (y, k, v, shown)[:outputs] if outputs > 1 else y


def counted(lengths: Tensor, keys: int) -> Tensor:
    """Return how many keys of each sequence there are, as a buffer of `keys` has room for.

    Raises:
        LwcError: A length on the CPU is none of 0 to `keys`; what else computes is not waited for.
    """
    looks = type(lengths) is torch.Tensor and not torch.compiler.is_compiling()
    if looks and lengths.is_cpu and lengths.numel():
        try:
            low, high = (int(end) for end in lengths.aminmax())
        except RuntimeError:  # within vmap and make_fx a tensor has no number
            low, high = 0, 0
        if low < 0 or high > keys:
            raise LwcError(f"nonpad_kv_seqlen is from {low} to {high}, and there are {keys} keys")
    return lengths.clamp(0, keys)


def bias_of(mask: Tensor | None, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as numbers to add; one that is too short hides the keys after it."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(dtype)
    missing = length - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, [0, missing], value=-math.inf)
    return mask


def _visible(
    queries: int, keys: int, offset: Any, causal: int, left: int, right: int
) -> Tensor | None:
    """Tell which keys a query sees by their distance, or return None for all."""
    if not causal and left < 0 and right < 0:
        return None
    ahead = torch.arange(keys) - torch.arange(queries).unsqueeze(-1) - offset
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        visible = visible & (ahead <= 0)
    if left >= 0:
        visible = visible & (-ahead <= left)
    return visible & (ahead <= right) if right >= 0 else visible


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    scale: float | None,
    mask: Tensor | None,
    bias: Tensor | None,
    unidirectional: int,
    fill: float,
    starts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend as ONNX Runtime's operators do, in which hidden keys get `fill` more.

    With `unidirectional`, query `i` sees key `j` up to `j = i + past`, and the last query all:
    where there are as many new keys as queries, it would anyway.

    Returns rows, the keys and values with those of the past, and the logits.
    """
    past = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
    logits = torch.matmul(q, k.mT) * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        logits = logits + bias
    length, total = q.shape[2], k.shape[2]
    if mask is not None:
        open_ = opened(mask, q.shape[0], length, total, starts=starts)
        logits = logits + torch.where(open_, 0.0, fill).to(logits.dtype)
    if unidirectional:
        queries = torch.arange(length).unsqueeze(-1)
        seen = (torch.arange(total) <= queries + past) | (queries == length - 1)
        lowest = torch.full_like(logits, torch.finfo(logits.dtype).min)
        logits = torch.where(seen, logits, lowest)
    return as_rows(torch.matmul(torch.softmax(logits, -1), v)), k, v, logits


def opened(mask: Tensor, batch: int, queries: int, total: int, *, starts: bool = True) -> Tensor:
    """Read a mask of any form that ONNX Runtime's CPU takes: `[batch, 1, queries or 1, total]`.

    Args:
        mask: Numbers that open a key unless they are 0, `[batch, total]` or
            `[batch, queries, total]`; or where the keys of each sequence end, `[batch]`, and behind
            that where they start, `[2 * batch]`, or lengths added up, `[3 * batch + 2]`, which the
            CPU does not read.
        batch: Number of sequences.
        queries: Number of queries.
        total: Number of keys, those of the past included.
        starts: Whether the form with starts is one.

    Raises:
        LwcError: It has another shape.
    """
    forms = {"[batch]": batch, "[2 * batch]": 2 * batch, "[3 * batch + 2]": 3 * batch + 2}
    if not starts:
        del forms["[2 * batch]"]
    if mask.dim() == 1 and mask.shape[0] in forms.values():
        place = torch.arange(total)
        seen = place < mask[:batch].unsqueeze(-1)
        if mask.shape[0] == 2 * batch:
            seen = seen & (place >= mask[batch:].unsqueeze(-1))
        return seen.reshape(batch, 1, 1, total)
    if list(mask.shape) == [batch, total]:
        return (mask != 0).reshape(batch, 1, 1, total)
    if list(mask.shape) == [batch, queries, total]:
        return (mask != 0).unsqueeze(1)
    raise LwcError(
        f"the mask has shape {list(mask.shape)}; with a batch of {batch}, {queries} queries and "
        f"{total} keys it may be {', '.join(forms)}, [batch, keys] or [batch, queries, keys]"
    )


@op("com.microsoft::MultiHeadAttention")
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
    """Attend; keys and values may be rows or heads, or packed with the queries."""
    q, k, v = unpacked(query, key, value, num_heads, bias)
    found = _attended(
        q,
        k,
        v,
        past_key,
        past_value,
        scale=scale,
        mask=key_padding_mask,
        bias=attention_bias,
        unidirectional=unidirectional,
        fill=mask_filter_value,
        starts=False,
    )
    return found[:outputs] if outputs > 1 else found[0]


def unpacked(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, bias: Tensor | None
) -> list[Tensor]:
    """Return queries, keys and values as heads, from rows, heads, or what packs several of them."""
    if query.dim() == 5:  # [batch, length, heads, 3, size]
        return [part.transpose(1, 2) for part in query.unbind(3)]
    rows = [query, key, value]
    if key is not None and key.dim() == 5:
        rows = [query, *(part.flatten(2) for part in key.unbind(3))]
    if bias is not None:
        sizes = [query.shape[-1]] * 2 + [bias.shape[0] - 2 * query.shape[-1]]
        terms = torch.split(bias, sizes)
        rows = [
            x + term if x is not None and x.dim() == 3 else x
            for x, term in zip(rows, terms, strict=True)
        ]
    return [x if x is not None and x.dim() == 4 else as_heads(x, heads) for x in rows]


@op("com.microsoft::Attention", zero="past_present_share_buffer do_rotary rotary_embedding_dim")
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
    """Project to queries, keys and values, and attend."""
    rows = torch.matmul(x, weights)
    rows = rows if bias is None else rows + bias
    sizes = list(qkv_hidden_sizes or [weights.shape[1] // 3] * 3)
    q, k, v = (as_heads(part, num_heads) for part in torch.split(rows, sizes, dim=-1))
    y, keys, values, _ = _attended(
        q,
        k,
        v,
        None if past is None else past[0],
        None if past is None else past[1],
        scale=scale,
        mask=mask,
        bias=attention_bias,
        unidirectional=unidirectional,
        fill=mask_filter_value,
        starts=True,
    )
    return (y, torch.stack([keys, values])) if outputs > 1 else y


@op("LinearAttention", ignored="chunk_size", many=True)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float = 0,
    update_rule: Literal["linear", "gated", "delta", "gated_delta"] = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """Attend by a state that each token writes to; returns rows and the last state."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (
        as_heads(x, heads).to(wide)
        for x, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    factor = scale or 1 / math.sqrt(q.shape[-1])
    state = (
        torch.zeros((q.shape[0], kv_num_heads, k.shape[-1], v.shape[-1]), dtype=wide)
        if past_state is None
        else past_state.to(wide)
    )
    fades = writes = None
    if decay is not None and "gated" in update_rule:
        fades = as_heads(decay, kv_num_heads).to(wide).exp()
    if beta is not None and "delta" in update_rule:
        writes = beta.transpose(1, 2).to(wide)
    rows = []
    for step in range(q.shape[2]):
        told, kept = v[:, :, step], k[:, :, step].unsqueeze(-1)
        if fades is not None:
            state = state * fades[:, :, step].unsqueeze(-1)
        if writes is not None:
            told = writes[:, :, step].unsqueeze(-1) * (told - (state * kept).sum(-2))
        state = state + kept * told.unsqueeze(-2)
        read = _repeated(state, q_num_heads)
        rows.append(factor * (q[:, :, step].unsqueeze(-1) * read).sum(-2))
    y = as_rows(torch.stack(rows, dim=2)).to(query.dtype)
    return y, state.to(query.dtype if past_state is None else past_state.dtype)
