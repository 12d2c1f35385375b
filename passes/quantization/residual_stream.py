"""Residual streams: all values in one basis of channels, with what writes and what reads them.

A stream is found by following its values, `[..., width]`, up and down through every operator that
is linear and treats all channels alike, as a sum does. An orthogonal matrix on the channels
commutes with those. The stream ends at constants, at linear layers and at norms whose result only
linear layers read; anything else is an objection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

from lwc.core.walk import constant_tensor, op_name
from lwc.passes.quantization.channel_places import (
    Place,
    channels_of,
    constant_place,
    given_input,
    row,
)
from lwc.passes.quantization.token_operators import (
    NORMS,
    SUM,
    channel_operands,
    hint,
    input_place,
    is_linear,
    output_place,
)
from lwc.rewrite import Editor, Miss, attribute

__all__ = ["Read", "Stream", "find_streams", "follow"]

_EXTENTS = ("Shape", "Size")
"""Operators that see extents only, which stay."""

_VIEWS = (
    "Cast", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that may lie between a norm and a linear layer: they hand on its bias, too."""

_SCALINGS = ("Div", "Mul", "Neg")
"""Operators that may lie there if the norm has no bias."""


class Read(NamedTuple):
    """A linear layer that reads the stream.

    Attributes:
        place: Its weight; the axis is that of its inputs.
        norm: The norm in between, or None.
    """

    place: Place
    norm: ir.Node | None


@dataclass
class Stream:
    """A residual stream.

    Attributes:
        width: Number of channels.
        values: Every value of the stream, in the order in which they were found.
        constants: Constants that lie in the stream (tables, positions, biases), and the weights of
            linear layers whose result does; the axis is that of the channels.
        reads: Linear layers that read it.
        norms: Norms that read it.
        sums: Operators that add activations.
        objection: Why it cannot be turned; None where it can.
    """

    width: int
    values: dict[ir.Value, None] = field(default_factory=dict)
    constants: list[Place] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)
    sums: list[ir.Node] = field(default_factory=list)
    objection: Miss | None = None

    @property
    def is_centered(self) -> bool:
        """Whether its norms subtract the mean."""
        return any(NORMS[op_name(norm)].kind == "layer" for norm in self.norms)


def find_streams(edit: Editor) -> Iterator[tuple[ir.Value, Stream]]:
    """Yield every residual stream of the main graph, and a value of it.

    What has no sum of activations is none. The graph may change in between.
    """
    seen: set[ir.Value] = set()
    for node in list(edit.module.graph):
        name = op_name(node)
        if node.graph is None or (name not in NORMS and name != "Gather"):
            continue
        value = node.outputs[0] if name == "Gather" else node.inputs[0]
        if value is None or value in seen or constant_tensor(value) is not None:
            continue
        width = channels_of(value, edit)
        # A single channel cannot be told from a number for each token.
        if width is None or width < 2:
            continue
        stream = follow(value, width, edit)
        seen.update(stream.values)
        if stream.sums and (stream.norms or stream.objection):
            yield value, stream


def follow(value: ir.Value, width: int, edit: Editor) -> Stream:
    """Return the stream that a value belongs to."""
    walk = _Walk(width, edit)
    walk.go(value)
    return walk.stream


