"""Linear operators with constant weights, seen alike: what scaling and shifting does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.weights import reading
from lwc.rewrite import Editor, Miss, attribute, use_count

__all__ = ["Linear", "LinearFolder", "linear_of"]

Array = np.ndarray[Any, Any]

_GROWTH = 0.005
"""Share of the weights' bytes that copies of shared weights may add."""


class Linear(NamedTuple):
    """A Conv, ConvTranspose, Gemm or MatMul with a constant right operand.

    Attributes:
        node: The operator.
        weight: Its weight.
        bias: Its constant bias, or None where it has none.
        groups: Convolution groups, 1 otherwise.
        outputs: Output channels.
        inputs: Input channels.
        rank: Rank of its input and output.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    groups: int
    outputs: int
    inputs: int
    rank: int

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in input and output."""
        return 1 if self.node.op_type in ("Conv", "ConvTranspose") else self.rank - 1


def linear_of(node: ir.Node | None, edit: Editor) -> Linear | Miss | None:
    """Read a node as a linear operator; Miss where only its bias or weight is in the way."""
    if node is None or node.domain or any(each.is_ref() for each in node.attributes.values()):
        return None
    op = node.op_type
    if op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight = node.inputs[1]
    tensor = edit.tensor(weight)
    if tensor is None or weight is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and edit.tensor(bias) is None:
        return Miss("its bias is computed", node)
    shape = tuple(tensor.shape.numpy())
    if op == "MatMul":
        rank = edit.rank(node.inputs[0])
        if rank is None or rank < 2 or len(shape) != 2:
            return None
        return Linear(node, weight, None, 1, shape[1], shape[0], rank)
    if op == "Gemm":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
            return None
        outputs, inputs = shape if attribute(node, "transB", 0) else (shape[1], shape[0])
        if bias is not None and not _row(edit.shape(bias), outputs):
            return Miss("its bias varies by row", node)
        return Linear(node, weight, bias, 1, outputs, inputs, 2)
    groups = attribute(node, "group", 1)
    if op == "Conv":
        return Linear(node, weight, bias, groups, shape[0], shape[1] * groups, len(shape))
    return Linear(node, weight, bias, groups, shape[1] * groups, shape[0], len(shape))


def _row(shape: Sequence[Any] | None, outputs: int) -> bool:
    if shape is None or any(not isinstance(dim, int) for dim in shape):
        return False
    return all(dim == 1 for dim in shape[:-1]) and (not shape or shape[-1] in (1, outputs))


