"""rotate on models of several families: it keeps their outputs, or says why the stream stays."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
from support import run_plain

import lwc

pytestmark = pytest.mark.models

FUSED = (
    "canonicalize,fold-linear,fuse-norm{skip=all},fuse-rotary,fuse-attention,"
    "pack-projections{when=always}"
)
TOLERANCE = 5e-6
"""Of the largest output: float32 through two layers."""


def optimized(family: str, exporter: str, passes: str) -> lwc.Module:
    path = families.variant_path(families.Variant(family, "eager", exporter))
    return lwc.optimize(path, passes, grant="all", backend=None).module


def outputs(module: lwc.Module) -> list[Any]:
    ids = np.random.default_rng(0).integers(3, families.VOCABULARY, (2, 12))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": ids[:, :7]}
    names = {value.name for value in module.graph.inputs}
    return run_plain(module, {name: array for name, array in feed.items() if name in names})


@pytest.mark.parametrize("before", ["canonicalize,fuse-norm", FUSED], ids=["norms", "fused"])
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt2", "opt", "neox", "t5"],
)
def test_families_that_turn(family: str, before: str) -> None:
    for exporter, kind in zip(families.EXPORTERS, ("hadamard", "orthogonal"), strict=True):
        module = optimized(family, exporter, f"{before},rotate{{{kind}}}")
        assert "lwc.rotated" in module.graph.metadata_props
        found, wanted = outputs(module), outputs(optimized(family, exporter, before))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "post-norm"),
        ("distilbert", "post-norm"),
        ("bart", "post-norm"),
        ("gemma2", "post-norm"),
        ("bloom", "post-norm"),
        ("vit", "Transpose acts on the axis of channels"),
        ("t5", "is an output of the graph"),  # the decoder's
    ],
)
def test_families_that_stay(family: str, reason: str) -> None:
    module = optimized(family, "dynamo", "canonicalize,fuse-norm,rotate")
    missed = [each.message for each in module.remarks if each.kind == "missed"]
    assert any(reason in message for message in missed), missed
