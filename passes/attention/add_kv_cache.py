"""add-kv-cache: a causal model over whole sequences becomes one that goes on from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import sympy

from lwc.core.diagnostics import describe
from lwc.core.dims import as_ir_dim
from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.passes.attention.lowering import MASKS_PAD_RIGHT
from lwc.passes.attention.token_flow import TokenFlow, Tokens, follow_tokens, token_inputs
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult
from lwc.rewrite import Editor, attribute, remove_unused

__all__ = ["AddKvCache"]

_GQA = "com.microsoft::GroupQueryAttention"
_PAST_KEY, _PAST_VALUE, _LAST, _TOTAL = 3, 4, 5, 6


@dataclass(frozen=True)
class AddKvCache(Pass):
    """Let a causal model read the keys and values of earlier tokens, and give those of all.

    The inputs `past_key_values.N.key` and `.value` are `[batch, heads, past, size]`, the outputs
    `present.N.key` and `.value` `[batch, heads, past + new, size]`, as Hugging Face names them;
    `attention_mask` covers past and new tokens, `[batch, past + new]`. With an empty past the
    model computes what it computed before.

    Attributes:
        mask: The input that masks padding; made where there is none of that name.
    """

    mask: str = "attention_mask"

    name: ClassVar[str] = "add-kv-cache"
    contract: ClassVar[Exact] = Exact(assumptions=(MASKS_PAD_RIGHT,))

    @property
    def keeps_interface(self) -> bool:
        """It adds inputs and outputs, and the mask covers the past."""
        return False

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Add the cache.

        Raises:
            PassError: There is no causal attention in a form that takes a cache, or the graph
                relates tokens outside of it; the message names the node.
        """
        nodes = [node for node in module.graph if op_name(node) == _GQA]
        if nodes and all(_has_past(node) for node in nodes):
            ctx.note(f"the model has a cache of {len(nodes)} layers already")
            return PassResult(False)
        _check(nodes, module)
        edit = ctx.editor()
        cache = _Cache(edit, nodes, self.mask)
        if cache.padding is not None:
            ctx.assume(MASKS_PAD_RIGHT)
        ctx.limit.spend("cache", nodes[0])
        cache.add()
        ctx.analyses.invalidate()
        remove_unused(module)
        shape = cache.layers[0]
        ctx.note(
            f"{len(nodes)} layers, {shape.bytes_per_token * len(nodes)} bytes of cache per token"
        )
        return PassResult(True, statistics={"layers": len(nodes)}, rewrites={"cache": len(nodes)})


def _has_past(node: ir.Node) -> bool:
    return len(node.inputs) > _PAST_VALUE and node.inputs[_PAST_KEY] is not None


def _check(nodes: Sequence[ir.Node], module: Module) -> None:
    if not nodes:
        raise PassError(
            "there is no GroupQueryAttention in the main graph",
            remedy="run fuse-attention first, and see what --explain=fuse-attention says",
        )
    for node in nodes:
        if _has_past(node):
            raise PassError("it has a past already, but others have none", node=describe(node))
        if not attribute(node, "causal", 1) or (len(node.inputs) > 10 and node.inputs[10]):
            raise PassError(
                "it is not causal by itself: a mask is added to its scores",
                node=describe(node),
                remedy=f"--grant '{MASKS_PAD_RIGHT}' to fuse-attention if that holds; "
                "only causal models have a cache",
            )
    inside = [n for n in module.nodes() if op_name(n) == _GQA and n.graph is not module.graph]
    if inside:
        raise PassError("it stands in a subgraph or function", node=describe(inside[0]))


@dataclass(frozen=True)
class _Layer:
    """Heads and their size in one layer, and what a token takes in its cache."""

    node: ir.Node
    heads: int
    size: int
    dtype: ir.DataType

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.heads * self.size * self.dtype.bitwidth // 8


