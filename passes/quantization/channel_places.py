"""Values and constants whose last axis are channels."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.walk import constant_tensor
from lwc.core.weights import reading
from lwc.rewrite import Editor, attribute, producer_of

__all__ = ["FLOATS", "Place", "channels_of", "constant_place", "given_input", "row"]

Array: TypeAlias = "np.ndarray[Any, Any]"

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


class Place(NamedTuple):
    """A constant with an axis of channels, where a node reads it.

    Attributes:
        node: The node.
        operand: Which of its inputs.
        source: The constant, which `node` may read through other nodes.
        steps: Those, from the constant on: Transpose, Cast and Identity.
        axis: The axis of `source` that has the channels.
    """

    node: ir.Node
    operand: int
    source: ir.Value
    steps: tuple[ir.Node, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the constant."""
        tensor = constant_tensor(self.source)
        assert tensor is not None
        return tuple(tensor.shape.numpy())


def constant_place(node: ir.Node, operand: int, axis: int) -> Place | None:
    """Return the floating-point constant at an input, its channels along `axis` of the input."""
    value = node.inputs[operand] if operand < len(node.inputs) else None
    steps: list[ir.Node] = []
    while value is not None and constant_tensor(value) is None:
        above = producer_of(value, "Transpose", "Cast", "Identity")
        if above is None or (above.op_type == "Cast" and attribute(above, "to") not in FLOATS):
            return None
        steps.insert(0, above)
        value = above.inputs[0]
    tensor = constant_tensor(value)
    if value is None or tensor is None or tensor.dtype not in FLOATS or not len(tensor.shape):
        return None
    axes = list(range(len(tensor.shape)))
    for step in steps:
        if step.op_type == "Transpose":
            axes = [axes[index] for index in attribute(step, "perm", axes[::-1])]
    return Place(node, operand, value, tuple(steps), axes[axis])


def given_input(node: ir.Node, place: int | None) -> ir.Value | None:
    """Return an input, None where it is absent."""
    return None if place is None or place >= len(node.inputs) else node.inputs[place]


def row(value: ir.Value | None, width: int) -> Array | None:
    """Return a constant with a number for each channel and nothing else, in float64."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype not in FLOATS or tensor.size != width:
        return None
    if tensor.shape.numpy()[-1] != width:
        return None
    with reading(tensor) as array:
        return array.astype(np.float64).reshape(width)


def channels_of(value: ir.Value | None, edit: Editor) -> int | None:
    """Return the extent of the last axis of a floating-point value."""
    shape = edit.shape(value)
    if not shape or not isinstance(shape[-1], int) or edit.dtype(value) not in FLOATS:
        return None
    return shape[-1]
