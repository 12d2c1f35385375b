"""How the tokens of a sequence flow through a graph: is every operator but attention one by one?

A cache of keys and values is right only where the result for a token depends on other tokens
through attention alone. This walk follows the axis of tokens from the inputs through each
operator, and finds where positions are counted: those places must count from the past on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import onnx_ir as ir
import sympy

from lwc.core.diagnostics import describe
from lwc.core.dims import Dim, multiply, product, subtract
from lwc.core.errors import PassError
from lwc.core.walk import op_name
from lwc.rewrite import Editor, attribute

__all__ = [
    "FIXED",
    "LENGTH",
    "Flow",
    "TokenFlow",
    "Tokens",
    "follow_tokens",
    "token_inputs",
]

_MS = "com.microsoft::"
_GQA = f"{_MS}GroupQueryAttention"
_FAR = 2**31 - 1
"""Ends from here on keep all that follows."""


@dataclass(frozen=True)
class Tokens:
    """A value with an element, or a row, for each token.

    Attributes:
        axis: The axis of tokens.
        outer: Extents that lie before the tokens in that axis, such as a batch merged into it.
        whole: Whether there is one for each token of the past, too, as in an attention mask.
        last: Whether there is one for the last token only.
    """

    axis: int
    outer: Dim = 1
    whole: bool = False
    last: bool = False


Flow: TypeAlias = Tokens | Literal["fixed", "length"]
FIXED: Flow = "fixed"
"""The same whatever the tokens are, and however many."""
LENGTH: Flow = "length"
"""Depends on the number of tokens alone: extents."""


@dataclass
class TokenFlow:
    """What the walk found.

    Attributes:
        flows: The flow of every value.
        ranges: `Range` nodes that count positions from the number of tokens.
        slices: `Slice` nodes that take rows of a table from the number of tokens.
        offsets: `RotaryEmbedding` nodes that are told the first position only.
        shapes: Nodes that take the shape of something with an element for every token of the mask.
        joins: Places where a value for every token of the mask meets one for new tokens only: the
            node and the input that must be cut to the new tokens.
    """

    flows: dict[ir.Value, Flow] = field(default_factory=dict)
    ranges: list[ir.Node] = field(default_factory=list)
    slices: list[ir.Node] = field(default_factory=list)
    offsets: list[ir.Node] = field(default_factory=list)
    shapes: list[ir.Node] = field(default_factory=list)
    joins: list[tuple[ir.Node, int]] = field(default_factory=list)


def token_inputs(edit: Editor, length: Dim, mask: str) -> dict[ir.Value, Tokens]:
    """Return the graph inputs with an axis of tokens.

    Args:
        edit: Knows shapes.
        length: The number of new tokens.
        mask: Name of the input that has an element for each token of the past, too.

    Raises:
        PassError: An input has two axes of tokens.
    """
    found = {}
    for value in edit.module.graph.inputs:
        shape = edit.shape(value) or ()
        whole = value.name == mask and len(shape) == 2
        axes = [1] if whole else [axis for axis, dim in enumerate(shape) if dim == length]
        if len(axes) > 1:
            raise PassError(f"input '{value.name}' has two axes of tokens")
        if axes:
            found[value] = Tokens(axes[0], whole=whole)
    return found


def follow_tokens(
    edit: Editor, length: sympy.Symbol, inputs: dict[ir.Value, Tokens], attention: set[ir.Node]
) -> TokenFlow:
    """Follow tokens through the main graph.

    Args:
        edit: Knows shapes.
        length: The number of tokens.
        inputs: The inputs with tokens.
        attention: Nodes that may relate tokens: causal attention.

    Raises:
        PassError: A node outside `attention` relates tokens with each other, or may.
    """
    walk = _Walk(edit, length)
    walk.found.flows.update(inputs)
    for node in edit.module.graph:
        if node in attention:
            walk.meet(node)
            walk.found.flows.update(dict.fromkeys(node.outputs, Tokens(1)))
            continue
        walk.visit(node)
    return walk.found


class _Walk:
    def __init__(self, edit: Editor, length: sympy.Symbol) -> None:
        self.edit = edit
        self.length = length
        self.found = TokenFlow()

    def flow(self, value: ir.Value | None) -> Flow:
        return FIXED if value is None else self.found.flows.get(value, FIXED)

    def visit(self, node: ir.Node) -> None:
        """Find the flows of a node's outputs."""
        flows = [self.flow(value) for value in node.inputs]
        if self._reads_outer(node):
            self.refuse(node, "its body reads tokens")
        if all(flow == FIXED for flow in flows):
            return
        if not any(isinstance(flow, Tokens) for flow in flows):
            made = self._of_lengths(node)
        else:
            rule = _RULES.get(op_name(node))
            last = self.meet(node)
            made = self.refuse(node, "it may relate tokens") if rule is None else rule(self, node)
            if last and isinstance(made, Tokens):
                made = replace(made, last=True)
        for output in node.outputs:
            self.found.flows[output] = made

    def meet(self, node: ir.Node) -> bool:
        """Tell whether a node reads the last token only; refuse where it reads others, too."""
        flows = [self.flow(value) for value in node.inputs]
        kinds = {flow.last for flow in flows if isinstance(flow, Tokens) and not flow.whole}
        if len(kinds) > 1 or (op_name(node) == _GQA and True in kinds):
            self.refuse(node, "the last token meets all")
        return kinds == {True}

    def _reads_outer(self, node: ir.Node) -> bool:
        return any(
            self.flow(value) != FIXED
            for each in node.attributes.values()
            if each.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for graph in (each.value if isinstance(each.value, list) else [each.value])
            for inner in graph.all_nodes()
            for value in inner.inputs
            if value is not None
        )

    def refuse(self, node: ir.Node, reason: str) -> Flow:
        raise PassError(
            f"it depends on more than one token: {reason}",
            node=describe(node),
            remedy="fuse attention first (fuse-attention); only causal models have a cache",
        )

    def _counts(self, dim: Dim) -> bool:
        return not isinstance(dim, int) and self.length in dim.free_symbols

    def _of_lengths(self, node: ir.Node) -> Flow:
        """Return the flow of what is computed from extents alone."""
        if node.op_type == "Range":
            start, step = (self.edit.symbolic(node.inputs[place]) for place in (0, 2))
            if step != [1] or not start or self._counts(start[0]) or not self._has_all(node, 0):
                return self.refuse(node, "it does not count tokens one by one, from a fixed number")
            self.found.ranges.append(node)
            return Tokens(0)
        shape = self.edit.shape(node.outputs[0])
        axes = [axis for axis, dim in enumerate(shape or ()) if self._counts(dim)]
        if not axes:
            return LENGTH
        assert shape is not None
        if node.op_type == "Slice" and self.flow(node.inputs[0]) == FIXED and len(axes) == 1:
            if not self._takes_rows(node):
                return self.refuse(
                    node, "it does not take one row for each token, from a fixed one"
                )
            self.found.slices.append(node)
            return Tokens(axes[0])
        if node.op_type in ("Expand", "ConstantOfShape") and len(axes) == 1:
            return Tokens(axes[0], _outer(shape[axes[0]], self.length))
        return self.refuse(node, "it makes a value as large as the sequence, or its square")

    def _has_all(self, node: ir.Node, axis: int) -> bool:
        shape = self.edit.shape(node.outputs[0])
        return shape is not None and self.edit.same_dim(shape[axis], self.length)

    def _takes_rows(self, node: ir.Node) -> bool:
        """Tell whether a slice takes as many neighbouring rows as there are new tokens."""
        begins, ends = (self.edit.symbolic(node.inputs[place]) for place in (1, 2))
        steps = self.edit.ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else [1]
        if not begins or not ends or len(begins) != 1 or steps != [1]:
            return False
        begin = begins[0]
        fixed = begin >= 0 if isinstance(begin, int) else not self._counts(begin)
        return fixed and self.edit.same_dim(subtract(ends[0], begin), self.length)

    # Rules, by operator

    def pointwise(self, node: ir.Node) -> Flow:
        """Operands broadcast; all tokens must lie along one axis."""
        rank = self.edit.rank(node.outputs[0])
        if rank is None:
            return self.refuse(node, "its rank is not known")
        found: dict[Tokens, list[int]] = {}
        for place, value in enumerate(node.inputs):
            flow = self.flow(value)
            own = self.edit.rank(value)
            if isinstance(flow, Tokens) and own is not None:
                here = Tokens(flow.axis + rank - own, flow.outer, flow.whole)
                found.setdefault(here, []).append(place)
            elif flow == LENGTH:
                return self.refuse(node, "it computes with the number of tokens")
        return self._agreed(node, found)

    def _agreed(self, node: ir.Node, found: dict[Tokens, list[int]]) -> Flow:
        if len(found) == 2:
            new, whole = sorted(found, key=lambda flow: flow.whole)
            if whole.whole and not new.whole and (new.axis, new.outer) == (whole.axis, whole.outer):
                self.found.joins += [(node, place) for place in found[whole]]
                return new
        if len(found) != 1:
            return self.refuse(node, "tokens along one axis meet tokens along another")
        return next(iter(found))

    def along(self, node: ir.Node, axes: Sequence[int]) -> Flow:
        """The operator works along these axes, none of which may be that of tokens."""
        (flow,) = self._of_tokens(node, 0)
        rank = self.edit.rank(node.inputs[0])
        if rank is None or flow.axis in {axis % rank for axis in axes}:
            return self.refuse(node, "it works along the tokens")
        return flow

    def _of_tokens(self, node: ir.Node, *places: int) -> list[Tokens]:
        """Return the flows of these inputs, which alone may have tokens."""
        made = []
        for place, value in enumerate(node.inputs):
            flow = self.flow(value)
            if place in places and isinstance(flow, Tokens):
                made.append(flow)
            elif flow != FIXED and (place in places or flow != LENGTH):
                self.refuse(node, f"its input {place} has tokens")
        if len(made) != len(places):
            self.refuse(node, "tokens stand where none may")
        return made


