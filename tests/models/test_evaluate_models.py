"""Feeds, the backend and perplexity on real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fetch_models
import numpy as np
import pytest

from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.feeds import dim_names
from lwc.calibration.trials import working_feeds
from lwc.evaluate.perplexity import perplexity
from lwc.frontend.load import load
from lwc.verify.numeric.comparer import compare

ModelFile = Callable[[str], Path]

pytestmark = pytest.mark.models

ONNX_FILES = [
    name
    for name, item in fetch_models.ITEMS.items()
    if any(file.endswith(".onnx") for file in item.files)
]


@pytest.mark.parametrize("name", ONNX_FILES)
def test_two_working_shapes_and_agreement_with_itself(name: str, model_file: ModelFile) -> None:
    module = load(model_file(name))
    with OnnxRuntimeBackend().compile(module, threads=1) as compiled:
        feeds = working_feeds(module, compiled)
        results = [compiled.run(feed) for feed in feeds]
    assert len(feeds) == (2 if dim_names(module) else 1)
    shapes = [tuple(array.shape for array in feed.values()) for feed in feeds]
    assert len(set(shapes)) == len(feeds)
    for result in results:
        for array in result.values():
            assert array.dtype.kind != "f" or np.isfinite(array).all()
    report = compare(module, module.clone(), threads=1)
    assert report.worst is not None
    assert report.worst.max_error == 0


@pytest.mark.slow
def test_perplexity_of_smollm2(smollm2: Path, model_file: ModelFile) -> None:
    text = model_file("lee").read_text()
    found = perplexity(load(smollm2), smollm2, text, max_tokens=1025, threads=1)
    assert found.tokens == 1024
    assert found.value == pytest.approx(31.72, abs=0.01)
