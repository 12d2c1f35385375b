"""fuse-rotary on real models: all there is to fuse, the same outputs, none left in attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from support import ops, run_pass, run_pass_to_the_end, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.calibration.feeds import make_feed
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.passes.attention.fuse_attention import FuseAttention
from lwc.passes.attention.fuse_rotary import FuseRotary
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.pipeline.passes import PassContext

pytestmark = pytest.mark.models

RTOL = 2e-5
"""float32: rounding errors of two layers, relative to an output's root mean square."""

FAMILIES = (
    ("llama", "sdpa", "dynamo"),
    ("llama", "eager", "script"),
    ("mistral", "sdpa", "dynamo"),
    ("qwen2", "eager", "dynamo"),
    ("qwen3", "sdpa", "script"),
    ("gemma", "eager", "script"),
    ("gemma2", "eager", "dynamo"),
    ("phi", "sdpa", "dynamo"),
    ("phi3", "eager", "script"),
    ("neox", "eager", "script"),
    ("neox", "sdpa", "dynamo"),
)


def open_family(family: tuple[str, str, str]) -> tuple[Module, dict[str, Any]]:
    module = load(families.variant_path(families.Variant(*family)))
    feed = dict(make_feed(module, {"batch": 2, "sequence": 7}, 0))
    run_pass(Canonicalize(), module)
    return module, feed


def assert_same(module: Module, feed: dict[str, Any], wanted: list[Any]) -> None:
    for a, b in zip(run_plain(module, feed), wanted, strict=True):
        scale = float(np.sqrt(np.mean(np.square(b.astype(np.float64)))))
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL * scale)


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_families(family: tuple[str, str, str]) -> None:
    module, feed = open_family(family)
    wanted = run_plain(module, feed)
    result = run_pass_to_the_end(FuseRotary(), module)
    assert result.rewrites == {"rotary": families.Variant(*family).expected.rotary}
    assert not {"Cos", "Sin"} & set(ops(module))
    tables = [name for name in module.graph.initializers if name.endswith("_table")]
    assert sorted(tables) == ["cos_table", "sin_table"]
    assert_same(module, feed, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_turns_by_itself(family: str) -> None:
    module, feed = open_family((family, "sdpa", "script"))
    wanted = run_plain(module, feed)
    run_pass(FuseRotary(), module)
    context = PassContext(AnalysisManager(module), granted=frozenset({"Attention masks"}))
    FuseAttention().run(module, context)
    run_pass(Canonicalize(), module)
    assert "RotaryEmbedding" not in ops(module)
    assert ops(module).count("GroupQueryAttention") == families.LAYERS
    assert_same(module, feed, wanted)


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    """Thirty layers, whose positions are an input."""
    module = load(smollm2)
    run_pass(Canonicalize(), module)
    assert run_pass(FuseRotary(), module).rewrites == {"rotary": 60}
    assert not {"Cos", "Sin"} & set(ops(module))
