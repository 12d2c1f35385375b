"""Attention as exporters spell it, read into one description."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from lwc.passes.attention.heads import Heads, find_heads
from lwc.passes.attention.masks import Mask, read_bias, read_condition
from lwc.rewrite import Editor, Miss, attribute, producer_of, use_count

__all__ = ["Attention", "recognise"]

_REPLACES = -1e30
"""A score added to a number up to this one rounds to the number: adding is replacing."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Attention:
    """softmax(cap(q kᵀ · scale) + bias) v.

    Attributes:
        query: Heads of the queries.
        key: Heads of the keys, `repeats` of which share one.
        value: Heads of the values.
        scale: Factor of the scores.
        softcap: Scores are `softcap · tanh(score / softcap)`; 0 for none.
        mask: What is known of the biases.
        biases: What is added to the scores, each broadcast to `[batch, heads, queries, keys]`.
        hidings: Conditions that put a number in place of scores: the condition, the number, and
            whether scores stay where it is true.
        guarded: Whether a row of shares that are not numbers becomes 0.
        nodes: What is replaced, the last one first.
    """

    query: Heads
    key: Heads
    value: Heads
    scale: float
    softcap: float
    mask: Mask
    biases: tuple[ir.Value, ...]
    hidings: tuple[tuple[ir.Value, float, bool], ...]
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
    biases: tuple[ir.Value, ...] = ()
    hidings: tuple[tuple[ir.Value, float, bool], ...] = ()
    guarded: bool = False
    nodes: tuple[ir.Node, ...] = ()


def recognise(node: ir.Node, edit: Editor) -> Attention | Miss | None:
    """Read a MatMul as the end of attention; None where it is nothing like it."""
    shares, values = node.inputs
    softmax, between = _softmax_before(shares, edit)
    if softmax is None or values is None:
        return None
    guarded = any(step.op_type == "Where" for step in between)
    scores = _Scores(edit, guarded=guarded, nodes=(node, *between, softmax))
    product = _take_apart(softmax.inputs[0], scores)
    if isinstance(product, Miss):
        return product
    rank = edit.rank(product.outputs[0])
    if rank != 4:
        return Miss(f"its scores have rank {rank}, not 4", product)
    axis = attribute(softmax, "axis", -1)
    if axis not in (-1, 3):
        return Miss(f"the softmax is along axis {axis}, not along the keys", softmax)
    return _with_heads(product, values, scores)


def _with_heads(product: ir.Node, values: ir.Value, scores: _Scores) -> Attention | Miss:
    edit = scores.edit
    q, k = product.inputs
    assert q is not None
    assert k is not None
    if edit.dtype(q) not in _FLOATS:
        return Miss("its element type is no float", product)
    q, query_scale = _unscaled(q, edit)
    k, key_scale = _unscaled(k, edit)
    query, value = find_heads(q, edit), find_heads(values, edit)
    key = find_heads(k, edit, turned=True)
    for heads, what in ((query, "queries"), (key, "keys"), (value, "values")):
        if heads is None:
            return Miss(f"heads and sizes of the {what} are not known numbers", product)
    assert query is not None
    assert key is not None
    assert value is not None
    query = _unrepeated(query)
    key, value = _shared_by(key, query), _shared_by(value, query)
    if key is None or value is None or (key.heads, key.repeats) != (value.heads, value.repeats):
        return Miss("keys and values are not shared alike by the heads of the queries", product)
    if key.size != query.size:
        return Miss("keys and queries differ in size", product)
    length, behind = edit.shape(key.whole), edit.shape(value.whole)
    if length is None or behind is None or not edit.same_dim(length[3], behind[2]):
        return Miss("keys and values may differ in length", product)
    scale = scores.scale * query_scale * key_scale
    return Attention(
        query, key, value, scale, scores.softcap, scores.mask, scores.biases, scores.hidings,
        scores.guarded, scores.nodes,
    )  # fmt: skip


def _unrepeated(heads: Heads) -> Heads:
    """Queries that are repeated are taken as they are."""
    if heads.repeats == 1:
        return heads
    return Heads(heads.whole, "apart", heads.heads * heads.repeats, 1, heads.size, heads.whole)


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
        node = producer_of(value, "Softmax", "Where", "Identity")
        if node is None or value.is_graph_output():
            return None, ()
        if node.op_type == "Softmax":
            return (node if use_count(value) <= 1 + len(steps) else None), tuple(steps)
        steps.append(node)
        if node.op_type == "Identity":
            value = node.inputs[0]
            continue
        guard = producer_of(node.inputs[0], "IsNaN")
        if guard is None or edit.scalar(node.inputs[1]) != 0:
            return None, ()
        if guard.inputs[0] is not node.inputs[2] or use_count(node.inputs[2]) > 2:  # type: ignore[arg-type]
            return None, ()
        steps.append(guard)
        value = node.inputs[2]
    return None, ()


def _take_apart(value: ir.Value | None, scores: _Scores) -> ir.Node | Miss:
    """Follow scores back to the product of queries and keys."""
    edit = scores.edit
    while value is not None:
        node = producer_of(value, "MatMul", "Add", "Where", "Mul", "Div", "Tanh", "Identity")
        if node is None:
            made = value.producer()
            found = "an input" if made is None else made.op_type
            return Miss(f"its scores come from {found}, not from a product", made)
        if not edit.single_use(value):
            return Miss("scores on the way are read elsewhere", node)
        scores.nodes = (*scores.nodes, node)
        if node.op_type == "MatMul":
            return node
        following = _step(node, scores)
        if isinstance(following, Miss):
            return following
        value = following
    return Miss("its scores come from nothing")


def _step(node: ir.Node, scores: _Scores) -> ir.Value | Miss | None:
    """Note what one operator does to scores; return what it does that to."""
    edit = scores.edit
    if node.op_type == "Identity":
        return node.inputs[0]
    if node.op_type == "Add":
        return _biased(node, scores)
    if node.op_type == "Where":
        return _hidden(node, scores)
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
        return Miss("what is added to the scores widens them", node)
    if scores.scale != 1 or scores.softcap:
        return Miss("scores are scaled after their mask", node)
    scores.mask = scores.mask & read_bias(bias, edit)
    scores.biases = (*scores.biases, bias)
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
        return Miss("the condition widens the scores", node)
    if scores.scale != 1 or scores.softcap:
        return Miss("scores are scaled after their mask", node)
    mask = read_condition(condition, float(number), edit, shown=shown)
    if number > _REPLACES and not mask.shows_itself:
        return Miss(f"rows that are hidden as a whole may differ: scores become {number:g}", node)
    scores.mask = scores.mask & mask
    scores.hidings = (*scores.hidings, (condition, float(number), shown))
    return inner


def _leads_to_product(value: ir.Value | None, edit: Editor) -> bool:
    """Tell whether a value is made of a product by steps that scores go through."""
    for _ in range(8):
        node = producer_of(value, "MatMul", "Add", "Where", "Mul", "Div", "Tanh", "Identity")
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
