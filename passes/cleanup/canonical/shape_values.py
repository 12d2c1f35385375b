"""Shape computations: contents the shape analysis knows need not be computed."""

from __future__ import annotations

from functools import reduce

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim, DimShape
from lwc.rewrite import ANY, EDITED, Editor, Outcome, Rule, producer_of, rule

__all__ = ["RULES"]

_INTEGRAL = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
_ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Pow", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "And", "Or", "Xor", "Where", "Max", "Min", "Mod",
)  # fmt: skip


@rule(ANY)
def known_content(node: ir.Node, edit: Editor) -> Outcome:
    """A small integer tensor whose every element follows from shapes: a constant."""
    if len(node.outputs) != 1 or node.op_type == "Constant":
        return None
    value = node.outputs[0]
    known = edit.shapes.known(value)
    if known is None or edit.dtype(value) not in _INTEGRAL:
        return None
    if not all(isinstance(each, int | np.integer) for each in known.ravel()):
        return None
    if node.op_type == "Identity" and edit.tensor(node.inputs[0]) is not None:
        return None
    dtype = edit.dtype(value)
    assert dtype is not None
    return edit.constant(np.array(known.tolist(), dtype=dtype.numpy()).reshape(known.shape))


@rule("Expand")
def constant_expand_target(node: ir.Node, edit: Editor) -> Outcome:
    """A computed target of Expand where it asks for numbers and for extents that are there."""
    if edit.tensor(node.inputs[1]) is not None:
        return None
    wanted = edit.symbolic(node.inputs[1])
    source = edit.shape(node.inputs[0])
    if wanted is None or source is None:
        return None
    target = []
    lead = len(wanted) - len(source)
    for index, dim in enumerate(wanted):
        if isinstance(dim, int):
            target.append(dim)
        elif index >= lead and edit.same_dim(source[index - lead], dim):
            target.append(1)
        else:
            return None
    edit.set_input(node, 1, edit.constant(target, "shape"))
    return EDITED


@rule(*_ELEMENTWISE)
def implicit_broadcast(node: ir.Node, edit: Editor) -> Outcome:
    """An operand expanded or filled by hand that broadcasting expands by itself."""
    result = edit.shape(node.outputs[0])
    if result is None:
        return None
    for index, value in enumerate(node.inputs):
        producer = producer_of(value, "Expand", "ConstantOfShape")
        if producer is None:
            continue
        expands = producer.op_type == "Expand"
        shape = edit.shape(producer.inputs[0]) if expands else ()
        others = [edit.shape(each) for i, each in enumerate(node.inputs) if i != index]
        if shape is None or not _broadcasts_to([shape, *others], result, edit):
            continue
        if expands:
            plain = producer.inputs[0]
        else:
            fill = producer.attributes.get("value")
            scalar = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
            plain = edit.constant(scalar.reshape(()))
        edit.set_input(node, index, plain)
        return EDITED
    return None


def _broadcasts_to(shapes: list[DimShape | None], result: DimShape, edit: Editor) -> bool:
    """Tell whether the shapes provably broadcast to exactly `result`."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes) or max(map(len, known), default=0) != len(result):
        return False
    for back in range(1, len(result) + 1):
        dims = [shape[-back] for shape in known if len(shape) >= back]
        extent = reduce(_wider, dims, 1)
        if not edit.same_dim(extent, result[-back]):
            return False
        if not all(_is_one(dim) or edit.same_dim(dim, extent) for dim in dims):
            return False
    return True


def _wider(a: Dim, b: Dim) -> Dim:
    return b if _is_one(a) else a


def _is_one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


RULES: tuple[Rule, ...] = (known_content, constant_expand_target, implicit_broadcast)
