"""pack-projections and sparse-attention on models of several families, after their fusions."""

from __future__ import annotations

from collections import Counter

import families
import numpy as np
import pytest
from support import run_plain

import lwc
from lwc.core.module import Module
from lwc.core.walk import op_name

pytestmark = pytest.mark.models

FUSED = "canonicalize,fold-linear,fuse-rotary,fuse-attention"
LAYERS = 2
RTOL, ATOL = 1e-4, 1e-5
"""float32 through two layers."""


def optimized(family: str, passes: str) -> tuple[Module, dict[str, int]]:
    """Fuse, run passes on that, comparing outputs where they promise to keep them."""
    path = families.variant_path(families.Variant(family, "sdpa", "dynamo"))
    result = lwc.optimize(path, f"{FUSED},{passes}", grant="all", verify="numeric", backend=None)
    return result.module, dict(result.record.passes[-1].rewrites)


@pytest.mark.parametrize(
    ("family", "when", "rewrites"),
    [
        ("llama", "auto", {"into-attention": LAYERS}),
        ("llama", "always", {"into-attention": LAYERS, "with-split": LAYERS}),
        ("qwen2", "always", {"into-attention": LAYERS, "with-split": LAYERS}),
        ("gpt2", "always", {"uncut-into-attention": LAYERS}),
    ],
)
def test_projections(family: str, when: str, rewrites: dict[str, int]) -> None:
    module, found = optimized(family, f"pack-projections{{when={when}}}")
    assert found == rewrites
    attention = [node for node in module.graph if op_name(node).endswith("GroupQueryAttention")]
    assert [node.inputs[1] for node in attention] == [None] * LAYERS


@pytest.mark.parametrize(
    "options", ["window=4", "pattern=fixed stride=4 summary=1 global-tokens=1"]
)
def test_sparse_decoder(options: str) -> None:
    """The first tokens, all in reach, are as before, later ones not; none hears of later ones."""
    dense, _ = optimized("llama", "infer-shapes")
    sparse, found = optimized("llama", f"sparse-attention{{{options}}}")
    assert sum(found.values()) == LAYERS
    assert Counter(node.op_type for node in sparse.graph)["Where"] == ("fixed" in options)
    ids = np.random.default_rng(0).integers(3, families.VOCABULARY, (2, 12))
    other = np.concatenate([ids[:, :9], ids[:, :3]], axis=1)
    results = [
        run_plain(module, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0]
        for module, tokens in ((dense, ids), (sparse, ids), (sparse, other))
    ]
    before, after, changed = results
    np.testing.assert_allclose(after[:, :4], before[:, :4], RTOL, ATOL)
    assert not np.allclose(after[:, 6:], before[:, 6:], 10 * RTOL, 100 * ATOL)
    np.testing.assert_allclose(changed[:, :9], after[:, :9], RTOL, ATOL)
