"""canonicalize on ONNX's own node tests: as they are, and with every input a constant."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from support import run_pass, run_plain

from lwc.core.module import Module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear
from lwc.rewrite import MIN_OPSET

SAMPLE = 6
"""Every so many of ONNX's ~1,900 cases; all of them took 26 s and agreed when this was written."""

RANDOM = ("bernoulli", "random", "multinomial", "training")
CLOSE = {np.dtype(np.float16): (2e-3, 2e-3)}
"""(rtol, atol) by type: two roundings of float16; other types (1e-5, 1e-6)."""


def sampled_cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    usable = [
        case
        for case in sorted(cases, key=lambda case: str(case.name))
        if case.model is not None
        and not any(word in case.name for word in RANDOM)
        and all(each.domain or each.version >= MIN_OPSET for each in case.model.opset_import)
    ]
    return usable[::SAMPLE]


def feed_of(case: Any) -> dict[str, Any] | None:
    feed = {}
    for value, given in zip(case.model.graph.input, case.data_sets[0][0], strict=False):
        if isinstance(given, onnx.TensorProto):
            feed[value.name] = numpy_helper.to_array(given)
        elif isinstance(given, np.ndarray):
            feed[value.name] = given
        else:
            return None
    return feed


def simplified(model: onnx.ModelProto) -> Module:
    module = Module(ir.from_proto(model))
    for each in (Canonicalize(), FoldLinear(), Canonicalize()):
        run_pass(each, module)
    return module


def with_constant_inputs(model: onnx.ModelProto, feed: dict[str, Any]) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.input[:]
    for value in model.graph.input:
        twin.graph.initializer.append(ir.to_proto(ir.Tensor(feed[value.name], name=value.name)))
    return twin


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    for a, b in zip(found, wanted, strict=True):
        if isinstance(b, np.ndarray) and b.dtype.kind == "f":
            rtol, atol = CLOSE.get(b.dtype, (1e-5, 1e-6))
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_node_tests_are_unchanged_in_meaning() -> None:
    ran = folded = 0
    for case in sampled_cases():
        feed = feed_of(case)
        result = simplified(case.model)
        if feed is None:
            continue
        try:
            wanted = run_plain(case.model, feed)
        except Exception:  # ONNX Runtime lacks it: only that the rewrite ends is tested.
            continue
        assert_same(run_plain(result, feed), wanted)
        ran += 1
        if any(array.dtype.kind not in "biuf" for array in feed.values()):
            continue
        constant = with_constant_inputs(case.model, feed)
        assert_same(run_plain(simplified(constant), {}), wanted)
        folded += 1
    assert ran >= 150
    assert folded >= 120
