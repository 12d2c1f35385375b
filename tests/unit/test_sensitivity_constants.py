"""Constants that rounding cannot touch must not excuse a wrong result."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of

from lwc.core.errors import VerificationError
from lwc.core.module import Module
from lwc.verify.numeric.comparer import compare
from lwc.verify.numeric.sensitivity import Sensitivity


def normalized(power: str) -> Module:
    return module_of(f"""
        g (float[n, 8] x) => (float[n, 8] y)
        <float two = {{2}}, float eps = {{1e-5}}, float low = {{-3.4028234663852886e38}},
         float one = {{1}}, int64[8] seen = {{1, 1, 1, 1, 1, 1, 1, 1}}> {{
            mean = ReduceMean<axes = [-1]>(x)
            centred = Sub(x, mean)
            square = {power}
            variance = ReduceMean<axes = [-1]>(square)
            shifted = Add(variance, eps)
            deviation = Sqrt(shifted)
            normal = Div(centred, deviation)
            ones = Cast<to = 1>(seen)
            masked = Sub(one, ones)
            mask = Mul(masked, low)
            y = Add(normal, mask)
        }}""")


def test_an_exponent_and_a_mask_do_not_excuse_a_difference() -> None:
    right = normalized("Pow(centred, two)")
    compare(right, normalized("Mul(centred, centred)"))
    wrong = right.clone()
    eps = wrong.graph.initializers["eps"]
    wrong.replace_initializer(eps, ir.Tensor(np.array(0.5, np.float32)))
    with pytest.raises(VerificationError, match="times its bound"):
        compare(right, wrong)


def test_infinite_inputs_stay_infinite() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    feed = {"x": np.array([-np.inf, np.inf], np.float32)}
    runs = {"y": -feed["x"]}

    class Runner:
        def __enter__(self) -> Runner:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, moved: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
            np.testing.assert_array_equal(moved["x"], feed["x"])
            return runs

    found = Sensitivity.measure(module, feed, runs, lambda _: Runner())
    assert found.movement["y"].tolist() == [0, 0]
