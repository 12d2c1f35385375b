"""Attention as exporters spell it, read into one description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim
from lwc.passes.attention.heads import Heads, find_heads
from lwc.passes.attention.masks import Mask, read_bias, read_condition
from lwc.rewrite import Editor, Miss, attribute, producer_of, use_count

__all__ = ["Added", "Attention", "Hidden", "described", "extents_of", "recognise"]

_REPLACES = -1e30
"""A score added to a number up to this one rounds to the number: adding is replacing."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


_STEPS = ("MatMul", "Add", "Where", "Mul", "Div", "Tanh", "Cast", "Identity")


class Added(NamedTuple):
    """What is added to scores, broadcast to `[batch, heads, queries, keys]`."""

    value: ir.Value


class Hidden(NamedTuple):
    """A number in place of scores, where the condition is not `shown`."""

    condition: ir.Value
    number: float
    shown: bool


@dataclass(frozen=True)
class Attention:
    """softmax(cap(q kᵀ · scale) + mask) v.

    Attributes:
        query: Heads of the queries.
        key: Heads of the keys, `repeats` of which share one.
        value: Heads of the values.
        scale: Factor of the scores.
        softcap: Scores are `softcap · tanh(score / softcap)`; 0 for none.
        mask: What is known of the steps.
        steps: What is done to the scores, the first first.
        guarded: Whether a row of shares that are not numbers becomes 0.
        nodes: What is replaced, the last one first.
    """

    query: Heads
    key: Heads
    value: Heads
    scale: float
    softcap: float
    mask: Mask
    steps: tuple[Added | Hidden, ...]
    guarded: bool
    nodes: tuple[ir.Node, ...]

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.query.heads


@dataclass
class _Scores:
    """Scores, taken apart from the softmax backwards."""

    edit: Editor
    scale: float = 1.0
    softcap: float = 0.0
    mask: Mask = field(default_factory=Mask)
    steps: tuple[Added | Hidden, ...] = ()
    guarded: bool = False
    narrowed: bool = False
    nodes: tuple[ir.Node, ...] = ()


def recognise(node: ir.Node, edit: Editor) -> Attention | Miss | None:
    """Read a MatMul as the end of attention; None where it is nothing like it."""
    shares, values = node.inputs
    if _is_quantized(shares):
        return Miss("its shares are rounded to few bits, which no attention operator does", node)
    softmax, between = _softmax_before(shares, edit)
    if softmax is None or values is None:
        return None
    kinds = {step.op_type for step in between}
    scores = _Scores(
        edit,
        guarded="Where" in kinds,
        narrowed="Cast" in kinds,
        nodes=(node, *between, softmax),
    )
    before = _unflattened(softmax, between, edit)
    if isinstance(before, Miss):
        return before
    product = _take_apart(before[0], scores)
    if isinstance(product, Miss):
        return product
    rank = edit.rank(product.outputs[0])
    if rank != 4:
        return Miss(f"its scores have rank {rank}, not 4", product)
    if before[1] != 3:
        return Miss(f"the softmax is along axis {before[1]}, not along the keys", softmax)
    q, k = product.inputs
    assert q is not None
    assert k is not None
    q, query_scale = _unscaled(q, edit)
    k, key_scale = _unscaled(k, edit)
    scale = scores.scale * query_scale * key_scale
    if not math.isfinite(scale) or not np.float32(scale):
        return Miss(f"scores are scaled by {scale:g}", product)
    heads = (
        find_heads(q, edit),
        find_heads(k, edit, turned=True),
        find_heads(values, edit),
    )
    found = described(heads, scores.mask, edit, product)
    if isinstance(found, Miss):
        return found
    query, key, value, mask = found
    for step in scores.steps:
        if isinstance(step, Hidden) and not step.number <= _REPLACES and not mask.shows_itself:
            reason = f"rows that are hidden as a whole may differ: scores become {step.number:g}"
            return Miss(reason, product)
    return Attention(
        query, key, value, scale, scores.softcap, mask, scores.steps, scores.guarded, scores.nodes
    )


