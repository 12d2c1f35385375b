"""Attention, recurrent layers, and normalisations fused with them."""

from __future__ import annotations

import onnx_ir as ir

from lwc.analysis.shape_rules.registry import (
    Fact,
    Misfit,
    Outcome,
    Site,
    SymbolicArray,
    axis_of,
    rule,
)
from lwc.core.dims import Dim, DimShape, add, maximum, multiply, quotient

__all__: list[str] = []


@rule("LSTM GRU RNN")
def _recurrent(site: Site) -> Outcome:
    dtype, data, weights = site.dtype(0), site.shape(0), site.shape(2)
    hidden = site.attribute("hidden_size") or (site.fresh() if weights is None else weights[2])
    both = site.attribute("direction", "forward") in ("bidirectional", b"bidirectional")
    directions = 2 if both else 1
    first, second = (site.fresh(), site.fresh()) if data is None else data[:2]
    if site.attribute("layout", 0):
        whole: DimShape = (first, second, directions, hidden)
        last: DimShape = (first, directions, hidden)
    else:
        whole = (first, directions, second, hidden)
        last = (directions, second, hidden)
    return [Fact(dtype, whole), Fact(dtype, last), Fact(dtype, last)]


@rule("Attention")
def _attention(site: Site) -> Outcome:
    dtype, q, k, v = site.dtype(0), site.shape(0), site.shape(1), site.shape(2)
    if q is None or k is None or v is None:
        return [Fact(dtype), *[Fact(site.dtype(i)) for i in (1, 2, 0)]]
    if len(q) == 3:
        heads, kv_heads = site.attribute("q_num_heads"), site.attribute("kv_num_heads")
        if not heads or not kv_heads:
            raise Misfit("three-dimensional attention needs its numbers of heads")
        q = (q[0], heads, q[1], quotient(q[2], heads))
        k = (k[0], kv_heads, k[1], quotient(k[2], kv_heads))
        v = (v[0], kv_heads, v[1], quotient(v[2], kv_heads))
        out: DimShape = (q[0], q[2], multiply(heads, v[3]))
    else:
        out = (*q[:3], v[3])
    past_k, past_v = site.shape(4), site.shape(5)
    total: Dim = k[2]
    if site.has(4):
        total = site.fresh() if past_k is None else add(past_k[2], k[2])
    total_v = total if past_v is None or past_k is None else add(past_v[2], v[2])
    return [
        Fact(dtype, out),
        Fact(site.dtype(1), (*k[:2], total, k[3])),
        Fact(site.dtype(2), (*v[:2], total_v, v[3])),
        Fact(dtype, (*q[:3], total)),
    ]


@rule("com.microsoft::MultiHeadAttention com.microsoft::DecoderMaskedMultiHeadAttention")
def _multi_head_attention(site: Site) -> Outcome:
    dtype, query, key, value = site.dtype(0), site.shape(0), site.shape(1), site.shape(2)
    heads = site.attribute("num_heads")
    out: DimShape
    if query is None or (site.has(1) and key is None) or (site.has(2) and value is None):
        return [Fact(dtype)] * site.outputs
    if len(query) == 5:
        batch, length, _, _, size = query
        out = (batch, length, multiply(heads, size))
        total, k_size, v_size = length, size, size
    elif key is not None and len(key) == 5:
        batch, length, width = query
        out, total, k_size, v_size = (batch, length, width), key[1], key[4], key[4]
    else:
        batch, length, width = query
        if value is None or key is None:
            out, total, k_size, v_size = query, length, quotient(width, heads), 0
            v_size = k_size
        elif len(value) == 4:
            out = (batch, length, multiply(heads, value[3]))
            total, k_size, v_size = key[2], key[3], value[3]
        else:
            out = (batch, length, value[2])
            total, k_size = key[1], quotient(key[2], heads)
            v_size = quotient(value[2], heads)
    past = site.shape(6)
    if site.has(6):
        # With a shared buffer, or a cross-attention cache, the extent is not the plain sum.
        plain = past is not None and not site.has(8) and (value is None or len(value) == 3)
        total = add(past[2], total) if plain and past is not None else site.fresh()
    facts = [
        Fact(dtype, out),
        Fact(dtype, (batch, heads, total, k_size)),
        Fact(dtype, (batch, heads, total, v_size)),
    ]
    return [*facts, Fact(dtype, site.fresh_shape(4)) if site.outputs > 3 else facts[0]]


