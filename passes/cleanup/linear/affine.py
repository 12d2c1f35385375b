"""Affine maps along one axis: what Add, Mul and BatchNormalization with constants compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.weights import reading
from lwc.rewrite import Editor, attribute, use_count

__all__ = ["AFFINE_OPS", "Affine", "affine_of"]

Vector = np.ndarray[Any, np.dtype[np.float64]]

AFFINE_OPS = ("Add", "Sub", "Mul", "Div", "BatchNormalization")
_FLOATS = {
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
}
_LIMIT = 1 << 24


class Affine(NamedTuple):
    """y = x * scale + shift, per element of one axis of x.

    Attributes:
        source: x.
        scale: float64 `[channels]`, or `[1]` where it is the same for all.
        shift: float64, likewise.
        axis: The axis, counted from the front; None where scale and shift are single numbers.
    """

    source: ir.Value
    scale: Vector
    shift: Vector
    axis: int | None


def affine_of(node: ir.Node, edit: Editor) -> Affine | None:
    """Read a node as an affine map of one of its inputs, or return None.

    The map never widens its input: a constant of higher rank, or one that varies along more
    than one axis, is none.
    """
    if node.domain or not node.inputs or edit.dtype(node.inputs[0]) not in _FLOATS:
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(node, edit)
    if node.op_type not in AFFINE_OPS or len(node.inputs) != 2:
        return None
    for index in (1, 0):
        constant, source = node.inputs[index], node.inputs[1 - index]
        tensor = edit.tensor(constant)
        if tensor is None or source is None or tensor.nbytes > _LIMIT:
            continue
        rank = edit.rank(source)
        if rank is None or len(tensor.shape) > rank:
            return None
        shape = (1,) * (rank - len(tensor.shape)) + tuple(tensor.shape.numpy())
        wide = [axis for axis, extent in enumerate(shape) if extent != 1]
        if len(wide) > 1:
            return None
        axis = wide[0] if wide else None
        if axis is not None:
            dims = edit.shape(source)
            assert dims is not None
            if not edit.same_dim(dims[axis], shape[axis]):
                return None
        with reading(tensor) as array:
            c = array.astype(np.float64).ravel()
        one, zero = np.ones(1), np.zeros(1)
        op = node.op_type
        if op == "Mul":
            return Affine(source, c, zero, axis)
        if op == "Add":
            return Affine(source, one, c, axis)
        if op == "Sub":
            return Affine(source, one, -c, axis) if index else Affine(source, -one, c, axis)
        if op == "Div" and index and np.all(c):
            return Affine(source, 1.0 / c, zero, axis)
        return None
    return None


def _batch_norm(node: ir.Node, edit: Editor) -> Affine | None:
    """Inference mode: y = (x - mean) / sqrt(variance + epsilon) * scale + bias on axis 1."""
    if attribute(node, "training_mode", 0) or any(
        use_count(value) or value.is_graph_output() for value in node.outputs[1:]
    ):
        return None
    source = node.inputs[0]
    parameters = []
    for value in node.inputs[1:5]:
        tensor = edit.tensor(value)
        if tensor is None:
            return None
        with reading(tensor) as array:
            parameters.append(array.astype(np.float64))
    if source is None or len(parameters) != 4:
        return None
    gamma, beta, mean, variance = parameters
    epsilon = attribute(node, "epsilon", float(np.float32(1e-5)))  # attributes are float32
    scale = gamma / np.sqrt(variance + epsilon)
    return Affine(source, scale, beta - mean * scale, 1)
