"""Models of several families, lowered and run in the interpreter, beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import families
import numpy as np
import onnx_ir as ir
import pytest
from bench.decode_models import open_source
from bench.triton_model import SETTINGS, measure, optimized
from fetch_models import model_path
from model_feeds import MODELS
from support import run_plain

import lwc
from lwc.backends.triton.lower import placements
from lwc.backends.triton.session import TritonBackend
from lwc.core.walk import op_name

pytestmark = pytest.mark.models

FUSED = (
    "canonicalize,fold-linear,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,canonicalize,"
    "quantize-weights{bits=4 accuracy-level=1}"
)
RTOL = 1e-4
"""Of the largest element: float32 through two or three layers, in other kernels."""

HEAVY = frozenset({
    "LayerNormalization", "SimplifiedLayerNormalization", "com.microsoft::MatMulNBits",
    "com.microsoft::SkipSimplifiedLayerNormalization", "com.microsoft::MultiHeadAttention",
    "com.microsoft::GroupQueryAttention", "com.microsoft::Attention", "Attention", "MatMul",
    "Softmax",
})  # fmt: skip
"""What models spend their time in."""


def agree(module: lwc.Module, feed: Mapping[str, Any]) -> set[str]:
    """Check that all heavy nodes run in kernels, and outputs agree; return their operators.

    Scales are made numbers of float16, which the kernel has them in: what is left is rounding.
    """
    made = lwc.optimize(module, FUSED, grant="all", backend=None, verify="none").module
    for node in made.graph:
        if op_name(node) == "com.microsoft::MatMulNBits":
            scales = node.inputs[2]
            assert scales is not None
            assert scales.const_value is not None
            halves = scales.const_value.numpy().astype(np.float16).astype(np.float32)
            scales.const_value = ir.tensor(halves, name=scales.name)
    names = {value.name for value in made.graph.inputs}
    given = {name: array for name, array in feed.items() if name in names}
    with TritonBackend().compile(made, threads=1) as executable:
        placed = placements(executable.graph_module)
        outside = [each for each in placed if each.op in HEAVY and not each.kernels]
        assert outside == []
        found = list(executable.run(given).values())
    for a, b in zip(found, run_plain(made, given), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, RTOL, RTOL * np.abs(b).max())
    return {each.op for each in placed if each.kernels}


def test_minilm() -> None:
    """An encoder with a mask, padding behind its sequences."""
    name = "paraphrase-MiniLM-L3-v2"
    feed = dict(MODELS[name][1])
    feed["attention_mask"] = np.tril(np.ones((3, 20), np.int64), 16)
    ops = agree(lwc.load(model_path(name)), feed)
    assert "com.microsoft::MultiHeadAttention" in ops


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_decoders(family: str) -> None:
    module = lwc.load(families.variant_path(families.Variant(family, "sdpa", "dynamo")))
    ids = np.random.default_rng(0).integers(3, families.VOCABULARY, (2, 12))
    ops = agree(module, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert "com.microsoft::GroupQueryAttention" in ops
    assert ("Mul" in ops) == (family == "gemma")  # a gate


@pytest.fixture(scope="module")
def two_layers() -> lwc.Module:
    return lwc.load(open_source(model_path("smollm2"), layers=2).gguf)


@pytest.mark.parametrize("setting", SETTINGS)
def test_smollm2_emitted(setting: str, two_layers: lwc.Module) -> None:
    """16 tokens of two layers: see `triton_model.py` for what differs.

    Scales of 4-bit weights are rounded to float16, by up to 2**-11. A rounding to 8 bits that falls
    to the other side is a step of 1/127 of its row's largest, in one of hundreds of inputs.
    """
    found = measure(optimized(two_layers, setting), setting, 16)
    assert found["norm"] < {"w4a16": 2**-11, "w8a8": 1 / 127 / 3}[setting]
    assert found["alone"] < {"w4a16": 2**-11, "w8a8": 1e-5}[setting]  # the same roundings
    assert found["cosine"] > 0.99999
    assert found["in kernels"] > 4 * found["in torch"]