class _Walk:
    """Follows one stream, all of it, also after an objection."""

    def __init__(self, width: int, edit: Editor) -> None:
        self.stream = Stream(width)
        self.edit = edit
        self._waiting: deque[ir.Value] = deque()
        self._visited: set[ir.Node] = set()
        self._writers: set[ir.Node] = set()

    def go(self, value: ir.Value) -> None:
        """Follow everything that a value is connected with."""
        self._enter(value, value.producer())
        while self._waiting:
            current = self._waiting.popleft()
            self._above(current)
            self._below(current)
        if self.stream.objection is None and self.stream.is_centered:
            self._check_centered()

    def _object(self, reason: str, node: ir.Node | None) -> None:
        if self.stream.objection is None:
            self.stream.objection = Miss(reason, node)

    def _enter(self, value: ir.Value, node: ir.Node | None) -> None:
        """Take a value, met at `node`, into the stream."""
        if value in self.stream.values:
            return
        if channels_of(value, self.edit) != self.stream.width:
            self._object(f"'{value.name}' does not provably have the channels last", node)
            return
        self.stream.values[value] = None
        self._waiting.append(value)

    def _above(self, value: ir.Value) -> None:
        node = value.producer()
        if node is None:
            self._object(f"'{value.name}' comes from outside of the graph", None)
        elif is_linear(node):
            self._write(node)
        else:
            if op_name(node) in NORMS and value is node.outputs[0]:
                self._post_norm(node)
            if node not in self._visited:
                self._visit(node)

    def _below(self, value: ir.Value) -> None:
        if value.is_graph_output():
            self._object(f"'{value.name}' is an output of the graph", value.producer())
        for node, index in value.uses():
            if node in self._visited or op_name(node) in _EXTENTS:
                continue
            if node.graph is not self.edit.module.graph:
                self._object("a subgraph reads it", node)
            elif is_linear(node) and index == 0:
                self._read(node, None)
            elif is_linear(node):
                self._write(node)
            else:
                self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        """Go through an operator that commutes with the matrix; object to others."""
        found = channel_operands(node, self.edit)
        if isinstance(found, str):
            self._object(found + hint(node), node)
            return
        self._visited.add(node)
        activations = sum(self._operand(node, place) for place in found.inputs)
        for output in found.outputs:
            if output.uses() or output.is_graph_output():
                self._enter(output, node)
        if found.adds and activations > 1:
            self.stream.sums.append(node)
        if op_name(node) in NORMS:
            self._norm(node)

    def _operand(self, node: ir.Node, index: int) -> bool:
        """Take an input into the stream; tell whether it is an activation."""
        place, value = constant_place(node, index, -1), node.inputs[index]
        assert value is not None
        if place is None and constant_tensor(value) is None:
            self._enter(value, node)
            return True
        if place is None or place.shape[place.axis] != self.stream.width:
            self._object(f"'{value.name}' has no number for each channel", node)
        else:
            self.stream.constants.append(place)
        return False

    def _write(self, node: ir.Node) -> None:
        """Take a linear layer whose result is in the stream."""
        place = output_place(node)
        if node in self._writers or place is None:
            return
        self._writers.add(node)
        if place.shape[place.axis] != self.stream.width:
            self._object(f"'{place.source.name}' has another number of outputs", node)
            return
        self.stream.constants.append(place)
        self._enter(node.outputs[0], node)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._operand(node, 2)

    def _read(self, node: ir.Node, norm: ir.Node | None) -> None:
        place = input_place(node)
        if place is None:
            self._object("its Gemm transposes the left operand", node)
        elif place.shape[place.axis] != self.stream.width:
            self._object(f"'{place.source.name}' has another number of inputs", node)
        else:
            self.stream.reads.append(Read(place, norm))

    def _norm(self, node: ir.Node) -> None:
        """Take a norm that reads the stream, and all that reads its result."""
        form, width = NORMS[op_name(node)], self.stream.width
        self.stream.norms.append(node)
        rank = self.edit.rank(node.inputs[0])
        bias = given_input(node, form.bias)
        rest = [value for place, value in enumerate(node.outputs) if place not in (0, SUM)]
        if attribute(node, "axis", -1) not in (-1, None if rank is None else rank - 1):
            self._object("its norm is over several axes", node)
        elif row(node.inputs[form.scale], width) is None:
            self._object("the scale of its norm is no constant", node)
        elif bias is not None and row(bias, width) is None:
            self._object("the bias of its norm is no constant", node)
        elif any(value.uses() or value.is_graph_output() for value in rest):
            self._object("the mean or deviation that its norm finds is read", node)
        self._normed(node.outputs[0], node)

    def _normed(self, value: ir.Value, norm: ir.Node) -> None:
        """Follow the result of a norm down to linear layers."""
        has_bias = given_input(norm, NORMS[op_name(norm)].bias) is not None
        if value.is_graph_output():
            self._object(f"the norm's result '{value.name}' is an output of the graph", norm)
        if channels_of(value, self.edit) != self.stream.width:
            self._object(f"'{value.name}' does not provably have the channels last", norm)
            return
        for node, index in value.uses():
            if op_name(node) in _EXTENTS:
                continue
            if node.graph is not self.edit.module.graph:
                self._object("a subgraph reads the result of its norm", node)
            elif is_linear(node) and index == 0:
                self._read(node, norm)
            elif op_name(node) in (_VIEWS if has_bias else (*_VIEWS, *_SCALINGS)):
                found = channel_operands(node, self.edit)
                if isinstance(found, str) or index not in found.inputs:
                    self._object(f"after its norm, {found}", node)
                else:
                    self._normed(node.outputs[0], norm)
            else:
                self._other_reader(value, node, norm)

    def _other_reader(self, value: ir.Value, node: ir.Node, norm: ir.Node) -> None:
        found = channel_operands(node, self.edit)
        if not isinstance(found, str) and (found.adds or op_name(node) in NORMS):
            self._post_norm(norm)
            if value not in self.stream.values:
                self._enter(value, node)
            return
        self._object(
            f"{node.op_type} reads the result of its norm, which is no linear layer{hint(node)}",
            node,
        )

    def _post_norm(self, norm: ir.Node) -> None:
        # It says more than what else is in the way.
        self.stream.objection = Miss(
            "a norm's result is part of it (post-norm): the norm's scale lies between what writes "
            "the stream, and cannot be folded into what reads it",
            norm,
        )

    def _check_centered(self) -> None:
        """What subtracts the mean must be all that reads: the mean is taken out of the writers."""
        for norm in self.stream.norms:
            if NORMS[op_name(norm)].kind == "rms":
                self._object("LayerNorm and RMSNorm both read it", norm)
        for read in self.stream.reads:
            if read.norm is None:
                self._object(
                    "a linear layer reads it with its mean, which its norms subtract",
                    read.place.node,
                )
