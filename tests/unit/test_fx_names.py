"""Lowered modules whose values have names that Python does not allow, or that clash."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

import torch
from fx_agreement import assert_agrees
from support import module_of

import lwc


def test_names_that_are_no_identifiers() -> None:
    module = module_of("g (float[2] a, float[2] b) => (float[2] c) { c = Sub(a, b) }")
    values = [*module.graph.inputs, *module.graph.outputs]
    for value, name in zip(values, ("0", "in:put", "lambda"), strict=True):
        value.name = name
    lowered = lwc.to_fx(module)
    assert [node.name for node in lowered.graph.nodes][:3] == ["_0", "in_put", "lambda_"]
    assert lowered(torch.ones(2), torch.zeros(2)).tolist() == [1, 1]
    assert lowered.meta["lwc"]["inputs"] == ["0", "in:put"]


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ("a.b", "a_b", "a/b"),
        ("input", "input_1", "y"),  # FX calls the node of the first as the second
        ("self", "x", "y"),
        ("x", "y", "self"),
        ("torch", "x", "math"),
        ("_", "__", "é"),
        ("None", "True", "getattr"),
    ],
)
def test_names_of_inputs_that_clash(a: str, b: str, c: str) -> None:
    module = module_of("g (float[2] a, float[2] b) => (float[2] y) { c = Sub(a, b) y = Mul(c, a) }")
    values = [*module.graph.inputs, next(iter(module.graph)).outputs[0]]
    for value, name in zip(values, (a, b, c), strict=True):
        value.name = name
    lowered = lwc.to_fx(module)
    assert lowered(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])).tolist() == [6, 15]


@pytest.mark.parametrize("name", ["inf", "nan", "getattr", "torch"])
def test_inputs_called_as_what_the_code_reads(name: str) -> None:
    module = module_of(
        """g (float[2] x) => (float[2] y) <float[2] w = {2, 4}> { a = Mul(x, w)
        b = LeakyRelu <alpha = 1.5> (a) y = LeakyRelu <alpha = 0.5> (b) }"""
    )
    for node, alpha in zip(list(module.graph)[1:], (math.inf, math.nan), strict=True):
        node.attributes["alpha"] = ir.AttrFloat32("alpha", alpha)
    module.graph.inputs[0].name = name
    module.graph.initializers["w"].name = "1"  # which is read by `getattr`
    assert lwc.to_fx(module)(torch.tensor([3.0, 5.0])).tolist() == [6, 20]


@pytest.mark.parametrize("branch", [True, False])
def test_names_inside_of_branches_that_clash(branch: bool) -> None:
    module = module_of(
        """g (float[2] x, float[2] y, bool c) => (float[2] r) {
        r = If(c) <then_branch = t () => (float[2] p) { p = Sub(x, y) },
                   else_branch = e () => (float[2] q) { q = Sub(y, x) }> }"""
    )
    for value, name in zip(module.graph.inputs, ("input", "input_1"), strict=False):
        value.name = name
    x, y = np.array([5, 7], np.float32), np.array([1, 2], np.float32)
    assert_agrees(module, {"input": x, "input_1": y, "c": np.array(branch)})
