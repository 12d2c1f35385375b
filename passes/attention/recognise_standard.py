"""The standard's Attention operator, read into the same description as what exporters spell."""

from __future__ import annotations

import math

import onnx_ir as ir

from lwc.passes.attention.heads import Heads, find_heads
from lwc.passes.attention.masks import Mask, read_bias, read_condition
from lwc.passes.attention.recognise import Added, Attention, Hidden, described, extents_of
from lwc.rewrite import Editor, Miss, attribute, use_count

__all__ = ["recognise_standard"]

_MASK = 3


def recognise_standard(node: ir.Node, edit: Editor) -> Attention | Miss:
    """Read an Attention operator of opset 23 or 24.

    Rows that are hidden as a whole are 0 there: they are `guarded`.
    """
    objection = _unlike_plain(node, edit)
    if objection is not None:
        return Miss(objection)
    q, k, v, *_ = node.inputs
    if q is None or k is None or v is None:
        return Miss("queries, keys or values are missing")
    heads = tuple(_heads(value, count, edit) for value, count in _counted(node, q, k, v))
    found = _grouped(*heads)
    if isinstance(found, Miss):
        return found
    causal = bool(attribute(node, "is_causal", 0))
    mask = Mask(causal=True, numbers=(-math.inf,)) if causal else Mask()
    steps: tuple[Added | Hidden, ...] = ()
    given = node.inputs[_MASK] if len(node.inputs) > _MASK else None
    if given is not None:
        if causal or attribute(node, "softcap", 0.0):
            return Miss("a mask together with causality or a soft cap")
        read = _mask(given, edit)
        if isinstance(read, Miss):
            return read
        mask, steps = read
    checked = described(found, mask, edit, node)
    if isinstance(checked, Miss):
        return checked
    query, key, value, mask = checked
    if given is not None and not _broadcasts(given, query, key, edit):
        return Miss("its mask may have another shape than its scores")
    scale = attribute(node, "scale", 1 / math.sqrt(query.size))
    softcap = float(attribute(node, "softcap", 0.0))
    return Attention(
        query, key, value, float(scale), softcap, mask, steps, guarded=True, nodes=(node,)
    )


def _unlike_plain(node: ir.Node, edit: Editor) -> str | None:
    """Say what keeps an operator from being attention of one call alone."""
    if any(value is not None for value in node.inputs[_MASK + 1 :]):
        return "it goes on from earlier keys and values, or is told their lengths"
    if any(use_count(value) or value.is_graph_output() for value in node.outputs[1:]):
        return "its keys, values or scores are read elsewhere"
    if edit.dtype(node.outputs[0]) != ir.DataType.FLOAT:
        return "only in float32 other operators round alike"
    if attribute(node, "softmax_precision", 1) != 1:
        return "its softmax is computed in another type"
    return None


def _counted(
    node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value
) -> tuple[tuple[ir.Value, int | None], ...]:
    queries, keys = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
    return (q, queries), (k, keys), (v, keys)


def _heads(value: ir.Value, count: int | None, edit: Editor) -> Heads | None:
    """Find heads of an operand: `[batch, heads, length, size]`, or flat with their count given."""
    shape = edit.shape(value)
    if shape is None or len(shape) != 3:
        return find_heads(value, edit)
    width = shape[2]
    if not count or not isinstance(width, int) or width % count:
        return None
    return Heads(value, "flat", count, 1, width // count, value, False)


def _grouped(
    query: Heads | None, key: Heads | None, value: Heads | None
) -> tuple[Heads | None, Heads | None, Heads | None] | Miss:
    """Let each head of keys and values be shared by a group of the queries' heads."""
    if query is None or key is None or value is None:
        return query, key, value
    wanted = query.heads * query.repeats
    have = [each.heads * each.repeats for each in (key, value)]
    if any(wanted % count for count in have):
        return Miss("heads of the queries are no multiple of those of the keys")
    key = key._replace(repeats=key.repeats * (wanted // have[0]))
    return query, key, value._replace(repeats=value.repeats * (wanted // have[1]))


def _mask(value: ir.Value, edit: Editor) -> tuple[Mask, tuple[Added | Hidden, ...]] | Miss:
    if edit.dtype(value) == ir.DataType.BOOL:
        hidden = -math.inf
        mask = read_condition(value, hidden, ir.DataType.FLOAT, edit, shown=True)
        # Whatever the condition is, what it hides is hidden by minus infinity.
        return mask if mask.known else Mask(known=False), (Hidden(value, hidden, True),)
    mask = read_bias(value, edit)
    if not (mask.shows_itself or mask.infinite or mask.finite(ir.DataType.FLOAT)):
        return Miss("rows that its mask hides as a whole may be 0, or not")
    return mask, (Added(value),)


def _broadcasts(mask: ir.Value, query: Heads, key: Heads, edit: Editor) -> bool:
    """Tell whether a mask is `[batch, heads, queries, keys]`, or 1 along some of the first."""
    shape = edit.shape(mask)
    if shape is None or not 2 <= len(shape) <= 4:
        return False
    batch, queries = extents_of(query, edit)
    whole = (batch, query.heads, queries, extents_of(key, edit)[1])[4 - len(shape) :]
    fits = [edit.same_dim(dim, of) for dim, of in zip(shape, whole, strict=True)]
    ones = [dim == 1 for dim in shape]
    return fits[-1] and all(fit or one for fit, one in zip(fits, ones, strict=True))