class LinearFolder:
    """Makes the new weights, within a budget for copies of shared ones.

    Args:
        edit: The editor.
        weight_bytes: Bytes of all weights of the module.
    """

    def __init__(self, edit: Editor, weight_bytes: int) -> None:
        self._edit = edit
        self._budget = int(weight_bytes * _GROWTH)

    def objection(self, linear: Linear) -> Miss | None:
        """Say why the weight may not be rewritten; counts a copy of a shared one as made."""
        tensor = self._edit.tensor(linear.weight)
        assert tensor is not None
        if use_count(linear.weight) == 1 and not linear.weight.is_graph_output():
            return None
        if tensor.nbytes > self._budget:
            return Miss("its weight is shared: a scaled copy would let the file grow", linear.node)
        self._budget -= tensor.nbytes
        return None

    def scale_outputs(self, linear: Linear, scale: Array) -> Array:
        """Return the weight with output channel i times `scale[i]`, in float64."""
        weight, op = self._read(linear.weight), linear.node.op_type
        if scale.size == 1:
            return weight * scale.reshape(())
        if op == "MatMul" or (op == "Gemm" and not attribute(linear.node, "transB", 0)):
            return weight * scale
        if op == "ConvTranspose":
            # [inputs, outputs / groups, ...]: group g holds its own slice of both.
            grouped = weight.reshape(linear.groups, -1, *weight.shape[1:])
            factors = scale.reshape(linear.groups, 1, -1, *([1] * (weight.ndim - 2)))
            return (grouped * factors).reshape(weight.shape)
        return weight * scale.reshape(-1, *([1] * (weight.ndim - 1)))

    def scale_inputs(self, linear: Linear, scale: Array) -> Array:
        """Return the weight with input channel i times `scale[i]`, in float64."""
        weight, op = self._read(linear.weight), linear.node.op_type
        if scale.size == 1:
            return weight * scale.reshape(())
        if op in ("ConvTranspose", "MatMul"):
            return weight * scale.reshape(-1, *([1] * (weight.ndim - 1)))
        if op == "Gemm":
            return weight * (scale if attribute(linear.node, "transB", 0) else scale[:, None])
        grouped = weight.reshape(linear.groups, -1, *weight.shape[1:])
        factors = scale.reshape(linear.groups, 1, -1, *([1] * (weight.ndim - 2)))
        return (grouped * factors).reshape(weight.shape)

    def response(self, linear: Linear, shift: Array) -> Array:
        """Return what a constant input `shift[i]` on channel i adds to each output, in float64.

        Only for operators that see the constant everywhere: no padding.
        """
        full = np.broadcast_to(shift, (linear.inputs,))
        weight = self.scale_inputs(linear, np.ascontiguousarray(full))
        op = linear.node.op_type
        if op == "MatMul" or (op == "Gemm" and not attribute(linear.node, "transB", 0)):
            return np.asarray(weight.sum(axis=0))
        return np.asarray(weight.reshape(linear.outputs, -1).sum(axis=1))

    def bias(self, linear: Linear) -> Array:
        """Return the bias `[outputs]` in float64, zeros where there is none; Gemm's times beta."""
        if linear.bias is None:
            return np.zeros(linear.outputs)
        bias = np.broadcast_to(self._read(linear.bias).ravel(), (linear.outputs,))
        beta: float = attribute(linear.node, "beta", 1.0)
        return bias * beta

    def rebuild(
        self,
        linear: Linear,
        source: ir.Value,
        weight: Array | None,
        bias: Array | None,
    ) -> ir.Value | Miss:
        """Make the operator anew before the root.

        Args:
            linear: What it is made from.
            source: Its data input.
            weight: The new weight, or None to keep the old one.
            bias: The new bias `[outputs]`, or None to keep the old one.
        """
        edit, node = self._edit, linear.node
        dtype = edit.dtype(linear.weight)
        assert dtype is not None
        arrays = {"weight": weight, "bias": bias}
        rounded: dict[str, Array] = {}
        for name, array in arrays.items():
            if array is None:
                continue
            with np.errstate(over="ignore"):
                rounded[name] = array.astype(dtype.numpy())
            if not np.all(np.isfinite(rounded[name].astype(np.float32))):
                return Miss(f"the folded {name} leaves the range of {dtype.name.lower()}", node)
        new_weight = linear.weight
        if weight is not None:
            new_weight = self._store(rounded["weight"], linear.weight)
        inputs: list[ir.Value | None] = [source, new_weight]
        attributes: dict[str, Any] = dict(node.attributes.items())
        op = node.op_type
        if bias is None:
            inputs += list(node.inputs[2:])
        elif op == "MatMul":
            op = "Gemm"
            inputs.append(self._store(rounded["bias"], None))
        else:
            inputs.append(self._store(rounded["bias"], linear.bias))
            attributes.pop("beta", None)
        return edit.op(op, inputs, attributes)

    def _read(self, value: ir.Value) -> Array:
        tensor = self._edit.tensor(value)
        assert tensor is not None
        with reading(tensor) as array:
            return array.astype(np.float64)

    def _store(self, array: Array, old: ir.Value | None) -> ir.Value:
        name = old.name if old is not None and old.name else "bias"
        content = ir.Tensor(np.ascontiguousarray(array))
        return self._edit.constant(self._edit.module.spilled(content), name)
