"""Rotary embeddings of queries and keys that GroupQueryAttention computes itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.dims import integer
from lwc.core.walk import op_name
from lwc.passes.attention.elements import Element, Elements, Index
from lwc.passes.attention.heads import find_heads, views
from lwc.rewrite import EDITED, Editor, Miss, attribute
from lwc.rewrite.rules import Outcome

__all__ = ["GQA", "POSITIONS_COUNT", "absorb_rotary"]

GQA = "com.microsoft::GroupQueryAttention"

POSITIONS_COUNT = (
    "Positions count the tokens of each sequence from 0 on, and what is computed for padding is "
    "not read."
)

_PAST, _COS, _SIN, _IDS = 3, 7, 8, 9
_OPERATORS = ("RotaryEmbedding", "com.microsoft::RotaryEmbedding")
_TOKEN = integer("batch of a token"), integer("place of a token")


class _Turned(NamedTuple):
    """Queries or keys as a rotary embedding leaves them.

    Attributes:
        node: The rotary embedding.
        source: What is turned.
        position: The position of a token; None where that is not known.
        tables: Cosines and sines.
        interleaved: Whether neighbours are turned with each other.
    """

    node: ir.Node
    source: ir.Value
    position: Element | None
    tables: tuple[ir.Value, ir.Value]
    interleaved: bool


def absorb_rotary(node: ir.Node, edit: Editor, *, granted: bool) -> Outcome:
    """Let attention turn queries and keys itself, where both are turned alike.

    Without position_ids the operator counts positions from the tokens before a sequence, 0 here,
    and with them ONNX Runtime takes only the first one of a prompt: positions must count up.

    Args:
        node: A GroupQueryAttention.
        edit: Edits at it.
        granted: Whether `POSITIONS_COUNT` holds.
    """
    inputs = list(node.inputs) + [None] * (_IDS + 1 - len(node.inputs))
    if attribute(node, "do_rotary", 0) or any(inputs[_PAST : _PAST + 2]):
        return None
    query, key = (_turned(value, edit) for value in inputs[:2])
    if query is None and key is None:
        return None
    if query is None or key is None:
        return Miss("queries or keys are turned by rotary embeddings, but not both")
    objection = _against(query, key, granted, edit)
    if objection is not None:
        return Miss(objection)
    if len(node.inputs) <= _SIN:
        node.resize_inputs(_SIN + 1)
    for place, (turned, name) in enumerate(((query, "num_heads"), (key, "kv_num_heads"))):
        _put(node, place, turned, attribute(node, name), edit)
    edit.at(node)
    for place, table in zip((_COS, _SIN), query.tables, strict=True):
        edit.set_input(node, place, table)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    if query.interleaved:
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
    return EDITED


def _put(node: ir.Node, place: int, turned: _Turned, heads: int, edit: Editor) -> None:
    """Replace queries or keys, and take their extents where the new ones have them."""
    old = node.inputs[place]
    assert old is not None
    made = old.producer()
    assert made is not None
    flat = _flat(turned.source, heads, edit.at(made))
    for user, index in list(old.uses()):
        if user is node or (user.op_type == "Shape" and not user.domain):
            edit.set_input(user, index, flat)


def _turned(value: ir.Value | None, edit: Editor) -> _Turned | None:
    """Read `[batch, length, heads · size]` as a view of what a rotary embedding leaves."""
    if value is None:
        return None
    for source, view in views(value, edit):
        node = source.producer()
        if node is None or op_name(node) not in _OPERATORS:
            continue
        shape = edit.shape(source)
        if shape is None or len(view) != 3 or not isinstance(shape[-1], int):
            return None
        axes = [[piece.axis for piece in axis] for axis in view]
        batch, length = ([] if shape[n] == 1 else [n] for n in (0, len(shape) - 2))
        heads = [1] if len(shape) == 4 and shape[1] != 1 else []
        if axes != [batch, length, [*heads, len(shape) - 1]]:
            return None
        return _read(node, len(shape), edit)
    return None


def _read(node: ir.Node, rank: int, edit: Editor) -> _Turned | None:
    contrib = node.domain == "com.microsoft"
    x = node.inputs[0]
    ids = node.inputs[1 if contrib else 3] if len(node.inputs) > 3 else None
    cos, sin = node.inputs[2:4] if contrib else node.inputs[1:3]
    if x is None or cos is None or sin is None:
        return None
    interleaved = bool(attribute(node, "interleaved", 0))
    return _Turned(node, x, _position(ids, edit), (cos, sin), interleaved)


def _position(ids: ir.Value | None, edit: Editor) -> Element | None:
    """Return the position of the token at `_TOKEN`."""
    shape = edit.shape(ids)
    if ids is None or shape is None:
        return None
    if len(shape) == 1:
        first = edit.ints(ids)
        return Index(_TOKEN[1] + first[0]) if first else None
    index = tuple(
        0 if isinstance(dim, int) and dim == 1 else at
        for dim, at in zip(shape, _TOKEN, strict=True)
    )
    return Elements(edit).at(ids, index)


def _against(query: _Turned, key: _Turned, granted: bool, edit: Editor) -> str | None:
    """Tell why attention cannot turn them itself."""
    if any(not edit.single_use(each.node.outputs[0]) for each in (query, key)):
        return "what rotary embeddings leave is read elsewhere, too"
    if query.tables != key.tables or query.interleaved != key.interleaved:
        return "queries and keys are turned by different tables, or in other pairs"
    if query.position is None or query.position != key.position:
        return "queries and keys are at positions that may differ"
    shape = edit.shape(query.tables[0])
    if shape is None or not isinstance(shape[-1], int) or shape[-1] % 8:
        width = "an unknown number of" if shape is None else shape[-1]
        return f"tables have {width} columns, no multiple of 8"
    if query.position != Index(_TOKEN[1]) and not granted:
        return "positions may not count from 0 on"
    return None


def _flat(value: ir.Value, heads: int, edit: Editor) -> ir.Value:
    """Return what is turned as `[batch, length, heads · size]`."""
    shape = edit.shape(value)
    assert shape is not None
    if len(shape) == 3:
        return value
    found = find_heads(value, edit)
    if found is not None and found.layout == "flat" and found.repeats == 1:
        return found.value
    width = edit.constant(np.array([0, 0, heads * int(shape[-1])], np.int64), "width")
    return edit.op("Reshape", [edit.op("Transpose", [value], {"perm": [0, 2, 1, 3]}), width])
