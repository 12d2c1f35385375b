"""Attention: flash attention for prompts, split attention for new tokens behind a cache."""

from __future__ import annotations

import onnx_ir as ir
import torch

from lwc.backends.triton import attend
from lwc.backends.triton.lowerings.registry import Results, Site, kernel

_RUNS = "flash_kernel decode_kernel"
_NOTE = "the first or the second, by length"


@kernel("com.microsoft::GroupQueryAttention", runs=_RUNS, note=_NOTE)
def group_query_attention(site: Site) -> Results:
    """Grouped heads, with a cache that may be longer than it is full."""
    site.need_floats("query", "key", "value", "past_key", "past_value", "attention_bias")
    site.need_absent("head_sink", "smooth_softmax")
    for side in ("k", "v"):
        site.need(site.given(f"{side}_quant_type") == "NONE", "its cache is quantized")
    query, heads = site.given("query"), site.given("num_heads")
    both = 0 if site.given("key") is not None else 2 * site.given("kv_num_heads")
    width = site.extent(query, -1)
    site.need_size(None if width is None else width // (heads + both))
    return site.same(attend.group_query_attention, checked=("kv_cache_bit_width",))


@kernel("com.microsoft::MultiHeadAttention", runs=_RUNS, note=_NOTE)
def multi_head_attention(site: Site) -> Results:
    """Heads of rows, or packed."""
    site.need_floats("query", "key", "value", "past_key", "past_value", "attention_bias")
    site.need_outputs(0, 1, 2)
    query, heads = site.given("query"), site.given("num_heads")
    shape = site.shape(query)
    site.need(shape is not None, "the rank of query is not known")
    width = site.extent(query, -1)
    if width is not None and len(shape) == 3:
        width //= heads
    site.need_size(width)
    if site.given("unidirectional"):
        key = site.shape(site.given("key")) if len(shape) == 3 else None
        known = len(shape) == 5 or key is not None
        length = shape[1] if key is None else key[2 if len(key) == 4 else 1]
        site.need(known and shape[1] == length, "queries and new keys may differ in number")
    value = site.given("value")
    if isinstance(value, torch.fx.Node) and len(site.shape(value) or ()) == 3:
        width = site.extent(value, -1)
        site.need_size(None if width is None else width // heads)
    return site.same(attend.multi_head_attention)


@kernel("com.microsoft::Attention", runs=_RUNS, note=_NOTE)
def packed_attention(site: Site) -> Results:
    """Projections by torch, the rest by a kernel."""
    site.need_floats("x", "weights", "past", "attention_bias")
    sizes = site.given("qkv_hidden_sizes")
    width = site.extent(site.given("weights"), -1)
    largest = max(sizes) if sizes else None if width is None else width // 3
    site.need_size(None if largest is None else largest // site.given("num_heads"))
    return site.same(attend.packed_attention)


@kernel("Attention", runs=_RUNS, note=_NOTE)
def attention(site: Site) -> Results:
    """The standard's."""
    site.need_floats("q", "k", "v", "past_key", "past_value")
    site.need_outputs(0, 1, 2)
    kinds = {site.dtype(site.given(name)) for name in "qv"}
    site.need(len(kinds) == 1, "queries and values are of different types")
    precision = site.given("softmax_precision")
    site.need(precision in (None, torch.float32), f"its softmax is taken in {precision}")
    mask = site.given("mask")
    if mask is not None and site.dtype(mask) != ir.DataType.BOOL:
        site.need_floats("mask")
    for name, count in (("q", "q_num_heads"), ("v", "kv_num_heads")):
        rank, size = site.need_rank(name), site.extent(site.given(name), -1)
        if size is not None and rank == 3:
            size //= site.given(count)
        site.need_size(size)
    # Without the output of scores, which of them it would be asks for nothing.
    return site.same(attend.attention, checked=("softmax_precision", "qk_matmul_output_mode"))