@rule("com.microsoft::GroupQueryAttention")
def _group_query_attention(site: Site) -> Outcome:
    dtype, query = site.dtype(0), site.shape(0)
    heads, kv_heads = site.attribute("num_heads"), site.attribute("kv_num_heads")
    if query is None:
        return [Fact(dtype)] * site.outputs
    batch, length, width = query
    packed = not site.has(1)
    size = quotient(width, heads + 2 * kv_heads if packed else heads)
    total = _cache_extent(site.shape(3), site.known(6), site)
    packed_codes = site.attribute("kv_cache_bit_width", 0) == 4
    cache = (batch, kv_heads, total, quotient(size, 2) if packed_codes else size)
    cache_type = site.dtype(3) if site.has(3) else dtype
    return [
        Fact(dtype, (batch, length, multiply(heads, size))),
        Fact(cache_type, cache),
        Fact(cache_type, cache),
        *[Fact(dtype)] * max(0, site.outputs - 3),
    ]


def _cache_extent(past: DimShape | None, total: SymbolicArray | None, site: Site) -> Dim:
    """Return the length of the present keys: the buffer, or the total if that is more."""
    if total is None or total.size != 1 or site.shapes.is_unknown(total.flat[0]):
        return site.fresh()
    buffer: Dim = 0 if past is None or not site.has(3) else past[2]
    if site.has(3) and past is None:
        return site.fresh()
    return maximum(buffer, total.flat[0])


@rule("com.microsoft::Attention com.microsoft::QAttention")
def _packed_attention(site: Site) -> Outcome:
    quantized = site.node.op_type == "QAttention"
    dtype, data, weights = site.dtype(3 if quantized else 0), site.shape(0), site.shape(1)
    sizes, heads = site.attribute("qkv_hidden_sizes"), site.attribute("num_heads")
    if data is None or (weights is None and not sizes):
        return [Fact(dtype)] * site.outputs
    width = sizes[2] if sizes else quotient((weights or ())[1], 3)
    past = site.shape(8 if quantized else 4)
    present: DimShape | None = None
    if not site.has(8 if quantized else 4):
        present = (2, data[0], heads, data[1], quotient(width, heads))
    elif past is not None and not site.attribute("past_present_share_buffer", 0):
        present = (*past[:3], add(past[3], data[1]), past[4])
    return [Fact(dtype, (*data[:2], width)), Fact(dtype, present)]


@rule("com.microsoft::SkipLayerNormalization com.microsoft::SkipSimplifiedLayerNormalization")
def _skip_layer_norm(site: Site) -> Outcome:
    dtype, shape = site.dtype(0), site.shape(0)
    statistics = None if shape is None else (*shape[:-1], 1)
    single = Fact(ir.DataType.FLOAT, statistics)
    return [Fact(dtype, shape), single, single, Fact(dtype, shape)]


@rule("SimplifiedLayerNormalization com.microsoft::SimplifiedLayerNormalization")
def _simplified_layer_norm(site: Site) -> Outcome:
    shape = site.shape(0)
    statistics = None
    if shape is not None:
        axis = axis_of(site.attribute("axis", -1), len(shape))
        statistics = (*shape[:axis], *([1] * (len(shape) - axis)))
    return [Fact(site.dtype(0), shape), Fact(ir.DataType.FLOAT, statistics)]


@rule("com.microsoft::EmbedLayerNormalization")
def _embed_layer_norm(site: Site) -> Outcome:
    ids, table, dtype = site.shape(0), site.shape(2), site.dtype(2)
    shape = None if ids is None or table is None else (*ids, table[1])
    mask = None if ids is None else (ids[0],)
    return [Fact(dtype, shape), Fact(ir.DataType.INT32, mask), Fact(dtype, shape)]
