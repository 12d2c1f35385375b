"""A small random llama after lwc's own passes, in PyTorch: it agrees with ONNX Runtime.

SmolLM2 after some of them is in test_fx_models.py; here is what else passes write.
"""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest

pytest.importorskip("torch")

from fx_agreement import run_fx
from support import run_plain

import lwc
from lwc.calibration.feeds import make_feed
from lwc.core.module import Module
from lwc.core.walk import op_name

pytestmark = pytest.mark.models

FUSED = "canonicalize,fuse-norm{skip=all},fuse-activation,fuse-rotary,fuse-attention"
CACHED = "canonicalize,fuse-norm,fuse-rotary,fuse-attention,add-kv-cache,last-logits"
BOUND = {"float16": 5e-3, "per-tensor": 0.05, "quantize-kv-cache": 0.02}
"""Norm of the difference by that of the output: ten roundings of float16, or of activations (keys,
values) to 8 bits that fall to the other side. Anything else is float32: 1e-5."""

PIPELINES = {
    f"{FUSED}{{form=mha}}": "com.microsoft::MultiHeadAttention",
    f"{FUSED},pack-projections{{when=always}}": "com.microsoft::GroupQueryAttention",
    "canonicalize,fuse-rotary{form=contrib}": "com.microsoft::RotaryEmbedding",
    CACHED: "com.microsoft::GroupQueryAttention",
    f"{FUSED},quantize-weights{{bits=2 accuracy-level=1}}": "com.microsoft::MatMulNBits",
    f"{FUSED},quantize-weights{{codebook=nf4 embeddings=4}}": "com.microsoft::MatMulBnb4",
    f"{FUSED},pack-projections{{when=always}},"
    "quantize-weights{format=lwc symmetric=true block-size=0},fuse-epilogue": (
        "lwc::DynamicQuantMatMul"
    ),
    "canonicalize,llm-int8{1.0}": "lwc::DynamicQuantMatMul",
    "canonicalize,smooth-quantize{activations=per-tensor}": "com.microsoft::DynamicQuantizeMatMul",
    "canonicalize,smooth-quantize{activations=static}": "QuantizeLinear",
    f"{FUSED},convert-dtype{{float16}}": "com.microsoft::GroupQueryAttention",
}
"""Pipelines, and an operator that each of them writes."""


@pytest.fixture(scope="module")
def llama() -> Module:
    return lwc.load(families.variant_path(families.Variant("llama", "sdpa", "dynamo")))


def assert_agrees(module: Module, bound: float) -> None:
    usual = {
        dim.value for v in module.graph.inputs for dim in v.shape or () if hasattr(dim, "value")
    }
    for seed, extents in enumerate(
        (
            {"batch": 2, "sequence": 7, "past_sequence_length": 0},
            {"batch": 1, "sequence": 1, "past_sequence_length": 5},
        )
    ):
        feed = make_feed(module, {k: n for k, n in extents.items() if k in usual}, seed)
        for found, wanted in zip(run_fx(module, feed), run_plain(module, feed), strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            a, b = found.astype(np.float64), wanted.astype(np.float64)
            assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pipeline(pipeline: str, llama: Module) -> None:
    feeds: list[Any] = [make_feed(llama, None, seed) for seed in range(2)]
    module = lwc.optimize(llama.clone(), pipeline, grant="all", calibration=feeds).module
    assert PIPELINES[pipeline] in {op_name(node) for node in module.graph}
    assert_agrees(module, max((BOUND[key] for key in BOUND if key in pipeline), default=1e-5))


@pytest.mark.parametrize("options", ["8", "4", "8 scales=tensor"])
def test_a_cache_of_integers(options: str, llama: Module) -> None:
    cached = lwc.optimize(llama.clone(), CACHED, grant="all").module
    feed = make_feed(cached, {"past_sequence_length": 0})
    module = lwc.optimize(cached, f"quantize-kv-cache{{{options}}}", calibration=[feed]).module
    assert_agrees(module, BOUND["quantize-kv-cache"])
