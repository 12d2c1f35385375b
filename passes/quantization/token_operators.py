"""Operators as a residual stream meets them: linear layers, norms, what acts on tokens alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

import onnx_ir as ir

from lwc.core.walk import is_default_domain, op_name
from lwc.passes.quantization.channel_places import FLOATS, Place, constant_place
from lwc.rewrite import Editor, attribute

__all__ = [
    "NORMS",
    "SUM",
    "NormForm",
    "Operands",
    "channel_operands",
    "hint",
    "input_place",
    "is_linear",
    "output_place",
]

# Linear layers


def is_linear(node: ir.Node) -> bool:
    """Tell whether a node multiplies an activation with a constant matrix."""
    return output_place(node) is not None


def output_place(node: ir.Node) -> Place | None:
    """Return the weight of a linear layer with the axis of its outputs."""
    return _weight(node, -2 if attribute(node, "transB", 0) else -1)


def input_place(node: ir.Node) -> Place | None:
    """Return the weight of a linear layer with the axis of its inputs."""
    return (
        None
        if attribute(node, "transA", 0)
        else _weight(node, -1 if attribute(node, "transB", 0) else -2)
    )


def _weight(node: ir.Node, axis: int) -> Place | None:
    if op_name(node) not in ("MatMul", "Gemm"):
        return None
    place = constant_place(node, 1, -1)
    if place is None or len(place.shape) != 2:
        return None
    return constant_place(node, 1, axis)


# Norms


class NormForm(NamedTuple):
    """How a norm operator is laid out.

    Attributes:
        kind: `layer` subtracts the mean, `rms` does not.
        summands: Inputs that are added before it; a norm without a residual has one.
        scale: The input that has its scale.
        bias: The input that has its bias, if it can have one.
    """

    kind: Literal["layer", "rms"]
    summands: tuple[int, ...]
    scale: int
    bias: int | None


NORMS: dict[str, NormForm] = {
    "LayerNormalization": NormForm("layer", (0,), 1, 2),
    "RMSNormalization": NormForm("rms", (0,), 1, None),
    "SimplifiedLayerNormalization": NormForm("rms", (0,), 1, None),
    "com.microsoft::SkipLayerNormalization": NormForm("layer", (0, 1, 4), 2, 3),
    "com.microsoft::SkipSimplifiedLayerNormalization": NormForm("rms", (0, 1, 3), 2, None),
}

SUM = 3
"""The output of a norm with a residual that is the sum."""


# Operators on tokens


class Operands(NamedTuple):
    """What of an operator has the channels: inputs by place, and outputs.

    Attributes:
        inputs: Places.
        outputs: Values.
        adds: Whether it adds its inputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[ir.Value, ...]
    adds: bool = False


_SUMS = ("Add", "Sub", "Sum")
_REGROUPS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile")
_SAME = ("Identity", "Neg", "Dropout", "Cast")
_QUANTIZED = ("NBits", "Bnb4", "Quantize", "quantize", "Integer", "QLinear")
_SPELLED_NORM = ("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")


def channel_operands(node: ir.Node, edit: Editor) -> Operands | str:
    """Return what of a node has the channels, where an orthogonal matrix on them commutes with it.

    That is a linear operator which treats all channels alike. Whether the values do have the
    channels last is for the caller to check. The result is a reason where it does not commute.
    """
    name = op_name(node)
    given = tuple(place for place, value in enumerate(node.inputs) if value is not None)
    form = NORMS.get(name)
    if form is not None:
        summands = tuple(place for place in form.summands if place in given)
        return Operands(summands, tuple(node.outputs[SUM : SUM + 1]), len(form.summands) > 1)
    if name in _SUMS:
        return Operands(given, tuple(node.outputs), adds=True)
    if name in ("Mul", "Div"):
        return _product(node, edit)
    if name in _SAME:
        return _same(node, edit)
    rank = edit.rank(node.inputs[0]) if given else None
    if name in _REGROUPS:  # the order of elements stays, so it is enough that the width does
        return Operands((0,), tuple(node.outputs))
    if rank is None:
        return f"{node.op_type} has an input of unknown rank"
    if name == "Transpose":
        perm = attribute(node, "perm", list(range(rank))[::-1])
        return Operands((0,), tuple(node.outputs)) if perm[-1] == rank - 1 else _moves(node)
    if name in ("Gather", "Split", "Concat"):
        if attribute(node, "axis", 0) % rank == rank - 1:
            return _moves(node)
        return Operands(given if name == "Concat" else (0,), tuple(node.outputs))
    if name == "Slice":
        axes = _sliced(node, rank, edit)
        if axes is None or rank - 1 in axes:
            return _moves(node)
        return Operands((0,), tuple(node.outputs))
    if name in ("MatMul", "Gemm"):
        return f"a {name} has no constant matrix on its right"
    return f"{name} does not treat all channels alike"


def _moves(node: ir.Node) -> str:
    return f"{node.op_type} acts on the axis of channels"


def _same(node: ir.Node, edit: Editor) -> Operands | str:
    if node.op_type == "Dropout" and (
        len(node.inputs) > 2 or any(o.uses() for o in node.outputs[1:])
    ):
        return "Dropout may be in training"
    if node.op_type == "Cast" and attribute(node, "to") not in FLOATS:
        return "Cast makes integers of it"
    if node.op_type == "Cast" and edit.dtype(node.inputs[0]) not in FLOATS:
        return "Cast makes it of integers"
    return Operands((0,), tuple(node.outputs[:1]))


def _product(node: ir.Node, edit: Editor) -> Operands | str:
    """A product with one number for each token, or for all, is linear and the same per channel."""
    first, second = node.inputs
    if _is_per_token(second, edit):
        return Operands((0,), tuple(node.outputs))
    if node.op_type == "Mul" and _is_per_token(first, edit):
        return Operands((1,), tuple(node.outputs))
    if edit.is_constant(first) or edit.is_constant(second):
        return f"{node.op_type} scales each channel by a number of its own"
    return f"{node.op_type} multiplies channels of two activations"


def _is_per_token(value: ir.Value | None, edit: Editor) -> bool:
    shape = edit.shape(value)
    return shape is not None and (not len(shape) or shape[-1] == 1)


def _sliced(node: ir.Node, rank: int, edit: Editor) -> set[int] | None:
    """Return the axes that a Slice cuts, where they are known."""
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = edit.ints(node.inputs[3])
    else:
        shape = edit.shape(node.inputs[1])
        count = shape[0] if shape else None
        axes = list(range(count)) if isinstance(count, int) else None
    return None if axes is None else {axis % rank for axis in axes}


def hint(node: ir.Node) -> str:
    """Say what to do about an operator that a stream cannot pass, where there is something."""
    inputs = list(node.inputs)
    squares = node.op_type == "Mul" and len(inputs) == 2 and inputs[0] is inputs[1]
    if is_default_domain(node) and (node.op_type in _SPELLED_NORM or squares):
        return "; if it is part of a norm, run fuse-norm first"
    makers = [None if value is None else value.producer() for value in inputs]
    names = [node.op_type, *(maker.op_type for maker in makers if maker is not None)]
    if any(part in name for name in names for part in _QUANTIZED):
        return "; rotate before quantizing"
    return ""
