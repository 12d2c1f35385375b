"""The bias of a norm goes into the linear layers that read the norm."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.walk import constant_tensor, op_name
from lwc.core.weights import reading
from lwc.passes.quantization.channel_places import Place, given_input, row
from lwc.passes.quantization.residual_stream import Stream
from lwc.passes.quantization.token_operators import NORMS
from lwc.rewrite import Editor, attribute

__all__ = ["absorb_biases"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def absorb_biases(stream: Stream, edit: Editor) -> bool:
    """Move the biases of a stream's norms into the linear layers behind; tell whether any moved."""
    rows = {norm: _bias(norm, stream.width) for norm in stream.norms}
    if all(bias is None for bias in rows.values()):
        return False
    for read in stream.reads:
        bias = None if read.norm is None else rows[read.norm]
        if bias is not None and bias.any():
            _add_to_result(read.place, bias, edit)
    for norm, bias in rows.items():
        place = NORMS[op_name(norm)].bias
        if bias is not None and place is not None:
            edit.set_input(norm, place, None)
    return True


def _bias(norm: ir.Node, width: int) -> Array | None:
    return row(given_input(norm, NORMS[op_name(norm)].bias), width)


def _add_to_result(place: Place, bias: Array, edit: Editor) -> None:
    """Add `bias @ weight` to what a linear layer gives."""
    node = place.node
    tensor = constant_tensor(place.source)
    assert tensor is not None
    with reading(tensor) as array:
        added = _times(bias, np.moveaxis(array, place.axis, 0))
    dtype = edit.dtype(node.outputs[0]) or tensor.dtype
    edit.at(node)
    if node.op_type == "Gemm" and _into_gemm(node, added, dtype, edit):
        return
    result = node.outputs[0]
    behind = _sum_behind(result, len(added), edit)
    if behind is not None:
        sum_, index = behind
        old = row(sum_.inputs[index], len(added))
        assert old is not None
        edit.set_input(sum_, index, _constant(old + added, dtype, "bias", edit))
        return
    attributes = {key: each.value for key, each in node.attributes.items()}
    again = edit.op(node.op_type, list(node.inputs), attributes)
    edit.replace(result, edit.op("Add", [again, _constant(added, dtype, "bias", edit)]))
    edit.erase(node)


def _times(bias: Array, weight: Array) -> Array:
    """Return `bias @ weight` in float64, a few rows at a time."""
    total = np.zeros(weight.shape[1])
    step = max(1, (1 << 21) // weight.shape[1])
    for start in range(0, len(weight), step):
        total += bias[start : start + step] @ weight[start : start + step].astype(np.float64)
    return total


def _into_gemm(node: ir.Node, added: Array, dtype: ir.DataType, edit: Editor) -> bool:
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    old = np.zeros(len(added)) if given is None else row(given, len(added))
    if old is None or beta == 0:
        return False
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    edit.set_input(node, 2, _constant(old + added * (alpha / beta), dtype, "bias", edit))
    return True


def _sum_behind(value: ir.Value, width: int, edit: Editor) -> tuple[ir.Node, int] | None:
    """Return the sum with a constant row that alone reads a value, and the place of the row."""
    if not edit.single_use(value):
        return None
    (use,) = value.uses()
    if op_name(use.node) != "Add" or use.node.graph is not edit.module.graph:
        return None
    other = use.node.inputs[1 - use.idx]
    if row(other, width) is None or not edit.same_shape(value, use.node.outputs[0]):
        return None
    return use.node, 1 - use.idx


def _constant(content: Array, dtype: ir.DataType, name: str, edit: Editor) -> ir.Value:
    return edit.constant(content.astype(dtype.numpy()), name)
