"""Transposes and views that cancel or merge."""

from __future__ import annotations

import onnx_ir as ir

from lwc.core.dims import DimShape
from lwc.rewrite import Editor, Outcome, Rule, attribute, producer_of, rule

__all__ = ["RULES", "reshape_target"]

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def reshape_target(edit: Editor, source: DimShape, result: DimShape) -> list[int] | None:
    """Spell `result` as a constant Reshape target: numbers, 0 (copy) and at most one -1.

    Runtimes cannot solve for -1 in an empty tensor, so -1 is used only where every other entry
    is a positive number, and a known extent of 0 only where it is a copy.
    """
    target = []
    for index, dim in enumerate(result):
        if isinstance(dim, int) and dim > 0:
            target.append(dim)
        elif index < len(source) and edit.same_dim(source[index], dim):
            target.append(0)
        else:
            target.append(-1)
    unsolved = target.count(-1)
    if unsolved > 1 or (unsolved and 0 in target):
        return None
    return target


@rule(*_VIEWS)
def view_of_view(node: ir.Node, edit: Editor) -> Outcome:
    """A view of a view: one view of the original, or the original itself."""
    value = node.inputs[0]
    inner = producer_of(value, *_VIEWS)
    if inner is None or value is None:
        return None
    source = inner.inputs[0]
    if edit.same_shape(source, node.outputs[0]):
        return source
    if not edit.single_use(value) or inner.graph is not node.graph:
        return None
    if node.op_type == inner.op_type and node.op_type in ("Squeeze", "Unsqueeze"):
        axes = _merged_axes(node, inner, edit)
        if axes is not None:
            return edit.op(node.op_type, [source, edit.constant(axes, "axes")])
    before, after = edit.shape(source), edit.shape(node.outputs[0])
    if before is not None and after is not None:
        target = reshape_target(edit, before, after)
        if target is not None:
            return edit.op("Reshape", [source, edit.constant(target, "shape")])
    if node.op_type == "Reshape":
        asked = edit.ints(node.inputs[1])
        if asked is not None and (0 not in asked or attribute(node, "allowzero", 0)):
            attributes = {"allowzero": 1} if 0 in asked else {}
            return edit.op("Reshape", [source, node.inputs[1]], attributes)
    return None


def _merged_axes(outer: ir.Node, inner: ir.Node, edit: Editor) -> list[int] | None:
    """Return the axes of one (Un)squeeze that does the work of two."""
    if len(outer.inputs) < 2 or len(inner.inputs) < 2:
        return None
    first, second = edit.ints(inner.inputs[1]), edit.ints(outer.inputs[1])
    rank = edit.rank(inner.inputs[0])
    if not first or not second or rank is None:
        return None
    if outer.op_type == "Unsqueeze":
        middle = rank + len(first)
        final = middle + len(second)
        added = {axis % final for axis in second}
        kept = [axis for axis in range(final) if axis not in added]
        return sorted(added | {kept[axis % middle] for axis in first})
    removed = {axis % rank for axis in first}
    kept = [axis for axis in range(rank) if axis not in removed]
    return sorted(removed | {kept[axis % len(kept)] for axis in second})


@rule("Reshape")
def constant_reshape_target(node: ir.Node, edit: Editor) -> Outcome:
    """A computed target whose numbers are known, or can be copied or solved for."""
    target = node.inputs[1]
    if edit.tensor(target) is not None or attribute(node, "allowzero", 0):
        return None
    before, after = edit.shape(node.inputs[0]), edit.shape(node.outputs[0])
    if before is None or after is None:
        return None
    wanted = reshape_target(edit, before, after)
    if wanted is None:
        wanted = _with_own_unknown(edit, before, after, edit.symbolic(target))
    if wanted is None:
        return None
    return edit.op("Reshape", [node.inputs[0], edit.constant(wanted, "shape")])


def _with_own_unknown(
    edit: Editor, before: DimShape, after: DimShape, content: list[object] | None
) -> list[int] | None:
    """Keep the -1 that the target computes already: it is as legal as it was."""
    if content is None or len(content) != len(after) or content.count(-1) != 1:
        return None
    wanted = []
    for index, (entry, dim) in enumerate(zip(content, after, strict=True)):
        if isinstance(entry, int):
            wanted.append(entry)
        elif index < len(before) and edit.same_dim(before[index], dim):
            wanted.append(0)
        else:
            return None
    return wanted


def _permutation(node: ir.Node, edit: Editor) -> list[int] | None:
    perm = attribute(node, "perm")
    if perm is not None:
        return list(perm)
    rank = edit.rank(node.inputs[0])
    return None if rank is None else list(reversed(range(rank)))


@rule("Transpose")
def plain_transpose(node: ir.Node, edit: Editor) -> Outcome:
    """A permutation that moves nothing, or only extents of 1 around."""
    perm = _permutation(node, edit)
    if perm is None:
        return None
    if perm == sorted(perm):
        return node.inputs[0]
    shape = edit.shape(node.inputs[0])
    if shape is None:
        return None
    moving = [axis for axis in perm if not (isinstance(shape[axis], int) and shape[axis] == 1)]
    if moving != sorted(moving):
        return None
    if edit.same_shape(node.inputs[0], node.outputs[0]):
        return node.inputs[0]
    target = reshape_target(edit, shape, tuple(shape[axis] for axis in perm))
    if target is None:
        return None
    return edit.op("Reshape", [node.inputs[0], edit.constant(target, "shape")])


@rule("Transpose")
def transpose_of_transpose(node: ir.Node, edit: Editor) -> Outcome:
    """Two permutations: their product, or nothing."""
    value = node.inputs[0]
    inner = producer_of(value, "Transpose")
    if inner is None or value is None:
        return None
    first, second = _permutation(inner, edit), _permutation(node, edit)
    if first is None or second is None:
        return None
    both = [first[axis] for axis in second]
    if both == sorted(both):
        return inner.inputs[0]
    if inner.graph is not node.graph:
        return None
    return edit.op("Transpose", [inner.inputs[0]], {"perm": both})


RULES: tuple[Rule, ...] = (
    view_of_view,
    constant_reshape_target,
    plain_transpose,
    transpose_of_transpose,
)
