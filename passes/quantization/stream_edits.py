"""Turning a residual stream: its constants, the weights that read it, and its norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.errors import PassError
from lwc.core.walk import constant_tensor, op_name
from lwc.core.weights import reading
from lwc.passes.quantization.channel_places import Place, given_input, row
from lwc.passes.quantization.hadamard import Rotation
from lwc.passes.quantization.residual_stream import Stream
from lwc.passes.quantization.token_operators import NORMS
from lwc.rewrite import Editor

__all__ = ["Turned", "turn"]

Array = np.ndarray[Any, Any]

_RMS_OPSET = 23


class _Turn(NamedTuple):
    """An axis of a constant that is turned, and the norm whose scale goes into it before."""

    axis: int
    scale: ir.Value | None


@dataclass
class _Group:
    """The places of one constant that become the same."""

    turns: tuple[_Turn, ...]
    places: list[Place] = field(default_factory=list)


class Turned(NamedTuple):
    """What was turned.

    Attributes:
        weights: Constants written.
        copies: Constants that were one before: name, and bytes that were added.
    """

    weights: int
    copies: list[tuple[str, int]]


def turn(stream: Stream, rotation: Rotation, edit: Editor) -> Turned:
    """Turn a stream whose norms have no bias.

    Raises:
        PassError: A number would leave the range of its type.
    """
    scales = {norm: _scale(norm, stream.width) for norm in stream.norms}
    written, copies = 0, []
    for source, groups in _by_source(stream, scales).items():
        old = constant_tensor(source)
        assert old is not None
        made = [_turned(old, group, rotation, stream, edit) for group in groups]
        for group, tensor in zip(groups, made, strict=True):
            if _put(source, group, tensor, edit):
                copies.append((source.name or "constant", tensor.nbytes))
        written += len(groups)
    ones: dict[ir.DataType, ir.Value] = {}
    for norm, scale in scales.items():
        _unscale(norm, scale is not None, ones, stream, edit)
    return Turned(written, copies)


def _scale(norm: ir.Node, width: int) -> ir.Value | None:
    """Return the scale of a norm; None where it is one number, which may stay."""
    value = norm.inputs[NORMS[op_name(norm)].scale]
    numbers = row(value, width)
    return None if numbers is None or (numbers == numbers[0]).all() else value


def _by_source(
    stream: Stream, scales: dict[ir.Node, ir.Value | None]
) -> dict[ir.Value, list[_Group]]:
    """Group the places of every constant by what becomes of it, the first in the graph last."""
    places: dict[tuple[ir.Node, int], tuple[Place, set[_Turn]]] = {}
    everything: list[tuple[Place, ir.Value | None]]
    everything = [(place, None) for place in stream.constants]
    everything += [(place, None if norm is None else scales[norm]) for place, norm in stream.reads]
    for place, scale in everything:
        _, turns = places.setdefault((place.node, place.operand), (place, set()))
        turns.add(_Turn(place.axis, scale))
    order = {node: index for index, node in enumerate(_graph_of(stream))}
    found: dict[ir.Value, dict[tuple[_Turn, ...], _Group]] = {}
    for place, turns in sorted(places.values(), key=lambda each: -order[each[0].node]):
        key = tuple(sorted(turns, key=lambda each: each.axis))
        group = found.setdefault(place.source, {}).setdefault(key, _Group(key))
        group.places.append(place)
    return {source: list(groups.values()) for source, groups in found.items()}


def _graph_of(stream: Stream) -> Iterator[ir.Node]:
    graph = stream.norms[0].graph
    assert isinstance(graph, ir.Graph)
    return iter(graph)


def _turned(
    old: ir.TensorProtocol, group: _Group, rotation: Rotation, stream: Stream, edit: Editor
) -> ir.TensorProtocol:
    """Return a constant with its axes turned; big ones lie in the spill file."""
    with reading(old) as array:
        made: Array = array
        for count, turn_ in enumerate(group.turns, 1):
            factors = None if turn_.scale is None else row(turn_.scale, stream.width)
            dtype = array.dtype if count == len(group.turns) else np.dtype(np.float64)
            try:
                # What norms give is centered, so that what reads it may be, too.
                made = rotation.apply(
                    made, turn_.axis, factors, centered=stream.is_centered, dtype=dtype
                )
            except OverflowError:
                raise PassError(
                    f"'{old.name}' would not be finite in its type",
                    remedy="rotate before convert-dtype",
                ) from None
    return edit.module.spilled(ir.Tensor(made, name=old.name))


def _put(source: ir.Value, group: _Group, tensor: ir.TensorProtocol, edit: Editor) -> bool:
    """Let the places of a group read a tensor; tell whether others go on reading the old one."""
    steps = {step for place in group.places for step in place.steps}
    readers = {(place.node, place.operand) for place in group.places}
    alone = source.is_initializer() and not source.is_graph_output()
    if alone and _readers(source, steps) == readers:
        edit.module.replace_initializer(source, tensor)
        edit.changed = True
        return False
    fresh = edit.module.add_initializer(source.name or "constant", tensor)
    for place in group.places:
        value = fresh
        edit.at(place.node)
        for step in place.steps:
            attributes = {key: each.value for key, each in step.attributes.items()}
            value = edit.op(step.op_type, [value], attributes)
        old = place.node.inputs[place.operand]
        edit.set_input(place.node, place.operand, value)
        made = None if old is None else old.producer()
        if made is not None and made.graph is not None and edit.is_dead(made):
            edit.erase(made)
    return bool(source.uses()) or source.is_graph_output()


def _readers(value: ir.Value, steps: set[ir.Node]) -> set[tuple[ir.Node, int]]:
    """Return what reads a constant, at the ends of the nodes that hand it on."""
    found: set[tuple[ir.Node, int]] = set()
    for node, index in value.uses():
        if node in steps and not node.outputs[0].is_graph_output():
            found |= _readers(node.outputs[0], steps)
        else:
            found.add((node, index))
    return found


def _unscale(
    norm: ir.Node,
    folded: bool,
    ones: dict[ir.DataType, ir.Value],
    stream: Stream,
    edit: Editor,
) -> None:
    """Give a norm a scale of ones where its own was folded, and let it subtract no mean."""
    form = NORMS[op_name(norm)]
    scale = norm.inputs[form.scale]
    tensor = constant_tensor(scale)
    assert tensor is not None
    if folded:
        if tensor.dtype not in ones:
            content = np.ones(stream.width, tensor.dtype.numpy())
            ones[tensor.dtype] = edit.module.add_initializer("ones", content)
        scale = ones[tensor.dtype]
        edit.set_input(norm, form.scale, scale)
    if form.kind == "layer":
        _without_mean(norm, scale, edit)


def _without_mean(norm: ir.Node, scale: ir.Value | None, edit: Editor) -> None:
    """Put the norm that subtracts no mean in the place of one that does."""
    edit.at(norm)
    summands = [given_input(norm, place) for place in NORMS[op_name(norm)].summands]
    if norm.domain:
        op, inputs = "SkipSimplifiedLayerNormalization", [*summands[:2], scale, *summands[2:]]
    else:
        is_new = edit.opset(norm) >= _RMS_OPSET
        op = "RMSNormalization" if is_new else "SimplifiedLayerNormalization"
        inputs = [*summands, scale]
    attributes = {key: each.value for key, each in norm.attributes.items()}
    count = max(index for index, value in enumerate(norm.outputs) if index == 0 or value.uses()) + 1
    made = edit.node(op, inputs, attributes, domain=norm.domain, outputs=count)
    for index, value in enumerate(made.outputs):
        old = norm.outputs[index]
        if index == 0 or old.uses():
            edit.replace(old, value)
        else:
            value.name = ""
    edit.erase(norm)
