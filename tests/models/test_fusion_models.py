"""Fusions of every family: all that there is to fuse is found, and the outputs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.fusion import KINDS, TOLERANCE, count, fuse, measure, registered
from bench.fusion_subjects import real_models, small_model
from families import FAMILIES, Variant, variant_path, variants
from support import plain_session

from lwc.analysis.manager import AnalysisManager
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.passes.attention.fuse_attention import FuseAttention
from lwc.passes.attention.lowering import MASKS_PAD_RIGHT
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]

FAST = ("bert-sdpa-script", "gpt2-eager-dynamo", "llama-sdpa-dynamo", "bart-sdpa-dynamo")
PASSES = registered(name for name, _ in KINDS.values())
RTOL, ATOL = 1e-4, 1e-5
"""float32 through two layers; the largest difference seen is 8e-7."""


def _check(variant: Variant) -> None:
    row = measure(small_model(variant), PASSES)
    assert row["found"] == row["expected"], row["missed"]
    assert max(row["error"], row["granted_error"]) <= TOLERANCE
    assert (row["cached_error"] or 0.0) <= TOLERANCE


@pytest.mark.models
@pytest.mark.parametrize("variant", [v for v in variants() if v.name in FAST], ids=str)
def test_some_families(variant: Variant) -> None:
    _check(variant)


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_exporter(family: str) -> None:
    for variant in variants([family]):
        if variant.name not in FAST:
            _check(variant)


def _fused(path: Path, *, granted: bool) -> Module:
    module = load(path)
    analyses = AnalysisManager(module)
    grants = frozenset({MASKS_PAD_RIGHT}) if granted else frozenset()
    for each in (Canonicalize(), FuseAttention()):
        if each.run(module, PassContext(analyses, source=each.name, granted=grants)).changed:
            analyses.invalidate()
    return module


def _feed(batch: int, length: int, padded: str) -> dict[str, Array]:
    """Sequence n hides n tokens more than the one before; the last row may be hidden whole."""
    random = np.random.default_rng(batch * 100 + length)
    mask = np.ones((batch, length), np.int64)
    for row in range(batch):
        hidden = min((row + 1) * length // 4, length - 1)
        if padded == "right":
            mask[row, length - hidden :] = 0
        elif padded == "left":
            mask[row, :hidden] = 0
    if padded == "whole":
        mask[-1] = 0
    return {"input_ids": random.integers(3, 100, (batch, length)), "attention_mask": mask}


@pytest.mark.models
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_masks_of_decoders(family: str) -> None:
    """Granted, tokens that are none of the padding agree; else all that the original gives."""
    path = variant_path(Variant(family, "sdpa", "dynamo"))
    granted, kept = _fused(path, granted=True), _fused(path, granted=False)
    assert count(granted)["attention"] == count(kept)["attention"] == 2
    added = [len([value for value in node.inputs if value is not None]) for node in _gqa(granted)]
    assert added == [5, 5]
    original, with_grant, without = map(plain_session, (load(path), granted, kept))
    for batch in (1, 3):
        for length in (1, 7, 64):
            for padded in ("right", "left", "whole"):
                feed = _feed(batch, length, padded)
                (wanted,) = original.run(None, feed)
                there = np.isfinite(wanted)
                (found,) = without.run(None, feed)
                np.testing.assert_allclose(found[there], wanted[there], rtol=RTOL, atol=ATOL)
                if padded == "right":
                    (found,) = with_grant.run(None, feed)
                    seen = feed["attention_mask"].astype(bool)
                    np.testing.assert_allclose(found[seen], wanted[seen], rtol=RTOL, atol=ATOL)
                    assert np.isfinite(found).all()


def _gqa(module: Module) -> list[Any]:
    return [node for node in module.nodes() if node.op_type == "GroupQueryAttention"]


REAL = {subject.name: subject for subject in real_models()}


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REAL if not name.startswith("smollm2")])
def test_real_models(name: str) -> None:
    """The tagger rounds its shares to eight bits between softmax and values: it stays."""
    row = measure(REAL[name], PASSES)
    kept = {"attention": 0} if name == "tagger-file" else {}
    assert row["found"] == {**row["expected"], **kept}, row["missed"]
    assert len(row["missed"]) == (6 if kept else 0)
    assert all("rounded to few bits" in each for each in row["missed"])
    assert row["agrees"]


@pytest.mark.models
@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    """Its outputs and its exports are compared by the benchmark, which takes ten minutes."""
    module, missed = fuse(smollm2, PASSES)
    assert count(module) == vars(REAL["smollm2-file"].expected), missed