def described(
    heads: tuple[Heads | None, Heads | None, Heads | None],
    mask: Mask,
    edit: Editor,
    product: ir.Node,
) -> tuple[Heads, Heads, Heads, Mask] | Miss:
    """Check that queries, keys and values belong together.

    Args:
        heads: Of queries, keys and values, as far as they were found.
        mask: What is known of the mask.
        edit: Knows shapes.
        product: Where they meet; a Miss names it.

    Returns:
        The heads, keys and values shared by those of the queries, and the mask as far as it is
        known for these lengths.
    """
    for each, what in zip(heads, ("queries", "keys", "values"), strict=True):
        if each is None:
            return Miss(f"heads and sizes of the {what} are not known numbers", product)
    query, key, value = heads
    assert query is not None
    assert key is not None
    assert value is not None
    types = {edit.dtype(each.whole) for each in (query, key, value)}
    if len(types) > 1 or not types <= set(_FLOATS):
        return Miss("queries, keys and values are not of one float type", product)
    query = _unrepeated(query)
    shared = _shared_by(key, query), _shared_by(value, query)
    key, value = shared
    if key is None or value is None or (key.heads, key.repeats) != (value.heads, value.repeats):
        return Miss("keys and values are not shared alike by the heads of the queries", product)
    if key.size != query.size:
        return Miss("keys and queries differ in size", product)
    queries, keys, values = (extents_of(each, edit) for each in (query, key, value))
    if not edit.same_dim(keys[1], values[1]):
        return Miss("keys and values may differ in length", product)
    if not edit.same_dim(queries[0], keys[0]) or not edit.same_dim(queries[0], values[0]):
        return Miss("queries, keys and values may differ in batch", product)
    # A query far behind the last key sees none through a window.
    if mask.window is not None and not edit.same_dim(queries[1], keys[1]):
        mask = replace(mask, known=False)
    return query, key, value, mask


def extents_of(heads: Heads, edit: Editor) -> tuple[Dim, Dim]:
    """Return batch and length of heads."""
    shape = edit.shape(heads.whole)
    assert shape is not None
    return shape[0], shape[1 if len(shape) == 3 else 3 if heads.turned else 2]


def _unrepeated(heads: Heads) -> Heads:
    """Queries that are repeated are taken as they are."""
    if heads.repeats == 1:
        return heads
    return Heads(
        heads.whole, "apart", heads.heads * heads.repeats, 1, heads.size, heads.whole, False
    )


def _shared_by(heads: Heads, query: Heads) -> Heads | None:
    """Let one head that broadcasts be repeated for each head of the queries."""
    if heads.heads * heads.repeats == query.heads:
        return heads
    if heads.heads == heads.repeats == 1:
        return heads._replace(repeats=query.heads)
    return None


