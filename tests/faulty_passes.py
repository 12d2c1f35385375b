"""Passes with one planted bug each, among rewrites that are legal: what reducing must find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lwc.core.module import Module
from lwc.core.walk import constant_tensor
from lwc.pipeline.passes import Pass, PassContext, PassResult


@dataclass(frozen=True)
class FoldScale(Pass):
    """Folds a scale into the weight before it; forgets that others may use the weight."""

    name: ClassVar[str] = "faulty-fold-scale"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        count = 0
        for node in list(module.graph):
            scale = None if node.op_type != "Mul" else constant_tensor(node.inputs[1])
            product = _maker(node, 0)
            if scale is None or product is None or product.op_type != "MatMul":
                continue
            weight = product.inputs[1]
            tensor = constant_tensor(weight)
            if (
                weight is None
                or tensor is None
                or scale.size != 1
                or len(product.outputs[0].uses()) != 1
            ):
                continue
            module.replace_initializer(weight, ir.Tensor(tensor.numpy() * scale.numpy()))
            _replace(node, product.outputs[0], module)
            count += 1
        return PassResult(count > 0, rewrites={"scale": count})


@dataclass(frozen=True)
class ReadAxis(Pass):
    """Reads the axis of every Softmax of a product; forgets that it may be left out."""

    name: ClassVar[str] = "faulty-read-axis"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        for node in module.graph:
            if node.op_type == "Softmax":
                maker = _maker(node, 0)
                if maker is not None and maker.op_type == "Mul":
                    node.attributes["axis"].as_int()
        return PassResult(False)


@dataclass(frozen=True)
class SpellSwish(Pass):
    """Writes x·sigmoid(x) as x / (1 + exp(-x)); forgets that others may use the sigmoid."""

    name: ClassVar[str] = "faulty-spell-swish"

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        count = 0
        one = module.add_initializer("one", np.array(1, np.float32))
        for node, sigmoid in _swishes(module):
            x = node.inputs[0]
            minus = ir.node("Neg", [x])
            power = ir.node("Exp", minus.outputs)
            total = ir.node("Add", [power.outputs[0], one])
            quotient = ir.node("Div", [x, total.outputs[0]])
            made = [minus, power, total, quotient]
            for each in made:
                each.outputs[0].name = module.fresh_name("swish")
            module.graph.insert_before(node, made)
            _replace(node, quotient.outputs[0], module)
            module.graph.remove(sigmoid)
            sigmoid.resize_inputs(0)
            count += 1
        return PassResult(True, rewrites={"swish": count})


@dataclass(frozen=True)
class SpellSoftmax(Pass):
    """Writes every Softmax as exp(x) / sum(exp(x)); sums along the wrong axis at one place.

    Attributes:
        at: What the name of the Softmax's output contains there.
    """

    name: ClassVar[str] = "faulty-spell-softmax"
    at: str = ""

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        count = 0
        for node in [node for node in module.graph if node.op_type == "Softmax"]:
            (old,) = node.outputs
            axis = node.attributes.get_int("axis", -1)
            wrong = self.at in (old.name or "")
            axes = module.add_initializer("axes", np.array([axis - wrong], np.int64))
            power = ir.node("Exp", [node.inputs[0]])
            total = ir.node("ReduceSum", [power.outputs[0], axes], attributes={"keepdims": 1})
            share = ir.node("Div", [power.outputs[0], total.outputs[0]])
            for each in (power, total, share):
                each.outputs[0].name = module.fresh_name("share")
            module.graph.insert_before(node, [power, total, share])
            _replace(node, share.outputs[0], module)
            count += 1
        return PassResult(count > 0, rewrites={"softmax": count})


def _swishes(module: Module) -> Iterator[tuple[ir.Node, ir.Node]]:
    for node in list(module.graph):
        sigmoid = _maker(node, 1) if node.op_type == "Mul" else None
        if sigmoid is not None and sigmoid.op_type == "Sigmoid":
            yield node, sigmoid


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.producer()


def _replace(node: ir.Node, value: ir.Value, module: Module) -> None:
    """Put `value` in the place of a node's output, with its name where it is a graph output."""
    (old,) = node.outputs
    if old.is_graph_output():
        old.name, value.name = module.fresh_name("old"), old.name
        value.type, value.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    module.graph.remove(node, safe=True)