def _outer(dim: Dim, length: sympy.Symbol) -> Dim:
    return sympy.cancel(dim / length) if dim != length else 1


Rule: TypeAlias = Callable[[_Walk, ir.Node], Flow]
_RULES: dict[str, Rule] = {}


def _flows(*ops: str) -> Callable[[Rule], Rule]:
    def wrap(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(ops, function))
        return function

    return wrap


@_flows(
    "Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "Cast", "Ceil", "Clip", "Cos", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor",
    "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod",
    "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign",
    "Sin", "Softplus", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "Where", "Xor", f"{_MS}BiasGelu",
    f"{_MS}FastGelu", f"{_MS}Gelu", f"{_MS}QuickGelu",
)  # fmt: skip
def _pointwise(walk: _Walk, node: ir.Node) -> Flow:
    return walk.pointwise(node)


@_flows(f"{_MS}SkipLayerNormalization", f"{_MS}SkipSimplifiedLayerNormalization")
def _skip_norm(walk: _Walk, node: ir.Node) -> Flow:
    first, second = (walk.flow(value) for value in node.inputs[:2])
    rank = walk.edit.rank(node.inputs[0])
    if first != second or not isinstance(first, Tokens) or rank is None or first.axis == rank - 1:
        return walk.refuse(node, "tokens along one axis meet tokens along another")
    return first


