"""int8 activations on real models: accuracy, and outliers planted in a decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lwc
from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.data import CalibrationFile
from lwc.calibration.text import load_tokenizer
from lwc.evaluate.perplexity import perplexity
from lwc.passes.quantization.migration import edits, find_pairs, put
from lwc.pipeline.passes import PassContext

pytestmark = pytest.mark.models

FUSED = "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention"


def plant(module: lwc.Module, channels: int = 4, size: float = 100.0) -> int:
    """Make some channels behind each norm larger, and the weights that read them smaller.

    The function stays the same. Returns the number of norms.
    """
    ctx = PassContext(AnalysisManager(module), source="plant")
    random = np.random.default_rng(0)
    pairs = [each for each in find_pairs(module, ctx.editor(), ctx) if each.source.kind == "norm"]
    for pair in pairs:
        factors = np.ones(pair.source.places[0].shape[-1])
        factors[random.choice(len(factors), channels, replace=False)] = 1 / size
        made = edits(pair, factors)
        assert made is not None
        for place, array in made:
            put(module, place, array)
    return len(pairs)


@pytest.mark.slow
def test_planted_outliers(smollm2: Path, model_file: Callable[[str], Path], tmp_path: Path) -> None:
    """Plain int8 collapses; smooth, rotate and llm-int8 each bring it back within 2 %."""
    whole = model_file("lee").read_text(encoding="utf-8")
    seen, unseen = whole[len(whole) // 2 :], whole[: len(whole) // 2]
    (tmp_path / "seen.txt").write_text(seen, encoding="utf-8")
    data = CalibrationFile(tmp_path / "seen.txt", smollm2, samples=2)

    def value(module: lwc.Module, passes: str, *, calibrated: bool = False) -> float:
        made = lwc.optimize(
            module, passes, calibration=data if calibrated else None, verify="none"
        ).module
        return perplexity(made, load_tokenizer(smollm2), unseen, max_tokens=513, threads=1).value

    plain = "smooth-quantize{none}"
    sound = lwc.optimize(smollm2, FUSED, verify="none").module
    planted = sound.clone()
    assert plant(planted) == 60
    wanted = value(sound, plain)
    assert value(planted, plain) > 2 * wanted
    assert value(planted, "smooth-quantize{0.5}", calibrated=True) < 1.02 * wanted
    assert value(planted, f"rotate,{plain}") < 1.02 * wanted
    assert value(planted, "llm-int8", calibrated=True) < 1.02 * wanted


SENTENCES = [
    "The capital of France is Paris.",
    "A quick brown fox jumps over the lazy dog while nobody looks.",
    "Quantization rounds weights and activations to a few bits.",
    "Rain is expected in the north tomorrow, with strong winds along the coast.",
]


def test_embeddings_of_minilm(model_file: Callable[[str], Path]) -> None:
    """Mean-pooled embeddings of sentences that were not seen.

    Outputs of its norms have outlier channels and are read by the residual sum too: no constant can
    take a division. llm-int8 keeps every embedding within 0.999 of the cosine. Plain int8 does not
    (0.996); products before the layers halve its distance.
    """
    folder = model_file("minilm")
    tokenize = load_tokenizer(folder)
    first, last = 101, 102

    def feed(text: str) -> dict[str, Any]:
        ids = np.array([[first, *tokenize(text), last]])
        ones = np.ones_like(ids)
        return {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}

    def embeddings(module: lwc.Module) -> np.ndarray[Any, Any]:
        with OnnxRuntimeBackend().compile(module, threads=1) as session:
            found = [session.run(feed(each))["last_hidden_state"][0] for each in SENTENCES]
        means = np.stack([each.mean(axis=0) for each in found])
        normal: np.ndarray[Any, Any] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return normal

    source = lwc.optimize(folder, "canonicalize,fuse-norm,fuse-attention", verify="none").module
    wanted = embeddings(source)
    text = model_file("lee").read_text(encoding="utf-8")
    data = [feed(each) for each in text.split(". ")[:48] if len(each) > 20]

    def distances(passes: str) -> np.ndarray[Any, Any]:
        made = lwc.optimize(source, passes, calibration=data, verify="none")
        assert int(made.record.passes[-1].statistics["weights quantized"]) >= 37
        far: np.ndarray[Any, Any] = 1 - (embeddings(made.module) * wanted).sum(axis=1)
        return far

    assert distances("llm-int8").max() <= 1e-3
    plain = distances("smooth-quantize{none}").mean()
    assert distances("smooth-quantize{products=true}").mean() < plain / 2
