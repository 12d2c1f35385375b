"""A residual sum and the norm of it as one operator of ONNX Runtime.

SkipSimplifiedLayerNormalization saves a call per norm. SkipLayerNormalization of ONNX Runtime 1.32
takes several times as long on the CPU as Add and LayerNormalization do, so it is made on request
only. ONNX Runtime makes it itself of a sum that nothing else reads, unless its optimizer
SkipLayerNormFusion is disabled.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import onnx_ir as ir

from lwc.passes.fusion.norm_ops import NormOp, goes_on, norm_op
from lwc.passes.fusion.pieces import orders
from lwc.rewrite import Editor, Miss, Outcome, producer_of, use_count

__all__ = ["Skip", "skip_norm"]

Skip: TypeAlias = Literal["auto", "all", "none"]

_OPERATORS = {"layer": "SkipLayerNormalization", "rms": "SkipSimplifiedLayerNormalization"}
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SUM = 3
"""The output that is the sum."""


class _Sum(NamedTuple):
    """input + skip + bias: `input` has the shape of the sum, `bias` is one row."""

    input: ir.Value
    skip: ir.Value
    bias: ir.Value | None


def skip_norm(node: ir.Node, edit: Editor, skip: Skip) -> Outcome:
    """norm(x + residual) becomes one operator, which gives the sum too where that is read."""
    norm = norm_op(node, edit)
    if norm is None or skip == "none" or (skip == "auto" and norm.kind != "rms"):
        return None
    add = producer_of(norm.source, "Add")
    if add is None or add.graph is not node.graph or goes_on(norm, edit):
        return None
    found = _sum_of(add, norm, edit)
    if isinstance(found, Miss):
        return found
    total = add.outputs[0]
    others = use_count(total) > 1 or total.is_graph_output()
    rows = [norm.scale] if norm.kind == "rms" else [norm.scale, norm.bias]
    if others and not all(_is_early(row, edit) for row in rows):
        return Miss("its weight is computed after the sum, which has other consumers", add)
    if others:
        # Nodes between the sum and the norm may read the sum.
        edit.at(add)
        rows = [_earlier(row, edit) for row in rows]
    made = _write(norm, [found.input, found.skip, *rows, found.bias], others, edit)
    edit.at(node)
    if others:
        edit.replace(total, made.outputs[_SUM])
        edit.erase(add)
    return made.outputs[0]


def _sum_of(add: ir.Node, norm: NormOp, edit: Editor) -> _Sum | Miss:
    """Read the addends, as the kernel demands them."""
    total = add.outputs[0]
    shape, dtype = edit.shape(total), edit.dtype(total)
    if dtype not in _TYPES:
        return Miss("the operator adds the residual in float and float16 only", add)
    if shape is None or len(shape) not in (2, 3):
        rank = "unknown rank" if shape is None else f"rank {len(shape)}"
        return Miss(f"the sum has {rank}, the operator takes 2 and 3", add)
    if norm.axes != 1 or not isinstance(shape[-1], int) or shape[-1] == 0 or norm.epsilon < 0:
        return Miss("the operator normalizes the last axis, of a known extent, alone", norm.node)
    if not all(row is None or _is_row(row, total, edit) for row in (norm.scale, norm.bias)):
        return Miss("weight or bias are not vectors", norm.node)
    for whole, other in orders(add):
        if not edit.same_shape(whole, total):
            continue
        if edit.same_shape(other, total):
            return _with_bias(whole, other, add, edit) or (
                _with_bias(other, whole, add, edit) or _Sum(whole, other, None)
            )
        if _repeats(other, total, edit):
            return _with_bias(whole, other, add, edit) or _Sum(whole, other, None)
    return Miss("the addends differ in more than the batch", add)


def _with_bias(value: ir.Value, skip: ir.Value, add: ir.Node, edit: Editor) -> _Sum | None:
    """Take a bias that was added to `value` along."""
    inner = producer_of(value, "Add")
    if inner is None or inner.graph is not add.graph or not edit.single_use(value):
        return None
    for source, bias in orders(inner):
        if edit.same_shape(source, value) and _is_row(bias, value, edit):
            return _Sum(source, skip, bias)
    return None


def _is_row(value: ir.Value, whole: ir.Value, edit: Editor) -> bool:
    """Tell whether a value is a vector along the last axis of `whole`."""
    shape, dims = edit.shape(value), edit.shape(whole)
    if shape is None or dims is None or len(shape) != 1 or edit.dtype(value) != edit.dtype(whole):
        return False
    return edit.same_dim(shape[0], dims[-1])


def _repeats(value: ir.Value, whole: ir.Value, edit: Editor) -> bool:
    """Tell whether a value is the same for the whole batch of `[batch, rows, columns]`."""
    shape, dims = edit.shape(value), edit.shape(whole)
    if shape is None or dims is None or len(dims) != 3 or len(shape) not in (2, 3):
        return False
    return (len(shape) == 2 or shape[0] == 1) and all(map(edit.same_dim, shape[-2:], dims[-2:]))


def _is_early(value: ir.Value | None, edit: Editor) -> bool:
    """Tell whether `_earlier` finds a value before any node."""
    node = None if value is None else value.producer()
    # A function holds its constants in nodes: a copy would be one more.
    return node is None or (edit.is_constant(value) and not edit.in_function(node))


def _earlier(value: ir.Value | None, edit: Editor) -> ir.Value | None:
    tensor = edit.tensor(value)
    if value is None or value.producer() is None or tensor is None:
        return value
    return edit.constant(tensor, value.name or "scale")


def _write(norm: NormOp, inputs: list[ir.Value | None], with_sum: bool, edit: Editor) -> ir.Node:
    """Make the operator at the editor's root."""
    while inputs[-1] is None:
        inputs.pop()
    made = edit.node(
        _OPERATORS[norm.kind],
        inputs,
        {"epsilon": norm.epsilon},
        domain="com.microsoft",
        outputs=_SUM + 1 if with_sum else 1,
    )
    # Mean and deviation are absent: the kernel on the CPU does not compute them.
    for absent in made.outputs[1:_SUM]:
        absent.name = ""
    return made
