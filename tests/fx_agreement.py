"""What tests of the fx backend share: a module in PyTorch beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from support import module_of, run_plain

from lwc.backends.fx.session import FxBackend
from lwc.core.module import Module

Array = np.ndarray[Any, Any]

RTOL, ATOL = 1e-4, 1e-5
"""float32 through a few operators: sums of a hundred terms in another order."""


def one_node(
    op: str,
    inputs: Mapping[str, Any],
    *,
    domain: str = "",
    opset: int = 21,
    outputs: int = 1,
    constant: Sequence[str] = (),
    **attributes: Any,
) -> tuple[Module, dict[str, Array]]:
    """Make a module of one node, and the feed of its inputs that are not constant."""
    values: list[ir.Value | None] = []
    fed: dict[str, Array] = {}
    initializers = []
    for name, given in inputs.items():
        if given is None:
            values.append(None)
            continue
        array = np.asarray(given)
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.tensor(array).dtype),
            shape=ir.Shape(array.shape),
        )
        values.append(value)
        if name in constant:
            value.const_value = ir.tensor(array, name=name)
            initializers.append(value)
        else:
            fed[name] = array
    made = [ir.Value(name=f"y{index}") for index in range(outputs)]
    node = ir.Node(
        domain, op, values, ir.convenience.convert_attributes(attributes), name="n", outputs=made
    )
    graph = ir.Graph(
        [value for value in values if value is not None and value.name in fed],
        made,
        nodes=[node],
        initializers=initializers,
        opset_imports={"": opset, **({domain: 1} if domain else {})},
        name="g",
    )
    return Module(ir.Model(graph, ir_version=10)), fed


def run_fx(module: Module, feed: Mapping[str, Any]) -> list[Any]:
    """Run a module in PyTorch and return its outputs."""
    with FxBackend().compile(module, threads=1) as executable:
        return list(executable.run(dict(feed)).values())


def assert_agrees(
    module: Module, feed: Mapping[str, Any], rtol: float = RTOL, atol: float = ATOL
) -> list[Any]:
    """Check that PyTorch gives what ONNX Runtime does; return what that is."""
    wanted, found = run_plain(module, feed), run_fx(module, feed)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        compare(a, b, rtol, atol)
    return wanted


def compare(a: Any, b: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
    """Check that arrays, or lists of them, agree in type, shape and content."""
    if isinstance(b, list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            compare(left, right, rtol, atol)
        return
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if b.dtype.kind == "f":
        np.testing.assert_allclose(a, b, rtol, atol)
    else:
        np.testing.assert_array_equal(a, b)


def parsed(text: str) -> Module:
    """Read a whole model in ONNX's text format."""
    return Module(ir.from_proto(onnx.parser.parse_model(text)))


MLP = """g (float[n, 4] x) => (float[n, 2] y)
    <float[4, 3] w = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3] bias = {1,2,3},
     float half = {0.5}, int64[1] axes = {1}, int64[1] out = {3}>
    {
        a = MatMul(x, w) b = Add(a, bias) c = Mul(b, half) d = Relu(c)
        y = Slice(d, axes, out, axes)
    }"""


def mlp() -> Module:
    """A small module whose nodes and first weight have names that Python does not allow."""
    module = module_of(MLP)
    for node, name in zip(
        module.graph, ("/enc/MatMul", "add it", "", "Relu", "/Relu"), strict=True
    ):
        node.name = name
    return renamed(module, "w", "encoder.dense.weight")


def renamed(module: Module, old: str, new: str) -> Module:
    """Rename an initializer."""
    value = module.graph.initializers.pop(old)
    value.name = new
    module.graph.register_initializer(value)
    return module
