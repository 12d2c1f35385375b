"""Attention over batch and heads joined in one axis, as exporters of older models spell it.

Scores are then products of rank 3, `[batch · heads, queries, keys]`, which are reshaped to rank 4
for the mask, and back for the values. These rules compute in rank 4 throughout. What reshapes the
operands is no loss: where heads are read as views (`heads.py`), it cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lwc.core.dims import Dim
from lwc.passes.attention.heads import views
from lwc.rewrite import Editor, Rule, attribute, producer_of
from lwc.rewrite.rules import Outcome

__all__ = ["joined_rules"]

_AFTER = ("Add", "Where", "Mul", "Div", "Cast", "Reshape", "Softmax", "Squeeze")
_STEPS = 8


def joined_rules() -> tuple[Rule, ...]:
    """Return the rules; each computes the same numbers."""
    return (
        Rule("joined-scores", ("Reshape",), _scores),
        Rule("joined-softmax", ("Softmax",), _softmax),
        Rule("joined-values", ("MatMul",), _values),
    )


def _scores(node: ir.Node, edit: Editor) -> Outcome:
    """Scores that are reshaped to rank 4 are computed in rank 4."""
    before, after = edit.shape(node.inputs[0]), edit.shape(node.outputs[0])
    if before is None or after is None or (len(before), len(after)) != (3, 4):
        return None
    if not all(map(edit.same_dim, before[1:], after[2:])) or not isinstance(after[1], int):
        return None
    if not _leads_to_softmax(node.outputs[0], edit):
        return None
    return _apart(node.inputs[0], before[0], after[1], edit)


def _softmax(node: ir.Node, edit: Editor) -> Outcome:
    """The softmax of scores that were joined before it comes before they are joined."""
    whole = _whole(node.inputs[0], edit)
    if whole is None or attribute(node, "axis", -1) not in (-1, 2):
        return None
    return _join(edit.op("Softmax", [whole], {"axis": -1}), edit)


def _values(node: ir.Node, edit: Editor) -> Outcome:
    """Shares that are joined for the product with the values are not."""
    whole = _whole(node.inputs[0], edit)
    if producer_of(whole, "Softmax", "Where", "Cast") is None:
        return None
    shares, values = (edit.shape(value) for value in node.inputs)
    heads = (edit.shape(whole) or ())[1]
    if shares is None or values is None or len(values) != 3 or not isinstance(heads, int):
        return None
    if not edit.same_dim(shares[0], values[0]):
        return None
    return _join(edit.op("MatMul", [whole, _lift(node.inputs[1], heads, edit)]), edit)


def _leads_to_softmax(value: ir.Value, edit: Editor) -> bool:
    for _ in range(_STEPS):
        if not edit.single_use(value):
            return False
        ((user, _),) = value.uses()
        if user.op_type == "Softmax":
            return True
        if user.op_type not in _AFTER or user.domain:
            return False
        value = user.outputs[0]
    return False


def _apart(value: ir.Value | None, rows: Dim, heads: int, edit: Editor) -> ir.Value | None:
    """Compute `[batch · heads, queries, keys]` as `[batch, heads, queries, keys]`, if it can be."""
    node = producer_of(value, "MatMul", "Mul", "Div", "Add")
    if value is None or node is None or not edit.single_use(value):
        return None
    shapes = [edit.shape(each) for each in node.inputs]
    if node.op_type == "MatMul":
        if any(not _starts(shape, rows, edit) for shape in shapes):
            return None
        return edit.op("MatMul", [_lift(each, heads, edit) for each in node.inputs])
    made: list[ir.Value | None] = []
    whole = 0
    for each, shape in zip(node.inputs, shapes, strict=True):
        inner = None
        if shape is None:
            return None
        if _starts(shape, rows, edit) and not edit.is_constant(each):
            inner = None if whole else _apart(each, rows, heads, edit)
            whole += inner is not None
            made.append(inner or _lift(each, heads, edit))
        elif len(shape) < 3 or shape[0] == 1:
            made.append(each)  # it broadcasts along what was joined
        else:
            return None
    return edit.op(node.op_type, made) if whole else None


def _starts(shape: Sequence[Dim] | None, rows: Dim, edit: Editor) -> bool:
    return shape is not None and len(shape) == 3 and edit.same_dim(shape[0], rows)


def _whole(value: ir.Value | None, edit: Editor) -> ir.Value | None:
    """Return `[batch, heads, queries, keys]` whose first two axes were joined to make `value`."""
    if value is None or edit.rank(value) != 3 or not edit.single_use(value):
        return None
    found, joined = None, edit.shape(value) or ()
    for source, view in views(value, edit):
        shape = edit.shape(source)
        if shape is None or len(shape) != 4:
            continue
        order = [piece.axis for axis in view for piece in axis]
        kept = [axis for axis, dim in enumerate(shape) if dim != 1]
        if order == kept and all(map(edit.same_dim, shape[2:], joined[1:])):
            found = source  # the furthest: nearer ones may be steps of the joining
    return found


def _lift(value: ir.Value | None, heads: int, edit: Editor) -> ir.Value:
    """Return `[batch · heads, n, m]` as `[batch, heads, n, m]`."""
    one = edit.op("Unsqueeze", [value, edit.constant([0], "axes")])
    return edit.op("Reshape", [one, edit.constant([-1, heads, 0, 0], "apart")])


def _join(value: ir.Value, edit: Editor) -> ir.Value:
    """Return `[batch, heads, n, m]` as `[batch · heads, n, m]`."""
    one = edit.op("Reshape", [value, edit.constant([1, -1, 0, 0], "joined")])
    return edit.op("Squeeze", [one, edit.constant([0], "axes")])
