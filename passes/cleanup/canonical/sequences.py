"""Sequences of which every element is known: tensors."""

from __future__ import annotations

import onnx_ir as ir

from lwc.rewrite import EDITED, Editor, Outcome, Rule, attribute, producer_of, rule

__all__ = ["RULES"]


@rule("SplitToSequence")
def split_to_sequence(node: ir.Node, edit: Editor) -> Outcome:
    """Parts of known extents that are only taken out again: a Split."""
    extents = _extents(node, edit)
    readers = [user for user, _ in node.outputs[0].uses()]
    if extents is None or node.outputs[0].is_graph_output() or not readers:
        return None
    if any(reader.graph is not node.graph for reader in readers):
        return None
    places = [_place(reader, len(extents), edit) for reader in readers]
    known = [place for place in places if place is not None]
    if len(known) != len(places):
        return None
    split = edit.node(
        "Split",
        [node.inputs[0], edit.constant(extents, "split")],
        {"axis": attribute(node, "axis", 0)},
        outputs=len(extents),
    )
    for reader, place in zip(readers, known, strict=True):
        edit.replace(reader.outputs[0], split.outputs[place])
    return EDITED


def _extents(node: ir.Node, edit: Editor) -> list[int] | None:
    """Return the extents of the parts along the axis, where all of them are numbers."""
    shape = edit.shape(node.inputs[0])
    whole = None if not shape else shape[attribute(node, "axis", 0) % len(shape)]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = edit.ints(node.inputs[1])
        if given is None or edit.rank(node.inputs[1]) != 0:
            return given or None
        (size,) = given
        if size == 1 and not attribute(node, "keepdims", 1):
            return None  # ONNX Runtime drops the axis
    elif attribute(node, "keepdims", 1):
        size = 1
    else:
        return None  # its parts lack the axis
    if not isinstance(whole, int) or size < 1 or whole < 1:
        return None
    rest = whole % size
    return [size] * (whole // size) + ([rest] if rest else [])


@rule("SequenceAt")
def element_of_split(node: ir.Node, edit: Editor) -> Outcome:
    """An element of a tensor cut into slices without the axis: what a Gather takes."""
    split = producer_of(node.inputs[0], "SplitToSequence")
    if split is None or attribute(split, "keepdims", 1) or len(split.inputs) > 1:
        return None
    axis = {"axis": attribute(split, "axis", 0)}
    return edit.op("Gather", [split.inputs[0], node.inputs[1]], axis)


@rule("SequenceAt")
def element_of_construct(node: ir.Node, edit: Editor) -> Outcome:
    """An element of a sequence that is made of tensors: that tensor."""
    made = producer_of(node.inputs[0], "SequenceConstruct")
    place = None if made is None else _place(node, len(made.inputs), edit)
    return None if made is None or place is None else made.inputs[place]


@rule("ConcatFromSequence")
def concat_from_construct(node: ir.Node, edit: Editor) -> Outcome:
    """The elements of a sequence that is made of tensors, put together: a Concat."""
    made = producer_of(node.inputs[0], "SequenceConstruct")
    if made is None or attribute(node, "new_axis", 0):
        return None
    return edit.op("Concat", made.inputs, {"axis": attribute(node, "axis")})


def _place(reader: ir.Node, count: int, edit: Editor) -> int | None:
    """Return which of so many elements a SequenceAt takes."""
    if reader.op_type != "SequenceAt" or reader.domain:
        return None
    place = edit.ints(reader.inputs[1])
    return place[0] % count if place and -count <= place[0] < count else None


RULES: tuple[Rule, ...] = (
    split_to_sequence,
    element_of_split,
    element_of_construct,
    concat_from_construct,
)