@_flows("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _norm(walk: _Walk, node: ir.Node) -> Flow:
    rank = walk.edit.rank(node.inputs[0]) or 1
    return walk.along(node, range(attribute(node, "axis", -1) % rank, rank))


@_flows("Softmax", "LogSoftmax")
def _softmax(walk: _Walk, node: ir.Node) -> Flow:
    return walk.along(node, [attribute(node, "axis", -1)])


@_flows(
    f"{_MS}MatMulNBits", f"{_MS}DynamicQuantizeMatMul", f"{_MS}MatMulBnb4", "DynamicQuantizeLinear",
    "DequantizeLinear", "QuantizeLinear", "lwc::DynamicQuantMatMul",
)  # fmt: skip
def _quantized(walk: _Walk, node: ir.Node) -> Flow:
    if node.op_type == "DynamicQuantizeLinear":
        return walk.refuse(node, "one scale serves all tokens")
    return walk.along(node, [-1])


@_flows("MatMul")
def _matmul(walk: _Walk, node: ir.Node) -> Flow:
    ranks = [walk.edit.rank(value) for value in node.inputs]
    if ranks[0] is None or ranks[1] is None or ranks[1] > ranks[0]:
        return walk.refuse(node, "its weights have more axes than what they multiply")
    return walk.along(node, [-1])


@_flows("Gemm")
def _gemm(walk: _Walk, node: ir.Node) -> Flow:
    if attribute(node, "transA", 0):
        return walk.refuse(node, "it works along the tokens")
    return walk.along(node, [-1])


@_flows("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare")
def _reduce(walk: _Walk, node: ir.Node) -> Flow:
    rank = walk.edit.rank(node.inputs[0])
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = walk.edit.ints(given) if given is not None else attribute(node, "axes")
    if axes is None or rank is None:
        return walk.refuse(node, "it reduces over all axes")
    before = walk.flow(node.inputs[0])
    if isinstance(before, Tokens) and before.whole and before.axis in {a % rank for a in axes}:
        return LENGTH  # tokens of the mask, counted
    flow = walk.along(node, axes)
    assert isinstance(flow, Tokens)
    gone = 0 if attribute(node, "keepdims", 1) else sum(a % rank < flow.axis for a in axes)
    return Tokens(flow.axis - gone, flow.outer, flow.whole)


@_flows("CumSum")
def _cumsum(walk: _Walk, node: ir.Node) -> Flow:
    """Along a mask of all tokens, past ones too, it sees what it saw before."""
    (flow,) = walk._of_tokens(node, 0)
    axis, rank = walk.edit.ints(node.inputs[1]), walk.edit.rank(node.inputs[0])
    if not axis or rank is None:
        return walk.refuse(node, "its axis is not known")
    backwards = attribute(node, "reverse", 0)
    if axis[0] % rank == flow.axis and (not flow.whole or backwards or flow.outer != 1):
        return walk.refuse(node, "it sums over the tokens")
    return flow


@_flows("Transpose")
def _transpose(walk: _Walk, node: ir.Node) -> Flow:
    (flow,) = walk._of_tokens(node, 0)
    rank = walk.edit.rank(node.inputs[0]) or 0
    perm = list(attribute(node, "perm", list(reversed(range(rank)))))
    return Tokens(perm.index(flow.axis), flow.outer, flow.whole)


@_flows("Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand")
def _view(walk: _Walk, node: ir.Node) -> Flow:
    """Find the axis whose extents, with all before them, hold the tokens."""
    (flow,) = walk._of_tokens(node, 0)
    before, after = walk.edit.shape(node.inputs[0]), walk.edit.shape(node.outputs[0])
    if before is None or after is None:
        return walk.refuse(node, "its shape is not known")
    if node.op_type == "Expand":
        axis = flow.axis + len(after) - len(before)
        kept = walk.edit.same_dim(before[flow.axis], after[axis])
        return Tokens(axis, flow.outer, flow.whole) if kept else walk.refuse(node, "it widens them")
    ahead = multiply(product(before[: flow.axis]), flow.outer)
    total: Dim = 1
    for axis, dim in enumerate(after):
        if walk._counts(dim):
            outer = _outer(dim, walk.length)
            if walk.edit.same_dim(multiply(total, outer), ahead):
                return Tokens(axis, outer, flow.whole)
        total = multiply(total, dim)
    return walk.refuse(node, "tokens and other axes are dealt anew")


@_flows("Gather")
def _gather(walk: _Walk, node: ir.Node) -> Flow:
    table, ids = walk.flow(node.inputs[0]), walk.flow(node.inputs[1])
    axis = attribute(node, "axis", 0)
    rank, width = walk.edit.rank(node.inputs[0]), walk.edit.rank(node.inputs[1])
    if rank is None or width is None or (isinstance(table, Tokens) and isinstance(ids, Tokens)):
        return walk.refuse(node, "it looks tokens up by tokens")
    axis %= rank
    if isinstance(ids, Tokens):
        return Tokens(axis + ids.axis, ids.outer, ids.whole)
    (flow,) = walk._of_tokens(node, 0)
    if flow.axis == axis or ids != FIXED:
        return walk.refuse(node, "it picks tokens")
    return Tokens(flow.axis + (width - 1 if axis < flow.axis else 0), flow.outer, flow.whole)


@_flows(f"{_MS}GatherBlockQuantized")
def _gather_quantized(walk: _Walk, node: ir.Node) -> Flow:
    (flow,) = walk._of_tokens(node, 1)
    return Tokens(attribute(node, "gather_axis", 0) + flow.axis, flow.outer, flow.whole)


@_flows("Split", "Slice")
def _piece(walk: _Walk, node: ir.Node) -> Flow:
    (flow,) = walk._of_tokens(node, 0)
    rank = walk.edit.rank(node.inputs[0]) or 0
    if node.op_type == "Split":
        axes = [attribute(node, "axis", 0)]
    else:
        given = node.inputs[3] if len(node.inputs) > 3 else None
        begins = walk.edit.symbolic(node.inputs[1]) or []
        found = walk.edit.ints(given) if given is not None else list(range(len(begins)))
        if found is None or not begins:
            return walk.refuse(node, "its axes are not known")
        axes = found
    if flow.axis not in {axis % rank for axis in axes}:
        return flow
    if node.op_type == "Slice" and len(axes) == 1:
        if flow.whole and _takes_all(walk, node):
            return flow
        if flow.whole and _takes_new(walk, node, flow.axis):
            return Tokens(flow.axis)
        if not flow.whole and _takes_last(walk, node):
            return replace(flow, last=True)
    return walk.refuse(node, "it takes some of the tokens")


def _takes_all(walk: _Walk, node: ir.Node) -> bool:
    return walk.edit.ints(node.inputs[1]) == [0] and _reaches_the_end(walk, node)


def _takes_new(walk: _Walk, node: ir.Node, axis: int) -> bool:
    """Tell whether a slice of all tokens keeps as many of the last as are new.

    A fixed begin is none: with a past it is another place, counted from the end.
    """
    begins, shape = walk.edit.symbolic(node.inputs[1]), walk.edit.shape(node.inputs[0])
    if not begins or isinstance(begins[0], int) or shape is None:
        return False
    places = (multiply(-1, walk.length), subtract(shape[axis], walk.length))
    fits = any(walk.edit.same_dim(begins[0], place) for place in places)
    return fits and _reaches_the_end(walk, node, shape[axis])


def _takes_last(walk: _Walk, node: ir.Node) -> bool:
    return walk.edit.ints(node.inputs[1]) == [-1] and _reaches_the_end(walk, node)


def _reaches_the_end(walk: _Walk, node: ir.Node, extent: Dim | None = None) -> bool:
    ends = walk.edit.symbolic(node.inputs[2])
    steps = walk.edit.ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else [1]
    if not ends or steps != [1]:
        return False
    if isinstance(ends[0], int):
        return ends[0] >= _FAR
    return extent is not None and walk.edit.same_dim(ends[0], extent)


@_flows("Concat")
def _concat(walk: _Walk, node: ir.Node) -> Flow:
    rank = walk.edit.rank(node.outputs[0]) or 0
    flows = {walk.flow(value) for value in node.inputs}
    tokens = [flow for flow in flows if isinstance(flow, Tokens)]
    if len(tokens) != 1 or LENGTH in flows:
        return walk.refuse(node, "tokens along one axis meet tokens along another")
    if attribute(node, "axis") % rank == tokens[0].axis:
        return walk.refuse(node, "it puts something before or behind the tokens")
    return tokens[0]


@_flows("Shape")
def _shape(walk: _Walk, node: ir.Node) -> Flow:
    (flow,) = walk._of_tokens(node, 0)
    if flow.whole:
        walk.found.shapes.append(node)
    content = walk.edit.symbolic(node.outputs[0])
    known = content is not None and not any(map(walk._counts, content))
    return FIXED if known else LENGTH


@_flows(f"{_MS}RotaryEmbedding", "RotaryEmbedding")
def _rotary(walk: _Walk, node: ir.Node) -> Flow:
    flow = walk.flow(node.inputs[0])
    rank = walk.edit.rank(node.inputs[0])
    if not isinstance(flow, Tokens) or flow.axis != (rank or 0) - 2:
        return walk.refuse(node, "tokens do not lie where it wants them")
    if node.domain and walk.edit.rank(node.inputs[1]) == 1:
        walk.found.offsets.append(node)
    return flow
