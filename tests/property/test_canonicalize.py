"""canonicalize and fold-linear keep the meaning of random graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support import run_pass_to_the_end, run_plain

from lwc.core.module import Module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear

WIDTH = 4
EXTENTS = ((2, 3), (1, 5))
UNARY = ("Relu", "Neg", "Abs", "Identity", "Tanh", "Sigmoid")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
CONSTANTS = (0.0, 1.0, -0.0, 2.0, 0.5)


class Builder:
    """Grows a graph whose every value is float32 [N, S, 4], in many roundabout ways."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values = ["x", "z"]

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, array: Any, dtype: type = np.int64) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(array, dtype=dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        seed = self.draw(st.integers(0, 3))
        return self.constant(np.random.default_rng(seed).standard_normal(shape), np.float32)

    def value(self) -> str:
        return str(self.draw(st.sampled_from(self.values)))

    def step(self) -> None:
        kind = self.draw(st.sampled_from(STEPS))
        self.values.append(kind(self))

    def unary(self) -> str:
        return self.emit(self.draw(st.sampled_from(UNARY)), self.value())

    def binary(self) -> str:
        return self.emit(self.draw(st.sampled_from(BINARY)), self.value(), self.value())

    def with_constant(self) -> str:
        shape = self.draw(st.sampled_from([(), (1,), (WIDTH,), (1, 1, WIDTH)]))
        number = self.draw(st.sampled_from(CONSTANTS))
        c = self.constant(np.full(shape, number), np.float32)
        return self.emit(self.draw(st.sampled_from(BINARY)), self.value(), c)

    def linear(self) -> str:
        product = self.emit("MatMul", self.value(), self.weight(WIDTH, WIDTH))
        return self.emit("Add", product, self.weight(WIDTH))

    def there_and_back(self) -> str:
        perm = list(self.draw(st.permutations(range(3))))
        back = [perm.index(axis) for axis in range(3)]
        moved = self.emit("Transpose", self.value(), perm=perm)
        return self.emit("Transpose", self.emit("Neg", moved), perm=back)

    def computed_reshape(self) -> str:
        source = self.value()
        shape = self.emit("Shape", self.value())
        parts = [self.emit("Gather", shape, self.constant([axis])) for axis in (0, 1)]
        split = self.emit("Concat", *parts, self.constant([2, WIDTH // 2]), axis=0)
        folded = self.emit("Relu", self.emit("Reshape", source, split))
        return self.emit("Reshape", folded, shape)

    def unsqueezed(self) -> str:
        axis = self.constant([self.draw(st.integers(0, 3))])
        return self.emit("Squeeze", self.emit("Unsqueeze", self.value(), axis), axis)

    def halves(self) -> str:
        cut = self.constant([self.draw(st.integers(1, WIDTH - 1))])
        begin, end, axis = self.constant([0]), self.constant([2**62]), self.constant([2])
        source = self.value()
        first = self.emit("Slice", source, begin, cut, axis)
        second = self.emit("Slice", source, cut, end, axis)
        order = (first, second) if self.draw(st.booleans()) else (second, first)
        return self.emit("Concat", *order, axis=-1)

    def expanded(self) -> str:
        shape = self.emit("Shape", self.value())
        wide = self.emit("Expand", self.weight(1, 1, WIDTH), shape)
        return self.emit("Add", self.value(), wide)

    def filled(self) -> str:
        fill = numpy_helper.from_array(
            np.array([self.draw(st.sampled_from(CONSTANTS))], np.float32)
        )
        made = self.emit("ConstantOfShape", self.emit("Shape", self.value()), value=fill)
        return self.emit("Mul", self.value(), made)

    def branch(self) -> str:
        rank = self.emit("Size", self.emit("Shape", self.value()))
        chosen = self.emit("Equal", rank, self.constant(self.draw(st.sampled_from([2, 3]))))
        bodies = []
        for op in ("Exp", "Neg"):
            inner = f"b{len(self.nodes)}{op}"
            info = helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)
            node = helper.make_node(op, [self.value()], [inner])
            bodies.append(helper.make_graph([node], op, [], [info]))
        return self.emit(
            "Tanh", self.emit("If", chosen, then_branch=bodies[0], else_branch=bodies[1])
        )

    def model(self) -> onnx.ModelProto:
        dims: list[str | int | None] = ["N", "S", WIDTH]
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n in ("x", "z")]
        made = [name for name in self.values if name not in ("x", "z")]
        names = dict.fromkeys([made[-1], self.draw(st.sampled_from(made))])
        outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n in names]
        graph = helper.make_graph(self.nodes, "random", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


STEPS = (
    Builder.unary,
    Builder.binary,
    Builder.with_constant,
    Builder.linear,
    Builder.there_and_back,
    Builder.computed_reshape,
    Builder.unsqueezed,
    Builder.halves,
    Builder.expanded,
    Builder.filled,
    Builder.branch,
)


@st.composite
def models(draw: Any) -> onnx.ModelProto:
    builder = Builder(draw)
    for _ in range(draw(st.integers(2, 10))):
        builder.step()
    return builder.model()


@settings(
    max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(models())
def test_random_graphs_keep_their_meaning(model: onnx.ModelProto) -> None:
    module = Module(ir.from_proto(model))
    count = sum(1 for _ in module.nodes())
    for each in (Canonicalize(), FoldLinear()):
        run_pass_to_the_end(each, module)
    assert sum(1 for _ in module.nodes()) <= count
    for seed, (n, s) in enumerate(EXTENTS):
        random = np.random.default_rng(seed)
        feed = {name: random.standard_normal((n, s, WIDTH)).astype(np.float32) for name in "xz"}
        for found, wanted in zip(run_plain(module, feed), run_plain(model, feed), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
