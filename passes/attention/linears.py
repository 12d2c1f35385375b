"""Linear operators with constant weights, and several of them written as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.quant_layout import TILE
from lwc.core.walk import constant_tensor, op_name
from lwc.core.weights import reading
from lwc.passes.quantization.dialect_ops import MATMUL, dynamic_quant_matmul, variant_of
from lwc.rewrite import Editor, Miss, attribute, use_count

__all__ = ["LINEAR_OPS", "Linear", "difference", "join", "linear_of"]

_MS = "com.microsoft"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Linear:
    """An operator that multiplies an activation with a constant weight.

    Attributes:
        node: The operator.
        source: The activation, `[..., inputs]`.
        columns: Outputs.
        weights: Its constants by input, the bias not among them: `[inputs, columns]` or
            `[columns, inputs]` for floating-point weights, else as the operator has them.
        axis: The axis of the weight (the first constant) that the columns lie along.
        bias: `[columns]`, or what broadcasts to it; None for none.
        end: The operator's output, or that of the sum with its bias.
        kind: What operators must have in common to become one, as words and values.
    """

    node: ir.Node
    source: ir.Value
    columns: int
    weights: Mapping[int, ir.TensorProtocol]
    axis: int
    bias: ir.TensorProtocol | None
    end: ir.Value
    kind: tuple[tuple[str, Any], ...]

    @property
    def weight(self) -> ir.Value:
        """The weight."""
        value = self.node.inputs[1]
        assert value is not None
        return value


def difference(first: Linear, second: Linear) -> str | None:
    """Say in what two operators differ that cannot be one, or return None."""
    for (what, mine), (_, other) in zip(first.kind, second.kind, strict=False):
        if mine != other:
            return f"{what} {_shown(mine)} against {_shown(other)}"
    return None


def _shown(fact: object) -> str:
    return fact.name.lower() if isinstance(fact, ir.DataType) else str(fact)


def linear_of(node: ir.Node, edit: Editor) -> Linear | Miss | None:
    """Read a node as a linear operator; None where it is none."""
    reader = _READERS.get(op_name(node))
    if reader is None or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    if any(each.is_ref() for each in node.attributes.values()):
        return None
    weight = constant_tensor(node.inputs[1])
    if weight is None or node.inputs[1] is None:
        return None
    if edit.in_function(node):
        return Miss("it belongs to a function body, which holds no initializers", node)
    if use_count(node.inputs[1]) != 1 or node.inputs[1].is_graph_output():
        return Miss("its weight is shared, and packing would store it twice", node)
    return reader(node, weight, edit)


# Readers, by operator


def _matmul(node: ir.Node, weight: ir.TensorProtocol, edit: Editor) -> Linear | Miss | None:
    if len(weight.shape) != 2 or weight.dtype not in _FLOATS:
        return None
    columns = weight.shape.numpy()[1]
    bias, end = _sum_after(node, columns, edit)
    kind = (("operators", node.op_type), ("weights of", weight.dtype))
    return Linear(node, _source(node), columns, {1: weight}, 1, bias, end, kind)


def _gemm(node: ir.Node, weight: ir.TensorProtocol, edit: Editor) -> Linear | Miss | None:
    if weight.dtype not in _FLOATS:
        return None
    turned = bool(attribute(node, "transB", 0))
    columns = weight.shape.numpy()[0 if turned else 1]
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_tensor(given)
    if given is not None and (bias is None or not _is_row(bias, columns)):
        return Miss("what it adds is no constant row", node)
    kind = (
        ("operators", node.op_type), ("weights of", weight.dtype), ("transB", turned),
        ("transA", bool(attribute(node, "transA", 0))), ("alpha", alpha), ("beta", beta),
    )  # fmt: skip
    axis = 0 if turned else 1
    return Linear(node, _source(node), columns, {1: weight}, axis, bias, node.outputs[0], kind)


def _nbits(node: ir.Node, weight: ir.TensorProtocol, edit: Editor) -> Linear | Miss | None:
    columns = int(attribute(node, "N", 0))
    if not columns or weight.shape.numpy()[0] != columns:
        return Miss("its weight is not laid out by columns", node)
    tensors = _constants(node, (2, 3))
    if tensors is None or 2 not in tensors:
        return Miss("its scales or zero points are no constants", node)
    if _given(node, 4):
        return Miss("its columns have an order of their own (g_idx)", node)
    zeros = tensors.get(3)
    rest = {name: each for name, each in node.attributes.items() if name not in ("N", "bits")}
    plain = sorted((name, each.value) for name, each in rest.items())
    kind = (
        ("operators", node.op_type), ("bits", attribute(node, "bits", 4)),
        ("zero points of", "none" if zeros is None else zeros.dtype),
        ("scales of", tensors[2].dtype), *plain,
    )  # fmt: skip
    bias, end = _own_bias(node, 5, columns, edit)
    if isinstance(bias, Miss):
        return bias
    return Linear(node, _source(node), columns, {1: weight, **tensors}, 0, bias, end, kind)


def _dynamic(node: ir.Node, weight: ir.TensorProtocol, edit: Editor) -> Linear | Miss | None:
    if len(weight.shape) != 2:
        return None
    columns = weight.shape.numpy()[1]
    tensors = _constants(node, (2, 3))
    if tensors is None or 2 not in tensors:
        return Miss("its scales or zero points are no constants", node)
    kind = (
        ("operators", node.op_type), ("weights of", weight.dtype),
        ("zero points", 3 in tensors), ("scales of", tensors[2].dtype),
    )  # fmt: skip
    bias, end = _own_bias(node, 4, columns, edit)
    if isinstance(bias, Miss):
        return bias
    return Linear(node, _source(node), columns, {1: weight, **tensors}, 1, bias, end, kind)


def _tiled(node: ir.Node, weight: ir.TensorProtocol, edit: Editor) -> Linear | Miss | None:
    variant = variant_of(node)
    if variant is None:
        return None
    if variant.gated or variant.activation != "none":
        return Miss("it holds an activation", node)
    if variant.N % TILE:
        return Miss(f"its {variant.N} columns are no whole tiles of {TILE}", node)
    bias_place = 3 + variant.zero_points
    tensors = _constants(node, range(2, bias_place))
    if tensors is None:
        return Miss("its scales or zero points are no constants", node)
    kind = (
        ("operators", node.op_type), ("bits", variant.bits), ("block_size", variant.block_size),
        ("x_block", variant.x_block), ("zero points", bool(variant.zero_points)),
        ("scales of", tensors[2].dtype),
    )  # fmt: skip
    bias, end = _own_bias(node, bias_place, variant.N, edit)
    if isinstance(bias, Miss):
        return bias
    return Linear(node, _source(node), variant.N, {1: weight, **tensors}, 0, bias, end, kind)


Reader: TypeAlias = Callable[[ir.Node, ir.TensorProtocol, Editor], "Linear | Miss | None"]

_READERS: dict[str, Reader] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    f"{_MS}::MatMulNBits": _nbits,
    f"{_MS}::DynamicQuantizeMatMul": _dynamic,
    MATMUL: _tiled,
}

LINEAR_OPS = tuple(_READERS)
"""Names of the operators that `linear_of` reads."""


def _source(node: ir.Node) -> ir.Value:
    source = node.inputs[0]
    assert source is not None
    return source


def _given(node: ir.Node, place: int) -> bool:
    return place < len(node.inputs) and node.inputs[place] is not None


def _constants(node: ir.Node, places: Sequence[int]) -> dict[int, ir.TensorProtocol] | None:
    """Return the constants that are given at these inputs; None where one is no constant."""
    found = {place: constant_tensor(node.inputs[place]) for place in places if _given(node, place)}
    tensors = {place: tensor for place, tensor in found.items() if tensor is not None}
    return tensors if len(tensors) == len(found) else None


def _own_bias(
    node: ir.Node, place: int, columns: int, edit: Editor
) -> tuple[ir.TensorProtocol | Miss | None, ir.Value]:
    """Return the bias at an input, or that of a sum behind the operator."""
    if not _given(node, place):
        return _sum_after(node, columns, edit)
    bias = constant_tensor(node.inputs[place])
    if bias is None:
        return Miss("its bias is no constant", node), node.outputs[0]
    return bias, node.outputs[0]


def _sum_after(
    node: ir.Node, columns: int, edit: Editor
) -> tuple[ir.TensorProtocol | None, ir.Value]:
    """Return the constant row that is added to what the operator gives, and the sum."""
    result = node.outputs[0]
    if not edit.single_use(result):
        return None, result
    (use,) = result.uses()
    sum_ = use.node
    if op_name(sum_) != "Add" or sum_.graph is not node.graph:
        return None, result
    bias = constant_tensor(sum_.inputs[1 - use.idx])
    if bias is None or not _is_row(bias, columns) or not edit.same_shape(result, sum_.outputs[0]):
        return None, result
    return bias, sum_.outputs[0]


def _is_row(tensor: ir.TensorProtocol, columns: int) -> bool:
    """Tell whether a constant adds the same to every row of `[..., columns]`."""
    *leading, last = tensor.shape.numpy() or (1,)
    return last in (1, columns) and all(extent == 1 for extent in leading)


# Writing


def join(linears: Sequence[Linear], edit: Editor) -> ir.Value:
    """Write operators of one kind as one, in this order, and return its output.

    Weights go to the module's spill file one after the other: what is held at a time is the joined
    weight and the one being read.

    Args:
        linears: At least two, without a `difference`.
        edit: Makes nodes before its root.
    """
    first = linears[0]
    columns = sum(each.columns for each in linears)
    name = first.weight.name or "weight"
    inputs: list[ir.Value | None] = [first.source]
    for place in range(1, 1 + max(first.weights)):
        inputs.append(None)
        if place in first.weights:
            joined = _joined(linears, place)
            tensor = edit.module.store.put(joined)
            inputs[place] = edit.module.add_initializer(f"{name}_packed", tensor)
            del joined
    bias = _joined_bias(linears, columns)
    variant = variant_of(first.node)
    if variant is not None:
        if bias is not None:
            inputs.append(edit.module.add_initializer(f"{name}_packed_bias", bias))
        whole = replace(variant, N=columns, bias=int(bias is not None))
        return dynamic_quant_matmul(edit, whole, inputs)
    attributes = {key: each.value for key, each in first.node.attributes.items()}
    if first.node.op_type == "MatMulNBits":
        attributes["N"] = columns
    own = _BIAS_INPUT.get(first.node.op_type)
    if bias is not None and own is not None:
        inputs += [None] * (own - len(inputs))
        inputs.append(edit.module.add_initializer(f"{name}_packed_bias", bias))
    made = edit.op(first.node.op_type, inputs, attributes, domain=first.node.domain)
    if bias is not None and own is None:
        made = edit.op("Add", [made, edit.module.add_initializer(f"{name}_packed_bias", bias)])
    return made


_BIAS_INPUT = {"Gemm": 2, "MatMulNBits": 5, "DynamicQuantizeMatMul": 4}


def _joined(linears: Sequence[Linear], place: int) -> Array:
    """Return the constants at one input, joined along the columns."""
    first = linears[0]
    shapes = [_shape(each, place) for each in linears]
    axis = first.axis if place == 1 else 0
    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    joined = np.empty(whole, first.weights[place].dtype.numpy())
    begin = 0
    for each, shape in zip(linears, shapes, strict=True):
        index = [slice(None)] * len(whole)
        index[axis] = slice(begin, begin + shape[axis])
        with reading(each.weights[place]) as array:
            spread = array.size != np.prod(shape)  # one scale for all columns
            joined[tuple(index)] = array.reshape(-1) if spread else array.reshape(shape)
        begin += shape[axis]
    return joined


def _shape(linear: Linear, place: int) -> tuple[int, ...]:
    """Return the shape in which a constant is joined: its columns first, but for weights."""
    tensor = linear.weights[place]
    if op_name(linear.node) == MATMUL:
        tiles = linear.columns // TILE
        return (tiles, tensor.size // tiles)
    if place == 1:
        return tuple(tensor.shape.numpy())
    if linear.node.op_type == "MatMulNBits":
        return (linear.columns, tensor.size // linear.columns)
    return (linear.columns,)


def _joined_bias(linears: Sequence[Linear], columns: int) -> Array | None:
    """Return the biases side by side, 0 where there is none; None where nothing has one."""
    given = next((each.bias for each in linears if each.bias is not None), None)
    if given is None:
        return None
    joined = np.zeros(columns, given.dtype.numpy())
    begin = 0
    for each in linears:
        if each.bias is not None:
            with reading(each.bias) as array:
                joined[begin : begin + each.columns] = array.reshape(-1)
        begin += each.columns
    return joined
