"""Which constants can take a factor per channel, so that an activation comes out divided by it.

An activation `[..., channels]` is followed back through what acts on each channel alone, to a norm
or a linear layer. Channels are the last axis throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import onnx_ir as ir

from lwc.core.walk import constant_tensor, op_name
from lwc.passes.attention.heads import Piece, views
from lwc.passes.quantization.channel_places import Place, constant_place, given_input
from lwc.passes.quantization.token_operators import NORMS, input_place, output_place
from lwc.rewrite import Editor, Miss, attribute

__all__ = ["Divisible", "Sharing", "consumers", "divisible", "linear_consumers"]

_REGROUPS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")

_LAYERS = ("MatMul", "Gemm")

_VALUES = {
    "com.microsoft::MultiHeadAttention": ((3, 6, 7), ("num_heads", "num_heads")),
    "com.microsoft::GroupQueryAttention": ((3, 4), ("num_heads", "kv_num_heads")),
    "Attention": ((4, 5), ("q_num_heads", "kv_num_heads")),
}
"""Fused attention: inputs that must be absent (a bias, keys and values of before), and the
attributes that count the heads of its output and of its values."""


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
        kind: What they belong to: `norm` or `linear`; `product` where there are none, and a product
            with constants before the layers divides.
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
        if attribute(node, "transA", 0):
            return Miss("its Gemm transposes the left operand", node)
        found = _own(input_place(node), edit) if index == 0 else None
        if found is None:
            return Miss(f"{node.op_type} reads it, which is no linear layer", node)
        if isinstance(found, Miss):
            return found
        places.append(found)
    return tuple(places) or Miss("nothing reads it")


def linear_consumers(value: ir.Value, edit: Editor) -> tuple[Place, ...] | Miss:
    """Return the weights of the linear layers among all that reads an activation."""
    places = []
    for node, index in value.uses():
        found = _own(input_place(node), edit) if index == 0 else None
        if isinstance(found, Miss):
            return found
        if found is not None and not attribute(node, "transA", 0):
            places.append(found)
    return tuple(places) or Miss("no linear layer reads it")


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
    if name in NORMS:
        return _norm(node, edit)
    if name in _VALUES:
        return _attention(node, edit)
    if name in ("Mul", "Add"):
        return _elementwise(node, edit)
    if name in _LAYERS:
        return _linear(node, edit)
    if name in _REGROUPS and _keeps_channels(node, edit):
        return _behind(node.inputs[0], edit)
    source = _turned_back(value, edit)
    if source is not None:
        return _behind(source, edit)
    return Miss(f"it comes from {node.op_type}, which mixes channels or bends them", node)


def _keeps_channels(node: ir.Node, edit: Editor) -> bool:
    """Tell whether a node that keeps the order of elements keeps the extent of the last axis."""
    before, after = edit.shape(node.inputs[0]), edit.shape(node.outputs[0])
    if not before or not after:
        return False
    return edit.same_dim(before[-1], after[-1])


def _turned_back(value: ir.Value, edit: Editor) -> ir.Value | None:
    """Return what a value is a view of that has the same channels last.

    In between, heads may have been dealt out and joined again.
    """
    sources: list[ir.Value] = []
    for source, view in views(value, edit):
        shape = edit.shape(source)
        if sources and shape and view[-1:] == ((Piece(len(shape) - 1, 1, shape[-1]),),):
            return source if all(map(edit.single_use, sources[1:])) else None
        sources.append(source)
    return None


def _behind(value: ir.Value | None, edit: Editor) -> Divisible | Miss:
    """Go on with a value that nothing else may read."""
    if value is None or not edit.single_use(value):
        return Miss("what it is made of is read elsewhere")
    return divisible(value, edit)


def _norm(node: ir.Node, edit: Editor) -> Divisible | Miss:
    form, rank = NORMS[op_name(node)], edit.rank(node.inputs[0])
    if attribute(node, "axis", -1) not in (-1, None if rank is None else rank - 1):
        return Miss("its norm is over several axes", node)
    places = []
    for index in (form.scale, form.bias):
        if index is not None and given_input(node, index) is not None:
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
    weight = _own(output_place(node), edit)
    if weight is None:
        return Miss("it is a product of activations", node)
    if isinstance(weight, Miss):
        return weight
    if given_input(node, 2) is None:
        return Divisible((weight,), "linear")
    bias = _vector(node, 2, edit)
    if bias is None:
        return Miss("what its Gemm adds is no constant row", node)
    return Divisible((weight, bias), "linear")


def _own(weight: Place | None, edit: Editor) -> Place | Miss | None:
    """Return a weight that its layer alone reads, through Transpose at most; None for no weight.

    A bias that is the only row or column of a weight may read it too: it gets a copy.
    """
    if weight is None:
        return None
    for step in weight.steps:
        if step.op_type == "Cast":
            return Miss("its weight is read through a Cast: fold it first", weight.node)
        if not edit.single_use(step.outputs[0]):
            return Miss("its weight is shared", weight.node)
    if weight.source.producer() is not None:
        return Miss("its weight is no initializer", weight.node)
    if 0 in weight.shape:
        return Miss("its weight holds no numbers", weight.node)
    if not edit.single_use(weight.source) and not _is_bias_too(weight):
        return Miss("its weight is shared", weight.node)
    return weight


def _is_bias_too(weight: Place) -> bool:
    """Tell whether a weight of one row or column is read by one layer, and else by what adds it."""
    layers = [node for node, _ in weight.source.uses() if node.op_type in (*_LAYERS, "Transpose")]
    return 1 in weight.shape and len(layers) == 1


def _vector(node: ir.Node, index: int, edit: Editor) -> Place | None:
    """Return a constant with a number for each channel and nothing else."""
    place, shape = constant_place(node, index, -1), edit.shape(node.outputs[0])
    if place is None or place.steps or not shape or place.shape[-1] != shape[-1]:
        return None
    return place if all(extent == 1 for extent in place.shape[:-1]) else None
