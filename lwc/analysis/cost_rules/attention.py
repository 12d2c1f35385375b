"""Attention operators: scores and weighted values, 2 · heads · queries · keys · head size MACs."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from lwc.analysis.cost_rules.base import MS, Operands, UnknownCost, Work, cost_rule
from lwc.core.dims import Dim, product, simplify_dim

__all__: list[str] = []

_SOFTMAX_FLOPS = 5
_SCORE_FLOPS = 1  # the scale


class _Problem(NamedTuple):
    batch: Dim
    heads: Dim
    queries: Dim
    keys: Dim
    head: Dim
    value_head: Dim


def _attend(size: _Problem, *, extra: int = 0) -> Work:
    """Work of softmax(q kᵀ · scale) v, every query against every key, scores held as a matrix.

    Args:
        size: Extents.
        extra: FLOPs per score besides scale and softmax: mask, bias, soft cap.
    """
    scores = product((size.batch, size.heads, size.queries, size.keys))
    return Work(
        macs=scores * (size.head + size.value_head),
        other_flops=scores * (_SOFTMAX_FLOPS + _SCORE_FLOPS + extra),
        scratch=scores * 4,
        kernel="attention",
        problem=(size.queries, size.keys, size.head),
        repeat=product((size.batch, size.heads)),
    )


@cost_rule("Attention")
def _standard(node: Operands) -> Work:
    """Opset 23: q, k, v of rank 4 `[B, H, S, D]` or rank 3 `[B, S, H·D]` with head counts."""
    q, k, v = node.shape(0), node.shape(1), node.shape(2)
    if len(q) == 4:
        batch, heads, queries, head = q
        keys, value_head = k[2], v[3]
    else:
        batch, queries, hidden = q
        heads, kv_heads = node.attr("q_num_heads"), node.attr("kv_num_heads")
        if not heads or not kv_heads:
            raise UnknownCost("rank-3 inputs without q_num_heads and kv_num_heads")
        head, value_head, keys = hidden // heads, v[2] // kv_heads, k[1]
    if node.has(4):
        keys = simplify_dim(keys + node.shape(4)[2])
    size = _Problem(batch, heads, queries, keys, head, value_head)
    extra = int(node.has(3)) + (3 if node.attr("softcap", 0.0) else 0)
    work = _attend(size, extra=extra)
    masked = node.has(3) or node.attr("is_causal", 0)
    return replace(work, scratch=work.scratch + (4 * queries * keys if masked else 0))


@cost_rule(f"{MS}GroupQueryAttention")
def _group_query(node: Operands) -> Work:
    """Keys: the past's extent (its buffer's, where it is shared) and the new tokens."""
    q = node.shape(0)
    heads, kv_heads = int(node.attr("num_heads")), int(node.attr("kv_num_heads"))
    batch, queries, hidden = q
    packed = not node.has(1)
    head = hidden // (heads + 2 * kv_heads) if packed else hidden // heads
    keys: Dim = queries
    if node.has(3):
        present = node.outputs[1] if len(node.outputs) > 1 else None
        past = node.shape(3)[2]
        shared = present is not None and present[2] == past
        keys = past if shared else simplify_dim(past + queries)
    size = _Problem(batch, heads, queries, keys, head, head)
    turned = product((batch, queries, heads + kv_heads, head)) if node.attr("do_rotary") else 0
    softcap = node.attr("softcap", 0.0)
    work = _attend(size, extra=3 if softcap else 0)
    # ONNX Runtime computes scores in tiles only where it makes the present keys and values.
    tiled = len(node.outputs) > 1 and not softcap and not node.has(10)
    return Work(
        macs=work.macs,
        other_flops=work.other_flops + 3 * turned,
        # q, k and v of the new tokens are transposed to heads, then q and k are turned.
        scratch=4 * (product((batch, queries, heads + 2 * kv_heads, head)) + turned)
        + (0 if tiled else work.scratch),
        kernel="gqa",
        problem=work.problem,
        repeat=work.repeat,
    )


@cost_rule(f"{MS}MultiHeadAttention")
def _multi_head(node: Operands) -> Work:
    """Separate q, k and v `[B, S, hidden]`, or k and v in heads `[B, H, T, D]`."""
    q = node.shape(0)
    heads = int(node.attr("num_heads"))
    if len(q) == 5:  # packed [B, S, H, 3, D]
        batch, queries, _, _, head = q
        return _attend(_Problem(batch, heads, queries, queries, head, head))
    batch, queries, hidden = q
    head = hidden // heads
    k, v = node.shape(1), node.shape(2) if node.has(2) else node.shape(1)
    keys = k[2] if len(k) == 4 else k[1]
    value_head = v[3] if len(v) == 4 else v[-1] // heads
    if node.has(6):
        keys = simplify_dim(keys + node.shape(6)[2])
    bias = product((batch, queries, heads, head)) * 3 if node.has(3) else 0
    work = _attend(
        _Problem(batch, heads, queries, keys, head, value_head),
        extra=int(node.has(4)) + int(node.has(5)),
    )
    # Scores are computed in tiles only where nothing hides any; a causal mask is made as a matrix.
    causal = bool(node.attr("unidirectional", 0))
    tiled = not (causal or node.has(4) or node.has(5))
    matrices = 0 if tiled else work.scratch + (4 * queries * keys if causal else 0)
    return Work(
        macs=work.macs,
        other_flops=work.other_flops + bias,
        # q, k and v are transposed to heads first.
        scratch=4 * product((batch, heads)) * (queries * head + keys * (head + value_head))
        + matrices,
        kernel="mha",
        problem=work.problem,
        repeat=work.repeat,
    )


@cost_rule(f"{MS}Attention", f"{MS}QAttention")
def _projecting(node: Operands) -> Work:
    """The input `[B, S, in]` times the packed q, k, v weight `[in, 3·hidden]`, then attention."""
    source, weight = node.shape(0), node.shape(1)
    heads = int(node.attr("num_heads"))
    batch, queries, width = source
    sizes = node.attr("qkv_hidden_sizes") or [weight[1] // 3] * 3
    past = 4 if node.op.endswith("::Attention") else 8
    keys = simplify_dim(queries + node.shape(past)[3]) if node.has(past) else queries
    projected = product((batch, queries, width, weight[1]))
    size = _Problem(batch, heads, queries, keys, sizes[0] // heads, sizes[2] // heads)
    work = _attend(size, extra=int(node.has(3)))
    return Work(
        macs=work.macs + projected,
        other_flops=work.other_flops + product((batch, queries, weight[1])),
        scratch=work.scratch + product((batch, queries, weight[1])) * 4,
    )