@dataclass
class _Cache:
    """The work on one module."""

    edit: Editor
    nodes: Sequence[ir.Node]
    mask: str
    layers: list[_Layer] = field(init=False)
    flow: TokenFlow = field(init=False)
    padding: ir.Value | None = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [_layer(node, self.edit) for node in self.nodes]
        shape = self.edit.shape(self.nodes[0].inputs[0])
        assert shape is not None
        self.batch, self.length = shape[:2]
        if not isinstance(self.length, sympy.Symbol):
            raise PassError(
                f"the sequence has a fixed length of {self.length}",
                remedy="export the model with a symbolic sequence length",
            )
        inputs = token_inputs(self.edit, self.length, self.mask)
        self.padding = next((value for value, flow in inputs.items() if flow.whole), None)
        self.flow = follow_tokens(self.edit, self.length, inputs, set(self.nodes))

    def add(self) -> None:
        """Rewrite the graph."""
        graph = self.edit.module.graph
        first = next(iter(graph))
        self.edit.at(first)
        self._measure()
        mask = self._mask()
        total = self._extent(mask)
        count = self.edit.op("Cast", [total], {"to": int(ir.DataType.INT32)})
        new = self._new()
        past = self.edit.op("Sub", [total, new])
        last = self._last(mask)
        self._shift(past)
        self._cut(past, total)
        for index, layer in enumerate(self.layers):
            self._add_layer(index, layer, last, count)

    def _mask(self) -> ir.Value:
        """Return the mask of past and new tokens, `[batch, past + new]`."""
        module = self.edit.module
        dims = [as_ir_dim(self.batch), as_ir_dim(self._past + self.length)]
        if self.padding is not None:
            self.padding.shape = ir.Shape(dims)
            return self.padding
        if any(value.name == self.mask for value in module.graph.inputs):
            raise PassError(f"input '{self.mask}' is no mask of tokens")
        made = ir.Value(name=self.mask, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.INT64))
        module.graph.inputs.append(made)
        return made

    @property
    def _past(self) -> sympy.Symbol:
        return sympy.Symbol("past_sequence_length", integer=True, nonnegative=True)

    def _new(self) -> ir.Value:
        graph = self.edit.module.graph
        counted = [
            value for value in graph.inputs if value is not self.padding
            and self.length in (self.edit.shape(value) or ())
        ]  # fmt: skip
        if not counted:
            raise PassError(
                f"queries have length {self.length}, which no input is known to have",
                remedy="state the lengths of the inputs by name when exporting",
            )
        source = counted[0]
        axis = list(self.edit.shape(source) or ()).index(self.length)
        return self._extent(source, axis)

    def _extent(self, value: ir.Value, axis: int = 1) -> ir.Value:
        """Return one extent of a value, int64 `[1]`."""
        place = self.edit.constant(np.array([axis], np.int64), "axis")
        return self.edit.op("Gather", [self.edit.op("Shape", [value]), place], {"axis": 0})

    def _last(self, mask: ir.Value) -> ir.Value:
        """Return the place of each sequence's last token, int32 `[batch]`."""
        wide = self.edit.op("Cast", [mask], {"to": int(ir.DataType.INT32)})
        axis = self.edit.constant(np.array([1], np.int64), "axis")
        seen = self.edit.op("ReduceSum", [wide, axis], {"keepdims": 0})
        return self.edit.op("Sub", [seen, self.edit.constant(np.array(1, np.int32), "one")])

    def _shift(self, past: ir.Value) -> None:
        """Let positions that are counted from 0 be counted from the past on."""
        for node in self.flow.ranges:
            self.edit.at(node)
            for place in (0, 1):
                self._add_to(node, place, past)
        for node in self.flow.slices:
            self.edit.at(node)
            for place in (1, 2):
                self._add_to(node, place, past)
        for node in self.flow.offsets:
            self.edit.at(node)
            self._add_to(node, 1, past)

    def _add_to(self, node: ir.Node, place: int, past: ir.Value) -> None:
        value = node.inputs[place]
        assert value is not None
        scalar = self.edit.rank(value) == 0
        shift = self.edit.op("Squeeze", [past]) if scalar else past
        dtype = self.edit.dtype(value)
        if dtype is not None and dtype != ir.DataType.INT64:
            shift = self.edit.op("Cast", [shift], {"to": int(dtype)})
        self.edit.set_input(node, place, self.edit.op("Add", [value, shift]))

    def _measure(self) -> None:
        """Let what took the extents of the mask take those of new tokens."""
        inputs = [value for value in self.edit.module.graph.inputs if value is not self.padding]
        for node in self.flow.shapes:
            source = node.inputs[0]
            alike = [value for value in inputs if self.edit.same_shape(value, source)]
            if not alike:
                raise PassError(
                    "it takes the shape of the mask, and no other input has it", node=describe(node)
                )
            self.edit.set_input(node, 0, alike[0])

    def _cut(self, past: ir.Value, total: ir.Value) -> None:
        """Cut what is there for every token of the mask to the new ones, where only those meet."""
        for node, place in self.flow.joins:
            value = node.inputs[place]
            assert value is not None
            flow = self.flow.flows[value]
            assert isinstance(flow, Tokens)
            axis = self.edit.constant(np.array([flow.axis], np.int64), "axis")
            cut = self.edit.at(node).op("Slice", [value, past, total, axis])
            self.edit.set_input(node, place, cut)

    def _add_layer(self, index: int, layer: _Layer, last: ir.Value, count: ir.Value) -> None:
        graph, node = self.edit.module.graph, layer.node
        fixed = as_ir_dim(self.batch), layer.heads
        whole = as_ir_dim(self._past + self.length)
        kind = ir.TensorType(layer.dtype)
        for place, what in ((_PAST_KEY, "key"), (_PAST_VALUE, "value")):
            shape = ir.Shape([*fixed, as_ir_dim(self._past), layer.size])
            made = ir.Value(name=f"past_key_values.{index}.{what}", shape=shape, type=kind)
            graph.inputs.append(made)
            self.edit.set_input(node, place, made)
        self.edit.set_input(node, _LAST, last)
        self.edit.set_input(node, _TOTAL, count)
        node.resize_outputs(3)
        for output, what in zip(node.outputs[1:], ("key", "value"), strict=True):
            output.name = f"present.{index}.{what}"
            output.type, output.shape = kind, ir.Shape([*fixed, whole, layer.size])
            graph.outputs.append(output)


def _layer(node: ir.Node, edit: Editor) -> _Layer:
    """Read heads and their size from the operands; keys may be packed with the queries."""
    shape, dtype = edit.shape(node.inputs[0]), edit.dtype(node.inputs[0])
    heads, shared = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    packed = node.inputs[1] is None
    width = shape[2] if shape is not None and len(shape) == 3 else None
    if not isinstance(width, int) or dtype is None:
        raise PassError("the shape of its queries is not known", node=describe(node))
    return _Layer(node, shared, width // (heads + 2 * shared * packed), dtype)