def _softmax_before(
    value: ir.Value | None, edit: Editor
) -> tuple[ir.Node | None, tuple[ir.Node, ...]]:
    """Step back over what does nothing to finite shares; return the softmax and the steps."""
    steps: list[ir.Node] = []
    while value is not None:
        node = producer_of(value, "Softmax", "Where", "Cast", "Reshape", "Identity")
        if node is None or value.is_graph_output():
            return None, ()
        if use_count(value) != (2 if steps and steps[-1].op_type == "IsNaN" else 1):
            return None, ()
        if node.op_type == "Softmax":
            return node, tuple(steps)
        steps.append(node)
        if node.op_type == "Where":
            guard = _guard(node, edit)
            if guard is None:
                return None, ()
            steps.append(guard)
            value = node.inputs[2]
            continue
        types = edit.dtype(node.inputs[0]), edit.dtype(value)
        if node.op_type == "Cast" and types != (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return None, ()
        value = node.inputs[0]
    return None, ()


def _is_quantized(shares: ir.Value | None) -> bool:
    """Tell whether a softmax is quantized and dequantized."""
    narrow = producer_of(shares, "DequantizeLinear")
    rounding = producer_of(narrow.inputs[0], "QuantizeLinear") if narrow is not None else None
    return rounding is not None and producer_of(rounding.inputs[0], "Softmax") is not None


def _guard(node: ir.Node, edit: Editor) -> ir.Node | None:
    """Return the IsNaN of a Where that puts 0 in place of what is no number."""
    guard, kept = producer_of(node.inputs[0], "IsNaN"), node.inputs[2]
    if guard is None or guard.inputs[0] is not kept or edit.scalar(node.inputs[1]) != 0:
        return None
    same = edit.same_shape(kept, node.outputs[0]) and edit.single_use(guard.outputs[0])
    return guard if same else None


def _unflattened(
    softmax: ir.Node, steps: Sequence[ir.Node], edit: Editor
) -> tuple[ir.Value | None, int] | Miss:
    """Return scores as they are before they are flattened for the softmax, and its axis."""
    scores, axis = softmax.inputs[0], attribute(softmax, "axis", -1)
    back = [step.outputs[0] for step in steps if step.op_type == "Reshape"]
    rank = edit.rank(scores)
    axis = axis if rank is None else axis % rank
    if not back:
        return scores, axis
    flat = producer_of(scores, "Flatten", "Reshape")
    if flat is None or scores is None or not edit.single_use(scores) or rank is None:
        return Miss("shares are reshaped, scores are not", softmax)
    wide = flat.inputs[0]
    before, after = edit.shape(wide), edit.shape(scores)
    if not before or not after or not edit.same_shape(wide, back[0]):
        return Miss("shares do not get the shape that scores had", softmax)
    if axis != rank - 1 or not edit.same_dim(before[-1], after[-1]):
        return Miss("scores are reshaped along the softmax", softmax)
    return wide, len(before) - 1


def _take_apart(value: ir.Value | None, scores: _Scores) -> ir.Node | Miss:
    """Follow scores back to the product of queries and keys."""
    while value is not None:
        node = producer_of(value, *_STEPS)
        if node is None:
            made = value.producer()
            found = "an input" if made is None else made.op_type
            return Miss(f"its scores come from {found}, not from a product", made)
        if not _read_once(value, scores):
            return Miss("scores on the way are read elsewhere", node)
        scores.nodes = (*scores.nodes, node)
        if node.op_type == "MatMul":
            if scores.narrowed:
                return Miss("shares are narrowed, but scores were not widened", node)
            return node
        following = _step(node, scores)
        if isinstance(following, Miss):
            return following
        value = following
    return Miss("its scores come from nothing")


def _read_once(value: ir.Value, scores: _Scores) -> bool:
    """Tell whether one operator reads scores, besides the shape that shares are given back."""
    shapes = [
        use.node
        for use in value.uses()
        if use.node.op_type == "Shape"
        and not use.node.outputs[0].is_graph_output()
        and all(after.node in scores.nodes for after in use.node.outputs[0].uses())
    ]
    return not value.is_graph_output() and use_count(value) == 1 + len(shapes)


def _step(node: ir.Node, scores: _Scores) -> ir.Value | Miss | None:
    """Note what one operator does to scores; return what it does that to."""
    edit = scores.edit
    if node.op_type == "Identity":
        return node.inputs[0]
    if node.op_type == "Add":
        return _biased(node, scores)
    if node.op_type == "Where":
        return _hidden(node, scores)
    if node.op_type == "Cast":
        return _widened(node, scores)
    if node.op_type == "Tanh":
        return Miss("a tanh of scores that is not scaled back", node)
    inner, factor = _factor(node, edit)
    if inner is None:
        return Miss("scores are multiplied by something else than one constant", node)
    capped = _capped(inner, factor, scores)
    if capped is not None:
        return capped
    scores.scale *= factor
    return inner


def _widened(node: ir.Node, scores: _Scores) -> ir.Value | Miss | None:
    """Step over what computes the softmax of float16 scores in float32."""
    edit = scores.edit
    types = edit.dtype(node.inputs[0]), edit.dtype(node.outputs[0])
    if not scores.narrowed or types != (ir.DataType.FLOAT16, ir.DataType.FLOAT):
        return Miss("scores are cast to another type", node)
    if scores.steps or scores.softcap or scores.scale != 1:
        return Miss("scores are masked or scaled in another type than they are computed in", node)
    scores.narrowed = False
    return node.inputs[0]


def _capped(inner: ir.Value, factor: float, scores: _Scores) -> ir.Value | None:
    """Read `c · tanh(x / c)`; return x."""
    bend = producer_of(inner, "Tanh")
    if bend is None or scores.softcap or scores.scale != 1 or factor <= 0:
        return None
    below, inside = producer_of(bend.inputs[0], "Mul", "Div"), bend.inputs[0]
    source, ratio = _factor(below, scores.edit)
    single = all(map(scores.edit.single_use, (inner, inside))) if inside is not None else False
    if source is None or below is None or not single:
        return None
    scores.scale, scores.softcap = ratio * factor, factor
    scores.nodes = (*scores.nodes, bend, below)
    return source


def _factor(node: ir.Node | None, edit: Editor) -> tuple[ir.Value | None, float]:
    """Read a product with one constant, or a quotient by one; None where it is none."""
    if node is None or node.op_type not in ("Mul", "Div"):
        return None, 1.0
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        number, other = edit.scalar(node.inputs[place]), node.inputs[1 - place]
        if number is None or isinstance(number, bool) or number == 0 or other is None:
            continue
        if not edit.same_shape(other, node.outputs[0]):
            return None, 1.0
        return other, float(number) if node.op_type == "Mul" else 1 / float(number)
    return None, 1.0


def _unscaled(value: ir.Value, edit: Editor) -> tuple[ir.Value, float]:
    """Step back over factors of queries or keys."""
    scale = 1.0
    while True:
        inner, factor = _factor(producer_of(value, "Mul", "Div"), edit)
        if inner is None:
            return value, scale
        value, scale = inner, scale * factor


def _biased(node: ir.Node, scores: _Scores) -> ir.Value | Miss:
    edit = scores.edit
    places = [place for place in (0, 1) if _leads_to_product(node.inputs[place], edit)]
    if len(places) != 1:
        return Miss("no operand of a sum of scores, or both, come from a product", node)
    inner, bias = node.inputs[places[0]], node.inputs[1 - places[0]]
    assert inner is not None
    assert bias is not None
    if not edit.same_shape(inner, node.outputs[0]):
        return Miss("what is added to the scores is not known to keep their shape", node)
    if scores.scale != 1 or scores.softcap:
        return Miss("scores are scaled after their mask", node)
    scores.mask = scores.mask & read_bias(bias, edit)
    scores.steps = (Added(bias), *scores.steps)
    return inner


def _hidden(node: ir.Node, scores: _Scores) -> ir.Value | Miss:
    edit = scores.edit
    condition, yes, no = node.inputs
    shown = _leads_to_product(yes, edit)
    inner, instead = (yes, no) if shown else (no, yes)
    number = edit.scalar(instead)
    if condition is None or inner is None or number is None or isinstance(number, bool):
        return Miss("hidden scores are replaced by something else than one constant", node)
    if not edit.same_shape(inner, node.outputs[0]):
        return Miss("the condition is not known to keep the shape of the scores", node)
    if scores.scale != 1 or scores.softcap:
        return Miss("scores are scaled after their mask", node)
    scores.mask &= read_condition(condition, float(number), edit.dtype(inner), edit, shown=shown)
    scores.steps = (Hidden(condition, float(number), shown), *scores.steps)
    return inner


def _leads_to_product(value: ir.Value | None, edit: Editor) -> bool:
    """Tell whether a value is made of a product by steps that scores go through."""
    for _ in range(8):
        node = producer_of(value, *_STEPS)
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
        wide = [each for each in operands if each is not None and edit.rank(each) == 4]
        deeper = [each for each in wide if _leads_to_product(each, edit)] if len(wide) > 1 else wide
        if not deeper:
            return False
        value = deeper[0]
    return False
