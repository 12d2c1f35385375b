"""Models nobody here made, as torch.fx.GraphModules: they agree with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from bench.decode_models import open_source
from bench.fx_nodes import rows_of
from fetch_models import model_path, onnx_files
from fx_agreement import run_fx
from model_feeds import MODELS
from support import run_plain

import lwc
from lwc.calibration.feeds import make_feed
from lwc.core.module import Module
from lwc.frontend.load import load

pytestmark = pytest.mark.models

ModelFile = Callable[[str], Path]

EXTENTS = [{"batch": 2, "sequence": 9}, {"batch": 1, "sequence": 16}]
RTOL = 1e-3
"""Of the largest element: float32 through dozens of layers, in other kernels."""


QUANTIZED = {"tagger": 0.05}
"""Relative Frobenius error: a rounding that falls to the other side spreads from layer to layer.

Seen: .026; ONNX Runtime with and without its own optimizations differs by .012.
"""


def _numbers(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def _sequence(length: int) -> dict[str, Any]:
    state = {name: _numbers(length, 1, 1, 128) for name in ("h", "c")}
    return {"input": _numbers(length, length, 576), **state}


def _fixed(seed: int) -> dict[str, Any]:
    return {"input": _numbers(seed, 1, 576), "state": _numbers(seed + 1, 2, 1, 128)}


FEEDS = MODELS | {
    "silero_vad_16k_sequence": (_sequence(2), _sequence(5)),
    "silero_vad_openvino_16k": (_fixed(0), _fixed(2)),  # of one shape
}


def test_no_model_is_left_out() -> None:
    assert set(onnx_files()) == set(FEEDS)


@pytest.mark.parametrize("name", FEEDS)
def test_outputs_agree_at_two_shapes(name: str, model_file: ModelFile) -> None:
    module = load(model_file(name))
    for feed in FEEDS[name]:
        for found, wanted in zip(run_fx(module, feed), run_plain(module, feed), strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            if name in QUANTIZED:
                norm = np.linalg.norm(wanted)
                assert np.linalg.norm(found - wanted) <= QUANTIZED[name] * norm
            elif wanted.dtype.kind == "f":
                atol = max(RTOL * np.abs(wanted).max(), 1e-5)
                np.testing.assert_allclose(found, wanted, RTOL, atol)
            else:
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_light_models() -> None:
    """ONNX's own networks, whose weights are constants: ConstantOfShape."""
    rows = list(rows_of(["light"]))
    assert len(rows) == 9
    assert not [f"{row.case}: {row.reason}" for row in rows if not row.passed]


@pytest.mark.slow
def test_minilm_traces_back(model_file: ModelFile) -> None:
    name = "paraphrase-MiniLM-L3-v2"
    module = load(model_file(name))
    feed, other = MODELS[name]
    lowered = lwc.to_fx(module)
    names = lowered.meta["lwc"]["inputs"]
    again = lwc.trace(
        lowered,
        [torch.from_numpy(feed[each]) for each in names],
        dynamic_shapes=tuple({0: "batch", 1: "length"} for _ in names),
        input_names=names,
    )
    for each in (feed, other):
        for found, wanted in zip(run_plain(again, each), run_plain(module, each), strict=True):
            np.testing.assert_allclose(found, wanted, RTOL, RTOL * np.abs(wanted).max())


@pytest.fixture(scope="module")
def two_layers() -> Module:
    return load(open_source(model_path("smollm2"), layers=2).gguf)


@pytest.mark.parametrize(
    "pipeline",
    [
        (),
        "fuse-norm,fuse-rotary,fuse-attention{form=gqa}",
        "quantize-weights{bits=4 accuracy-level=1}",
        "quantize-weights{bits=4 format=qdq}",
        "quantize-weights{bits=3 format=lwc},fuse-epilogue",
    ],
    ids=str,
)
def test_a_language_model_after_passes(pipeline: Any, two_layers: Module) -> None:
    module = lwc.optimize(two_layers.clone(), pipeline, grant="all").module
    for seed, extents in enumerate(EXTENTS):
        feed = make_feed(module, extents, seed)
        for found, wanted in zip(run_fx(module, feed), run_plain(module, feed), strict=True):
            if "lwc" in pipeline:
                # Activations are rounded to 8 bits: one that falls to the other side is a step of
                # 1/127 of its row's largest off, in one of hundreds of inputs.
                assert np.linalg.norm(found - wanted) < 1 / 127 * np.linalg.norm(wanted)
            else:
                np.testing.assert_allclose(found, wanted, RTOL, RTOL * np.abs(wanted).max())


def test_gradients_of_a_language_model_are_those_of_its_loss(two_layers: Module) -> None:
    """Along the gradient the loss changes by its square for each unit, as differences tell."""
    lowered = lwc.to_fx(two_layers)
    feed = make_feed(two_layers, EXTENTS[0])
    given = [torch.from_numpy(feed[name]) for name in lowered.meta["lwc"]["inputs"]]
    weights = [p for p in lowered.parameters() if p.requires_grad]

    def loss() -> Any:
        found = lowered(*given)
        logits = found[0] if isinstance(found, tuple) else found
        return -torch.log_softmax(logits, -1)[..., 7].mean()

    gradients = torch.autograd.grad(loss(), weights)
    square = sum(float(g.square().sum()) for g in gradients)
    step = 1e-2 / square**0.5
    with torch.no_grad():
        found = []
        for way in (step, -2 * step):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=way)
            found.append(float(loss()))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(square, rel=0.02)
