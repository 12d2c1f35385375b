"""Which constants can take a factor per channel, so that an activation comes out divided by it.

An activation `[..., channels]` is followed back through what acts on each channel alone, to a norm
or a linear layer. Channels are the last axis throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import onnx_ir as ir

from lwc.core.walk import constant_tensor, op_name
from lwc.passes.quantization.weight_uses import turns
from lwc.rewrite import Editor, Miss, attribute, producer_of, use_count

__all__ = ["Divisible", "Place", "Sharing", "consumers", "divisible"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)

_NORMS: dict[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "com.microsoft::SkipLayerNormalization": (2, 3),
    "com.microsoft::SkipSimplifiedLayerNormalization": (2,),
}
"""Inputs of a norm that a factor on its output goes into: scale, and bias where there is one."""

_REGROUPS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")

_VALUES = {
    "com.microsoft::MultiHeadAttention": ((3, 6, 7), ("num_heads", "num_heads")),
    "com.microsoft::GroupQueryAttention": ((3, 4), ("num_heads", "kv_num_heads")),
    "Attention": ((4, 5), ("q_num_heads", "kv_num_heads")),
}
"""Fused attention: inputs that must be absent (a bias, keys and values of before), and the
attributes that count the heads of its output and of its values."""


class Place(NamedTuple):
    """A constant that takes the factor.

    Attributes:
        node: What reads it.
        operand: Which of its inputs.
        value: The initializer, which `node` may read through a Transpose.
        axis: The axis of channels, from the end: -1 or -2.
    """

    node: ir.Node
    operand: int
    value: ir.Value
    axis: int


class Sharing(NamedTuple):
    """Heads of values, each of which becomes several heads of the activation.

    The activation's channels are `[groups, repeats, size]`, those of the values `[groups, size]`.
    """

    groups: int
    repeats: int
    size: int


@dataclass(frozen=True)
class Divisible:
    """How an activation comes out divided.

    Attributes:
        places: Constants to divide.
        kind: What they belong to: `norm` or `linear`.
        sharing: Where channels share a factor; None where each has its own.
    """

    places: tuple[Place, ...]
    kind: str
    sharing: Sharing | None = None


def consumers(value: ir.Value, edit: Editor) -> tuple[Place, ...] | Miss:
    """Return the weights of all that reads an activation, if these are linear layers."""
    places = []
    if value.is_graph_output():
        return Miss("it is an output of the graph")
    for node, index in value.uses():
        found = _weight(node, edit) if index == 0 else None
        if found is None:
            return Miss(f"{node.op_type} reads it, which is no linear layer", node)
        if isinstance(found, Miss):
            return found
        if attribute(node, "transA", 0):
            return Miss("its Gemm transposes the left operand", node)
        places.append(found._replace(axis=-3 - found.axis))
    return tuple(places) or Miss("nothing reads it")


def divisible(value: ir.Value, edit: Editor) -> Divisible | Miss:
    """Say how an activation that only linear layers read comes out divided per channel."""
    node = value.producer()
    if node is None:
        return Miss("it is an input of the graph")
    if edit.in_function(node):
        return Miss("it belongs to a function body, which holds no initializers", node)
    if value is not node.outputs[0]:
        return Miss(f"it is not the first output of its {node.op_type}", node)
    name = op_name(node)
    if name in _NORMS:
        return _norm(node, edit)
    if name in _VALUES:
        return _attention(node, edit)
    if name in ("Mul", "Add"):
        return _elementwise(node, edit)
    if name in ("MatMul", "Gemm"):
        return _linear(node, edit)
    if name in _REGROUPS and _keeps_channels(node, edit):
        return _behind(node.inputs[0], edit)
    return Miss(f"it comes from {node.op_type}, which mixes channels or bends them", node)


def _keeps_channels(node: ir.Node, edit: Editor) -> bool:
    """Tell whether a node that keeps the order of elements keeps the extent of the last axis."""
    before, after = edit.shape(node.inputs[0]), edit.shape(node.outputs[0])
    if not before or not after:
        return False
    return edit.same_dim(before[-1], after[-1])


def _behind(value: ir.Value | None, edit: Editor) -> Divisible | Miss:
    """Go on with a value that nothing else may read."""
    if value is None or not edit.single_use(value):
        return Miss("what it is made of is read elsewhere")
    return divisible(value, edit)


def _norm(node: ir.Node, edit: Editor) -> Divisible | Miss:
    rank = edit.rank(node.inputs[0])
    axis = attribute(node, "axis", -1)
    if axis not in (-1, None if rank is None else rank - 1):
        return Miss("its norm is over several axes", node)
    places = []
    for index in _NORMS[op_name(node)]:
        given = node.inputs[index] if index < len(node.inputs) else None
        if given is not None:
            place = _vector(node, index, edit)
            if place is None:
                return Miss("scale or bias of its norm is no constant", node)
            places.append(place)
    return Divisible(tuple(places), "norm")


def _elementwise(node: ir.Node, edit: Editor) -> Divisible | Miss:
    first, second = node.inputs
    for index, (constant, other) in enumerate(((first, second), (second, first))):
        if constant_tensor(constant) is None:
            continue
        place = _vector(node, index, edit)
        if place is None:
            return Miss(f"the constant of its {node.op_type} has no number for each channel", node)
        if node.op_type == "Mul":
            return Divisible((place,), "norm")
        before, after = edit.shape(other), edit.shape(node.outputs[0])
        if not before or not after or not edit.same_dim(before[-1], after[-1]):
            return Miss("what is added has more channels", node)
        behind = _behind(other, edit)
        return behind if isinstance(behind, Miss) else _with(behind, place)
    if node.op_type == "Add":
        return Miss("it is a sum of activations", node)
    misses = []
    for factor, other in ((second, first), (first, second)):
        if not edit.same_shape(factor, other):
            return Miss("it is a product of activations of different shapes", node)
        behind = _behind(factor, edit)
        if not isinstance(behind, Miss):
            return behind
        misses.append(behind)
    return misses[0]


def _with(made: Divisible, place: Place) -> Divisible | Miss:
    if made.sharing is not None:
        return Miss("a constant is added to attention", place.node)
    return replace(made, places=(*made.places, place))


def _attention(node: ir.Node, edit: Editor) -> Divisible | Miss:
    absent, (heads_name, groups_name) = _VALUES[op_name(node)]
    if any(index < len(node.inputs) and node.inputs[index] is not None for index in absent):
        return Miss("its attention has a bias, or keys and values of before", node)
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return Miss("keys and values of its attention are read elsewhere", node)
    values = node.inputs[2] if len(node.inputs) > 2 else None
    shape = edit.shape(values)
    if values is None or shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        return Miss("values of its attention are not [batch, length, channels]", node)
    behind = _behind(values, edit)
    if isinstance(behind, Miss):
        return behind
    heads, groups = attribute(node, heads_name, 0), attribute(node, groups_name, 0)
    if behind.kind == "norm" or not heads or not groups or heads % groups or shape[2] % groups:
        return Miss("values of its attention come from no linear layer", node)
    if heads == groups:
        return behind
    if behind.sharing is not None:
        return Miss("its heads are shared twice", node)
    return replace(behind, sharing=Sharing(groups, heads // groups, shape[2] // groups))


def _linear(node: ir.Node, edit: Editor) -> Divisible | Miss:
    weight = _weight(node, edit)
    if weight is None:
        return Miss("it is a product of activations", node)
    if isinstance(weight, Miss):
        return weight
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return Divisible((weight,), "linear")
    bias = _vector(node, 2, edit)
    if bias is None:
        return Miss("what its Gemm adds is no constant row", node)
    return Divisible((weight, bias), "linear")


def _weight(node: ir.Node, edit: Editor) -> Place | Miss | None:
    """Return the weight of a linear layer, with the axis of its outputs; None for other nodes."""
    if op_name(node) not in ("MatMul", "Gemm"):
        return None
    value, turned = node.inputs[1], bool(attribute(node, "transB", 0))
    while value is not None and (above := producer_of(value, "Transpose")) is not None:
        if not edit.single_use(value):
            return Miss("its weight is shared", node)
        value, turned = above.inputs[0], turned != turns(above)
    tensor = constant_tensor(value)
    if value is None or tensor is None or len(tensor.shape) != 2 or tensor.dtype not in _FLOATS:
        return None
    if value.producer() is not None or use_count(value) != 1 or value.is_graph_output():
        return Miss("its weight is shared, or no initializer", node)
    return Place(node, 1, value, -2 if turned else -1)


def _vector(node: ir.Node, index: int, edit: Editor) -> Place | None:
    """Return a constant with a number for each channel and nothing else."""
    value = node.inputs[index]
    tensor = constant_tensor(value)
    if value is None or tensor is None or tensor.dtype not in _FLOATS or not len(tensor.shape):
        return None
    *rest, channels = tensor.shape.numpy()
    shape = edit.shape(node.outputs[0])
    last = None if shape is None or not len(shape) else shape[-1]
    if any(extent != 1 for extent in rest) or channels != last:
        return None
    return Place(node, index, value, -1)
