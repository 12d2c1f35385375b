"""Slices of slices, concatenations of concatenations, splits put together again."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from lwc.rewrite import Editor, Outcome, Rule, attribute, producer_of, rule

__all__ = ["RULES"]

_END = 2**63 - 1


class _Range(NamedTuple):
    start: int
    end: int
    step: int


def _ranges(node: ir.Node, edit: Editor) -> dict[int, _Range] | None:
    """Return what a Slice with constant bounds keeps, by non-negative axis."""
    bounds = [edit.ints(value) for value in node.inputs[1:]]
    if any(each is None for each, v in zip(bounds, node.inputs[1:], strict=True) if v is not None):
        return None
    starts, ends = bounds[0], bounds[1]
    if starts is None or ends is None:
        return None
    axes = bounds[2] if len(bounds) > 2 and bounds[2] is not None else list(range(len(starts)))
    steps = bounds[3] if len(bounds) > 3 and bounds[3] is not None else [1] * len(starts)
    rank = edit.rank(node.inputs[0])
    if any(axis < 0 for axis in axes):
        if rank is None:
            return None
        axes = [axis % rank for axis in axes]
    return {
        axis: _Range(start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


@rule("Slice")
def slice_of_slice(node: ir.Node, edit: Editor) -> Outcome:
    """Two slices with constant bounds: one, where axes differ or the bounds add up."""
    value = node.inputs[0]
    inner = producer_of(value, "Slice")
    if value is None or inner is None:
        return None
    if not edit.single_use(value):
        return None
    outer_ranges, inner_ranges = _ranges(node, edit), _ranges(inner, edit)
    if outer_ranges is None or inner_ranges is None:
        return None
    merged = dict(inner_ranges)
    for axis, kept in outer_ranges.items():
        have = merged.get(axis)
        both = kept if have is None else _compose(have, kept)
        if both is None:
            return None
        merged[axis] = both
    axes = sorted(merged)
    columns = [
        [merged[axis].start for axis in axes],
        [merged[axis].end for axis in axes],
        axes,
    ]
    if any(merged[axis].step != 1 for axis in axes):
        columns.append([merged[axis].step for axis in axes])
    names = ("starts", "ends", "axes", "steps")
    constants = [edit.constant(column, name) for name, column in zip(names, columns, strict=False)]
    return edit.op("Slice", [inner.inputs[0], *constants])


def _compose(inner: _Range, outer: _Range) -> _Range | None:
    """Slice the slice of one axis, where neither counts from the end."""
    plain = inner.step == outer.step == 1 and min(*inner, *outer) >= 0
    if not plain:
        return None
    start = min(inner.start + outer.start, _END)
    end = min(inner.end, inner.start + outer.end)
    return _Range(start, max(start, end), 1)


@rule("Concat")
def concat_of_concat(node: ir.Node, edit: Editor) -> Outcome:
    """A tree of concatenations along one axis: a single one, made at its root."""
    axis = _axis(node, edit)
    result = node.outputs[0]
    if axis is None or (edit.single_use(result) and _feeds(result, axis, edit)):
        return None
    operands: list[ir.Value | None] = []
    stack = list(reversed(node.inputs))
    while stack:
        value = stack.pop()
        inner = _joined(value, axis, edit)
        if inner is None:
            operands.append(value)
        else:
            stack.extend(reversed(inner.inputs))
    if len(operands) == len(node.inputs):
        return None
    return edit.op("Concat", operands, {"axis": axis})


def _joined(value: ir.Value | None, axis: int, edit: Editor) -> ir.Node | None:
    """Return the concatenation along `axis` that makes `value` for a single reader."""
    node = producer_of(value, "Concat")
    if node is None or value is None or not edit.single_use(value):
        return None
    return node if _axis(node, edit) == axis else None


def _feeds(value: ir.Value, axis: int, edit: Editor) -> bool:
    """Tell whether the single reader of a value is a concatenation along `axis`."""
    ((user, _),) = value.uses()
    return producer_of(user.outputs[0], "Concat") is user and _axis(user, edit) == axis


def _axis(node: ir.Node, edit: Editor) -> int | None:
    axis: int = attribute(node, "axis", 0)
    if axis >= 0:
        return axis
    rank = edit.rank(node.outputs[0])
    return None if rank is None else axis + rank


@rule("Concat")
def concat_of_split(node: ir.Node, edit: Editor) -> Outcome:
    """All parts of a split, put together in order: what was split."""
    split = producer_of(node.inputs[0], "Split")
    if split is None or list(node.inputs) != list(split.outputs):
        return None
    axis, other = _axis(node, edit), _axis(split, edit)
    return split.inputs[0] if axis is not None and axis == other else None


@rule("Unsqueeze")
def unsqueezed_gather(node: ir.Node, edit: Editor) -> Outcome:
    """One element gathered and its axis put back: a gather with a list of one index."""
    value = node.inputs[0]
    gather = producer_of(value, "Gather")
    if value is None or gather is None:
        return None
    rank, axes = edit.rank(gather.inputs[0]), edit.ints(node.inputs[1])
    index = edit.ints(gather.inputs[1])
    if not rank or axes is None or index is None or edit.rank(gather.inputs[1]) != 0:
        return None
    axis = attribute(gather, "axis", 0) % rank
    if len(axes) != 1 or axes[0] % rank != axis or not edit.single_use(value):
        return None
    indices = edit.constant(index, "indices")
    return edit.op("Gather", [gather.inputs[0], indices], {"axis": axis})


@rule("GatherND")
def gather_of_rows(node: ir.Node, edit: Editor) -> Outcome:
    """Places along the first axis alone: a Gather."""
    indices, shape = node.inputs[1], edit.shape(node.inputs[1])
    if not shape or shape[-1] != 1 or attribute(node, "batch_dims", 0):
        return None
    rank = len(shape)
    known = edit.array(indices)
    if known is not None:
        places: ir.Value | None = edit.constant(known.reshape(known.shape[:-1]), "indices")
    else:
        wide = producer_of(indices, "Unsqueeze")
        axes = None if wide is None else edit.ints(wide.inputs[1])
        if wide is None or axes is None or [axis % rank for axis in axes] != [rank - 1]:
            return None
        places = wide.inputs[0]
    return edit.op("Gather", [node.inputs[0], places], {"axis": 0})


RULES: tuple[Rule, ...] = (
    unsqueezed_gather,
    gather_of_rows,
    slice_of_slice,
    concat_of_concat,
    concat_of_split,
)
