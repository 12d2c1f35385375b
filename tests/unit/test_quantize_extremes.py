"""`quantize-weights` on numbers whose squares, or sums, float32 does not hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantized import (
    calibrated,
    correlated,
    dequantized,
    missed,
    module_of,
    quantized,
    stack,
    weight,
)

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import PassContext


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("size", [1e15, 8e17, 1e19, 1e36])
def test_activations_whose_squares_float32_does_not_hold(method: Any, size: float) -> None:
    """The layer is rounded to nearest; not at 8e17, where only the sum over feeds is beyond."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
        scaled (float[rows,96] x) => (float[rows,64] y) <float[96] s, float[96,64] w>
        { n = Mul(x, s) y = MatMul(n, w) }"""
    data = [{"x": feed["x"] / np.float32(100) * np.float32(size)} for feed in correlated()]
    module, plain = module_of(text), module_of(text)
    context = PassContext(
        AnalysisManager(module), source="quantize-weights", make_runner=make_runner,
        calibration=lambda module: data,
    )  # fmt: skip
    result = QuantizeWeights(method=method).run(module, context)
    quantized(plain, search="mse")
    same = np.array_equal(weight(module, "w_q4"), weight(plain, "w_q4"))
    noted = [each.message for each in module.remarks if each.kind == "note"]
    assert same == any("'w' is rounded to nearest" in each for each in noted) == (size > 1e18)
    assert ("mean relative error of outputs" in result.statistics) == (size < 1e18)
    assert all(math.isfinite(each) for each in result.statistics.values() if type(each) is float)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e18])
@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_are_told_whatever_the_unit_of_weights(
    method: Any, size: float, symmetric: bool
) -> None:
    module = stack()
    real = weight(module, "d") * np.float32(size)
    module.replace_initializer(module.graph.initializers["d"], ir.Tensor(real))
    result = calibrated(
        module, method=method, bits=8, symmetric=symmetric, block_size=32, exclude=("a", "b", "c")
    )
    found = dequantized(module, "d", 8, 96)
    off = np.linalg.norm(found - real.astype(np.float64)) / np.linalg.norm(real.astype(np.float64))
    told = float(result.statistics["worst relative error"])
    assert told == pytest.approx(off, rel=1e-3)
    # Below the normal numbers scales have no more than those: steps of 1e-38.
    assert 1e-4 < off < (0.06 if size == 1e-37 else 0.01)
    if method != "rtn":
        assert 0 < float(result.statistics["mean relative error of outputs"]) < 0.06


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"codebook": "nf4", "block_size": 32}]
)
def test_immense_weights_stay(method: Any, options: dict[str, Any]) -> None:
    module = stack()
    real = np.sign(weight(module, "d")) * np.float32(3e38)
    module.replace_initializer(module.graph.initializers["d"], ir.Tensor(real))
    calibrated(module, method=method, **options)
    assert any("'d' stays: it holds infinities" in each for each in missed(module))
    np.testing.assert_array_equal(weight(module, "d"), real)
