"""A module that is being changed in small ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.core.module import Module
from lwc.verify.generate.choices import Choices

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

__all__ = ["FLOAT", "INT64", "Mutant"]

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class Mutant(Choices):
    """A module that is being changed, with what is known of its values before the change.

    Args:
        draw: What `hypothesis.strategies.composite` hands in.
        source: See `Choices`.
        module: Changed in place.
    """

    def __init__(self, draw: DrawFn, module: Module, source: random.Random | None = None) -> None:
        super().__init__(draw, source)
        self.module = module
        self.shapes = Shapes.build(module)

    def node(
        self, fits: Callable[[ir.Node], object] = bool, *, inner: bool = False
    ) -> ir.Node | None:
        """Draw a node of the main graph, or any node, that fits; the last ones are simplest."""
        found = list(self.module.nodes() if inner else self.module.graph)
        found = [node for node in found if fits is bool or fits(node)]
        return self.choose(*reversed(found)) if found else None

    def value(self, fits: Callable[[ir.Value], object] = bool) -> ir.Value | None:
        """Draw a tensor that a node of the main graph makes and another one reads."""
        found = [
            value
            for node in self.module.graph
            if node.op_type != "Constant"
            for value in node.outputs
            if value.uses() and self.shapes.dtype(value) is not None
            if fits is bool or fits(value)
        ]
        return self.choose(*reversed(found)) if found else None

    def use(self, fits: Callable[[ir.Node, int], object]) -> tuple[ir.Node, int] | None:
        """Draw a place where a node of the main graph reads a value."""
        found = [
            (node, index)
            for node in self.module.graph
            for index, value in enumerate(node.inputs)
            if value is not None and fits(node, index)
        ]
        return self.choose(*reversed(found)) if found else None

    def insert(
        self, before: ir.Node, op: str, *inputs: ir.Value | None, **attributes: Any
    ) -> ir.Value:
        """Add a node before another one and return its output."""
        node = self._node(op, inputs, attributes)
        assert before.graph is not None
        before.graph.insert_before(before, node)
        return node.outputs[0]

    def append(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node at the end of the main graph and return its output."""
        node = self._node(op, inputs, attributes)
        self.module.graph.append(node)
        return node.outputs[0]

    def _node(self, op: str, inputs: Any, attributes: dict[str, Any]) -> ir.Node:
        node = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes))
        node.name = self.module.fresh_name(f"{op.lower()}_node")
        node.outputs[0].name = self.module.fresh_name(op.lower())
        return node

    def put(self, node: ir.Node, index: int, array: np.ndarray[Any, Any]) -> None:
        """Give a node another constant, for this use of it or for all."""
        old = node.inputs[index]
        assert old is not None
        new = self.module.add_initializer(old.name or "constant", array)
        if self.flip():
            for user, place in list(old.uses()):
                user.replace_input_with(place, new)
        else:
            node.replace_input_with(index, new)
