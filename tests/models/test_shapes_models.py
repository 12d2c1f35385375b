"""Shape inference against ONNX Runtime on models nobody here made, and on onnx's own node tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from model_feeds import MODELS
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from shape_oracle import Comparison, check, compare

from lwc.analysis.shapes import Shapes
from lwc.core.module import Module
from lwc.frontend.load import load

ModelFile = Callable[[str], Path]


BRANCHING = {"silero_vad", "silero_vad_16k_op15", "silero_vad_half"}
"""Their If nodes squeeze an axis or do not, by its extent: the rank is not known beforehand."""


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_every_intermediate_is_what_was_claimed(name: str, model_file: ModelFile) -> None:
    module = load(model_file(name))
    for feed in MODELS[name]:
        result = compare(module, feed)
        assert not result.wrong, result.wrong[:5]
        assert result.values > 1
        if name not in BRANCHING:
            assert result.complete == result.values


@pytest.mark.models
def test_every_value_of_the_models_has_a_known_shape(model_file: ModelFile) -> None:
    for name in MODELS.keys() - BRANCHING:
        module = load(model_file(name))
        shapes = Shapes.build(module)
        assert not shapes.misfits, name
        for node in module.graph:
            for value in node.outputs:
                found = shapes.shape(value)
                assert found is not None, (name, value.name)
                assert not any(map(shapes.mentions_fresh, found)), (name, value.name)


@pytest.fixture(scope="module")
def node_tests() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [case for case in load_model_tests(kind="node") if case.model and case.data_sets]


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_onnx_node_tests(node_tests: list[Any], symbolic: bool, constant: bool) -> None:
    """Each node test's expected outputs have the shape, type and content that were inferred.

    Dimensions of the inputs are made symbols, small inputs constants, each or both.
    """
    wrong: dict[str, str] = {}
    values = complete = 0
    for case in node_tests:
        inputs, outputs = case.data_sets[0]
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        if model.opset_import[0].version < 13:
            continue
        bindings = _rewrite_inputs(model.graph, inputs, symbolic=symbolic, constant=constant)
        for output in model.graph.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")
        module = Module(ir.from_proto(model))
        shapes = Shapes.build(module)
        result = Comparison()
        for value, truth in zip(module.graph.outputs, outputs, strict=True):
            if isinstance(truth, np.ndarray) and value.producer() is not None:
                check(shapes, value, truth, bindings, result)
        values, complete = values + result.values, complete + result.complete
        if result.wrong:
            wrong[case.name] = result.wrong[0]
    assert not wrong, wrong
    assert values > 1500
    # What stays open depends on content that is fed, or on whether two symbols are both not 1.
    least = {(False, False): 0.8, (False, True): 0.95, (True, False): 0.6, (True, True): 0.85}
    assert complete / values >= least[symbolic, constant]


def _rewrite_inputs(
    graph: onnx.GraphProto, arrays: list[Any], *, symbolic: bool, constant: bool
) -> dict[str, int]:
    bindings: dict[str, int] = {}
    for value, array in zip(list(graph.input), arrays, strict=True):
        if not isinstance(array, np.ndarray):
            continue
        small = array.dtype.kind in "iub" or (array.dtype.kind == "f" and array.size <= 8)
        if constant and small and array.size <= 256:
            graph.initializer.append(numpy_helper.from_array(array, value.name))
            graph.input.remove(value)
        elif symbolic:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                dim.dim_param = f"{value.name}_{axis}"
                bindings[dim.dim_param] = array.shape[axis]
    return bindings
