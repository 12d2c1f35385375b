"""Rotary embeddings."""

from __future__ import annotations

from lwc.backends.triton import rotate
from lwc.backends.triton.lowerings.registry import Results, Site, kernel


@kernel("RotaryEmbedding", runs="rotary_kernel")
def _standard(site: Site) -> Results:
    site.need_one_type("x", "cos_cache", "sin_cache")
    _has_heads(site)
    return site.same(rotate.rotary_embedding)


@kernel("com.microsoft::RotaryEmbedding", runs="rotary_kernel")
def _contrib(site: Site) -> Results:
    site.need_one_type("x", "cos_cache", "sin_cache")
    return site.same(rotate.contrib_rotary_embedding)


def _has_heads(site: Site) -> None:
    rank = site.need_rank("x")
    site.need(rank == 4 or site.given("num_heads") > 0, "the number of heads is not known")
