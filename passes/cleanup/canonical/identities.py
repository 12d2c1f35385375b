"""Nodes that hand on their input unchanged.

Floating-point care: `x * 1`, `x / 1`, `x - 0` and `x + (-0)` are exact for every x; `x + 0` is
not (it turns -0 into +0) and stays.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from lwc.rewrite import EDITED, Editor, Miss, Outcome, Rule, attribute, producer_of, rule

__all__ = ["RULES"]


@rule("Identity")
def identity(node: ir.Node, edit: Editor) -> Outcome:
    """Identity: its input. One that names a graph output stays where nothing else can."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None:
        return None
    assert node.graph is not None
    if result.is_graph_output() and not edit.may_become_output(source, node.graph):
        if not result.uses():
            return None
        edit.redirect(result, source)
        return EDITED
    return source


@rule("Dropout")
def dropout_in_inference(node: ir.Node, edit: Editor) -> Outcome:
    """Dropout whose training mode is off: its input."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and edit.scalar(training) is not False:
        return Miss("training_mode is not known to be false")
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return Miss("its mask is used")
    return node.inputs[0]


@rule("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Flatten")
def same_shape(node: ir.Node, edit: Editor) -> Outcome:
    """A view or a broadcast that ends in the shape it started from."""
    return node.inputs[0] if edit.same_shape(node.inputs[0], node.outputs[0]) else None


@rule("Slice")
def whole_slice(node: ir.Node, edit: Editor) -> Outcome:
    """A slice with steps of 1 that keeps every extent keeps everything."""
    if not edit.same_shape(node.inputs[0], node.outputs[0]):
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        steps = edit.ints(node.inputs[4])
        if steps is None or any(step != 1 for step in steps):
            return None
    return node.inputs[0]


@rule("Pad")
def zero_pad(node: ir.Node, edit: Editor) -> Outcome:
    """Padding by nothing."""
    pads = edit.ints(node.inputs[1])
    return node.inputs[0] if pads is not None and not any(pads) else None


@rule("Concat", "Sum", "Mean", "Max", "Min")
def single_operand(node: ir.Node, edit: Editor) -> Outcome:
    """A variadic operator with one operand."""
    return node.inputs[0] if len(node.inputs) == 1 else None


@rule("Split")
def single_part(node: ir.Node, edit: Editor) -> Outcome:
    """A split into one part."""
    return node.inputs[0] if len(node.outputs) == 1 else None


@rule("Concat")
def empty_operands(node: ir.Node, edit: Editor) -> Outcome:
    """A concatenation without its operands of extent 0."""
    axis = attribute(node, "axis", 0)
    kept = []
    for value in node.inputs:
        shape = edit.shape(value)
        extent = None if not shape or not -len(shape) <= axis < len(shape) else shape[axis]
        if not (isinstance(extent, int) and extent == 0):
            kept.append(value)
    if len(kept) == len(node.inputs) or not kept:
        return None
    return edit.op("Concat", kept, {"axis": axis})


_NEUTRAL = {"Mul": 1, "Div": 1, "Pow": 1, "Add": 0, "Sub": 0, "And": True, "Or": False}
_COMMUTES = {"Mul", "Add", "And", "Or"}


@rule(*_NEUTRAL)
def neutral_operand(node: ir.Node, edit: Editor) -> Outcome:
    """An arithmetic or logical operation with its neutral element, where nothing broadcasts."""
    op = node.op_type
    for kept, other in ((0, 1), (1, 0)):
        if other == 0 and op not in _COMMUTES:
            break
        scalar = edit.scalar(node.inputs[other])
        if scalar is None or scalar != _NEUTRAL[op]:
            continue
        if isinstance(scalar, float) and op in ("Add", "Sub"):
            negative_zero = math.copysign(1.0, scalar) < 0
            if negative_zero != (op == "Add"):
                return Miss(f"{op} of this zero changes the sign of -0.0")
        if not edit.same_shape(node.inputs[kept], node.outputs[0]):
            return Miss("it may broadcast its operand")
        return node.inputs[kept]
    return None


@rule("Where")
def where_decided(node: ir.Node, edit: Editor) -> Outcome:
    """A selection with a constant condition or equal branches."""
    condition, yes, no = node.inputs
    if yes is no:
        chosen = yes
    else:
        known = edit.ints(condition)
        decided = edit.scalar(condition)
        if decided is None and known and len(set(known)) == 1:
            decided = bool(known[0])
        if decided is None:
            return None
        chosen = yes if decided else no
    if not edit.same_shape(chosen, node.outputs[0]):
        return Miss("the chosen branch may be broadcast")
    return chosen


@rule("Not", "Neg")
def involution(node: ir.Node, edit: Editor) -> Outcome:
    """Not(Not(x)) and Neg(Neg(x))."""
    producer = producer_of(node.inputs[0], node.op_type)
    return None if producer is None else producer.inputs[0]


@rule("Relu", "Abs", "Ceil", "Floor", "Round", "Sign")
def idempotent(node: ir.Node, edit: Editor) -> Outcome:
    """f(f(x)) = f(x)."""
    return None if producer_of(node.inputs[0], node.op_type) is None else node.inputs[0]


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")
def reduce_nothing(node: ir.Node, edit: Editor) -> Outcome:
    """A reduction over extents of 1."""
    source, result = edit.shape(node.inputs[0]), edit.shape(node.outputs[0])
    if source is None or result is None:
        return None
    if edit.same_shape(node.inputs[0], node.outputs[0]):
        return node.inputs[0]
    if attribute(node, "keepdims", 1) == 1:
        return None
    axes = attribute(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = edit.ints(node.inputs[1])
    if not axes:
        return None
    if any(not isinstance(source[axis], int) or source[axis] != 1 for axis in axes):
        return None
    return edit.op("Squeeze", [node.inputs[0], edit.constant(list(axes), "axes")])


@rule("Clip")
def unbounded_clip(node: ir.Node, edit: Editor) -> Outcome:
    """A clip without bounds."""
    return node.inputs[0] if all(bound is None for bound in node.inputs[1:]) else None


RULES: tuple[Rule, ...] = (
    identity,
    dropout_in_inference,
    same_shape,
    whole_slice,
    zero_pad,
    single_operand,
    single_part,
    empty_operands,
    neutral_operand,
    where_decided,
    involution,
    idempotent,
    reduce_nothing,
    unbounded_clip,
)
