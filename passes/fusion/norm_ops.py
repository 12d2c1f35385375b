"""The norm operators: reading them, writing them, and what they take over from around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.walk import is_default_domain
from lwc.core.weights import reading
from lwc.passes.fusion.norm_parts import Kind, SpelledNorm
from lwc.passes.fusion.pieces import orders
from lwc.rewrite import Editor, Miss, attribute, producer_of, use_count

__all__ = [
    "Form",
    "NormOp",
    "absorb_bias",
    "absorb_cast",
    "absorb_weight",
    "goes_on",
    "norm_op",
    "with_bias",
    "with_weight",
    "without_casts",
    "write_norm",
]

Form: TypeAlias = Literal["auto", "standard", "contrib"]

Array = np.ndarray[Any, Any]

_KINDS: dict[str, Kind] = {
    "LayerNormalization": "layer",
    "SimplifiedLayerNormalization": "rms",
    "RMSNormalization": "rms",
}
_LAYER_OPSET, _RMS_OPSET = 17, 23
"""ONNX Runtime has LayerNormalization and SimplifiedLayerNormalization at any opset."""

_ROW_BYTES = 1 << 24


class NormOp(NamedTuple):
    """A norm operator of which only the first output is read.

    Attributes:
        node: The node.
        kind: `layer` or `rms`.
        source: What it normalizes.
        scale: Its weight.
        bias: Its bias, if any.
        axes: How many last axes it normalizes over.
        epsilon: The number added to the variance.
    """

    node: ir.Node
    kind: Kind
    source: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    axes: int
    epsilon: float


def norm_op(node: ir.Node | None, edit: Editor) -> NormOp | None:
    """Read a node as one of the norm operators."""
    kind = None if node is None else _KINDS.get(node.op_type)
    if node is None or kind is None or not is_default_domain(node) or len(node.inputs) < 2:
        return None
    if any(each.is_ref() for each in node.attributes.values()):
        return None
    if any(use_count(value) or value.is_graph_output() for value in node.outputs[1:]):
        return None
    source, scale = node.inputs[:2]
    rank = edit.rank(source)
    if source is None or scale is None or rank is None or attribute(node, "stash_type", 1) != 1:
        return None
    axis = attribute(node, "axis", -1)
    axes = -axis if axis < 0 else rank - axis
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return NormOp(node, kind, source, scale, bias, axes, attribute(node, "epsilon", 1e-5))


def write_norm(found: SpelledNorm, node: ir.Node, form: Form, edit: Editor) -> ir.Value | Miss:
    """Make the operator of a norm that is spelled out and return its output."""
    shape, opset = edit.shape(found.source), edit.opset(node)
    assert shape is not None
    dims = [int(dim) for dim in shape[-found.axes :] if isinstance(dim, int)]
    if found.kind == "layer":
        op, since = "LayerNormalization", _LAYER_OPSET
    else:
        new = opset >= _RMS_OPSET and form != "contrib"
        op, since = ("RMSNormalization" if new else "SimplifiedLayerNormalization"), _RMS_OPSET
    if form == "standard" and opset < since:
        return Miss(f"the standard has an operator for it from opset {since} on, this is {opset}")
    for value, what in ((found.weight, "weight"), (found.bias, "bias")):
        if value is not None and not _fits(value, found.source, dims, edit):
            return Miss(f"the {what} does not vary along the normalized axes alone")
    if found.weight is None:
        scale = edit.constant(np.ones(dims, np.float32), "scale")
    else:
        scale = _row(found.weight, dims, edit)
    inputs = [found.source, scale]
    if found.bias is not None:
        inputs.append(_row(found.bias, dims, edit))
    return edit.op(op, inputs, {"axis": -found.axes, "epsilon": found.epsilon})


# What stands after the operator


def absorb_weight(node: ir.Node, edit: Editor) -> tuple[NormOp, ir.Value] | Miss | None:
    """Find norm · weight, where the norm has a weight of ones and no bias."""
    for result, weight in orders(node):
        norm = _norm_before(result, node, edit)
        if norm is None or norm.bias is not None or not _is_ones(norm.scale, edit):
            continue
        dims = _extents(norm, edit)
        if dims is None or not edit.same_shape(norm.source, node.outputs[0]):
            return Miss("the factor widens the result", norm.node)
        if not _fits(weight, norm.source, dims, edit):
            return Miss("the factor does not vary along the normalized axes alone", norm.node)
        return norm, weight
    return None


def absorb_bias(node: ir.Node, edit: Editor) -> tuple[NormOp, ir.Value] | None:
    """Find norm + bias, where the norm has no bias and could have one."""
    for result, bias in orders(node):
        norm = _norm_before(result, node, edit)
        if norm is None or norm.bias is not None or norm.kind != "layer":
            continue
        dims = _extents(norm, edit)
        if dims is None or not edit.same_shape(norm.source, node.outputs[0]):
            continue
        if _fits(bias, norm.source, dims, edit):
            return norm, bias
    return None


def absorb_cast(node: ir.Node, edit: Editor) -> NormOp | Miss | None:
    """Find a norm in float32 of a half precision value, whose result becomes half again."""
    result = node.inputs[0]
    norm = _norm_before(result, node, edit) if result is not None else None
    if norm is None or attribute(node, "to") != ir.DataType.FLOAT16:
        return None
    if edit.dtype(norm.source) != ir.DataType.FLOAT or _before_cast(norm.source, edit) is None:
        return None
    for value, what in ((norm.scale, "weight"), (norm.bias, "bias")):
        if value is not None and not _is_half(value, edit):
            return Miss(f"its {what} is not exact in half precision", norm.node)
    return norm


def goes_on(norm: NormOp, edit: Editor) -> bool:
    """Tell whether the norm will still take over what stands after it."""
    looks = {"Mul": absorb_weight, "Add": absorb_bias, "Cast": absorb_cast}
    for user, _ in norm.node.outputs[0].uses():
        look = None if user.domain else looks.get(user.op_type)
        found = None if look is None else look(user, edit)
        if found is not None and not isinstance(found, Miss):
            return True
    return False


def with_weight(norm: NormOp, weight: ir.Value, edit: Editor) -> ir.Value:
    """Make a norm operator with another weight."""
    dims = _extents(norm, edit)
    assert dims is not None
    return _again(norm, [norm.source, _row(weight, dims, edit)], edit)


def with_bias(norm: NormOp, bias: ir.Value, edit: Editor) -> ir.Value:
    """Make a norm operator with a bias."""
    dims = _extents(norm, edit)
    assert dims is not None
    return _again(norm, [norm.source, norm.scale, _row(bias, dims, edit)], edit)


def without_casts(norm: NormOp, edit: Editor) -> ir.Value:
    """Make a norm operator that reads and gives half precision and computes in float32."""
    operands = [norm.source, norm.scale] + ([] if norm.bias is None else [norm.bias])
    return _again(norm, [_half(value, edit) for value in operands], edit)


def _again(norm: NormOp, inputs: Sequence[ir.Value], edit: Editor) -> ir.Value:
    return edit.op(norm.node.op_type, inputs, dict(norm.node.attributes.items()))


def _norm_before(value: ir.Value, node: ir.Node, edit: Editor) -> NormOp | None:
    """Return the norm that makes a value, where `node` alone reads it."""
    norm = norm_op(value.producer(), edit)
    if norm is None or norm.node.graph is not node.graph or not edit.single_use(value):
        return None
    return norm


def _extents(norm: NormOp, edit: Editor) -> list[int] | None:
    """Return the extents of the weight, where it has those of the normalized axes."""
    shape, scale = edit.shape(norm.source), edit.shape(norm.scale)
    if shape is None or scale is None or len(scale) != norm.axes:
        return None
    dims = shape[-norm.axes :]
    if not all(isinstance(dim, int) and dim > 0 for dim in dims) or tuple(scale) != tuple(dims):
        return None
    return [int(dim) for dim in dims if isinstance(dim, int)]


def _fits(value: ir.Value, source: ir.Value, dims: Sequence[int], edit: Editor) -> bool:
    """Tell whether `_row` can make a weight of a value."""
    shape, rank = edit.shape(value), edit.rank(source)
    if shape is None or rank is None or edit.dtype(value) != edit.dtype(source):
        return False
    if tuple(shape) == tuple(dims):
        return True
    tensor = edit.tensor(value)
    if tensor is None or tensor.nbytes > _ROW_BYTES or len(shape) > rank:
        return False
    return all(dim == 1 for dim in shape) or _without_ones(shape, dims) == tuple(dims)


def _without_ones(shape: Sequence[Any], dims: Sequence[int]) -> tuple[Any, ...]:
    """Drop leading ones until the rank is that of `dims`."""
    extra = max(0, len(shape) - len(dims))
    return tuple(shape[extra:]) if all(dim == 1 for dim in shape[:extra]) else tuple(shape)


def _row(value: ir.Value, dims: Sequence[int], edit: Editor) -> ir.Value:
    """Return a value as a weight of the extents `dims`; see `_fits`."""
    tensor = edit.tensor(value)
    if tensor is None or tuple(tensor.shape) == tuple(dims):
        return value
    with reading(tensor) as array:
        if array.size == 1:
            content = np.full(dims, array.reshape(()))
        else:
            content = array.reshape(dims).copy()
    return edit.constant(content, value.name or "scale")


def _is_ones(value: ir.Value, edit: Editor) -> bool:
    tensor = edit.tensor(value)
    if tensor is None or tensor.nbytes > _ROW_BYTES:
        return False
    with reading(tensor) as array:
        return bool(np.all(array == 1))


def _before_cast(value: ir.Value | None, edit: Editor) -> ir.Value | None:
    """Return the half precision value that a float32 value is a copy of."""
    node = producer_of(value, "Cast")
    source = None if node is None else node.inputs[0]
    return source if edit.dtype(source) == ir.DataType.FLOAT16 else None


def _is_half(value: ir.Value, edit: Editor) -> bool:
    """Tell whether `_half` gives the same numbers."""
    if _before_cast(value, edit) is not None:
        return True
    tensor = edit.tensor(value)
    if tensor is None or tensor.nbytes > _ROW_BYTES:
        return False
    with reading(tensor) as array, np.errstate(over="ignore"):
        return bool(np.all(array.astype(np.float16) == array))


def _half(value: ir.Value, edit: Editor) -> ir.Value:
    source = _before_cast(value, edit)
    if source is not None:
        return source
    tensor = edit.tensor(value)
    assert tensor is not None
    with reading(tensor) as array:
        return edit.constant(array.astype(np.float16), value.name or "scale")
