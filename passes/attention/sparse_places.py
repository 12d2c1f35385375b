"""Where the queries and keys of attention operators stand in the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.walk import op_name
from lwc.passes.attention.sparse_masks import Places
from lwc.rewrite import Editor, Miss, attribute

__all__ = ["ATTENTION_OPS", "is_causal", "places_of"]

_GQA, _MHA = "com.microsoft::GroupQueryAttention", "com.microsoft::MultiHeadAttention"

ATTENTION_OPS = {_GQA: 10, _MHA: 5, "Attention": 3}
"""Attention operators, and which input is added to their scores, or masks them."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def is_causal(node: ir.Node) -> bool:
    """Tell whether an operator itself hides later keys."""
    name, default = {_GQA: ("causal", 1), _MHA: ("unidirectional", 0)}.get(
        op_name(node), ("is_causal", 0)
    )
    return bool(attribute(node, name, default))


def places_of(node: ir.Node, edit: Editor) -> Places | Miss:
    """Find where queries and keys stand, or say why that is not known."""
    if any(each.is_ref() for each in node.attributes.values()):
        return Miss("its attributes are parameters of a function")
    if edit.dtype(node.inputs[0]) not in _FLOATS:
        return Miss("it is computed in another type than float32 or float16")
    return _FINDERS[op_name(node)](node, edit)


def _given(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _group_query(node: ir.Node, edit: Editor) -> Places | Miss:
    query, past = node.inputs[0], _given(node, 3)
    lengths, total = _given(node, 5), _given(node, 6)
    if any(_given(node, place) is not None for place in (12, 13)):
        return Miss("its cache is quantized")
    if attribute(node, "sliding_window_cache", 0):
        return Miss("its cache holds a window only")
    if query is None or lengths is None or total is None:
        return Miss("its lengths are not given")
    if past is None:
        return _from_start(query, 1, edit)
    return Places(
        None,
        (lengths, total, _dim(query, 1, edit)),
        lambda: _ending(query, lengths, total, edit),
    )


def _ending(
    query: ir.Value, lengths: ir.Value, total: ir.Value, edit: Editor
) -> tuple[ir.Value, ir.Value]:
    """Make the places of queries that end where each sequence does."""
    length = _extent(query, 1, edit)
    whole = edit.op("Cast", [total], {"to": int(ir.DataType.INT64)})
    whole = edit.op("Reshape", [whole, edit.constant([1], "one")])
    # A prompt is padded on the right; what follows it ends at the length of each sequence.
    last = edit.op("Cast", [lengths], {"to": int(ir.DataType.INT64)})
    one = edit.constant([1], "one")
    begin = edit.op("Sub", [edit.op("Add", [last, one]), length])
    is_prompt = edit.op("Equal", [length, whole])
    begin = edit.op("Where", [is_prompt, edit.constant([0], "start"), begin])
    begin = edit.op("Reshape", [begin, edit.constant([-1, 1, 1, 1], "apart")])
    queries = edit.op("Add", [_column(_range(length, edit), edit), begin])
    return queries, _range(whole, edit)


def _multi_head(node: ir.Node, edit: Editor) -> Places | Miss:
    query, key, past = node.inputs[0], _given(node, 1), _given(node, 6)
    if _given(node, 8) is not None or _given(node, 9) is not None:
        return Miss("its past lies in a buffer")
    assert query is not None
    if key is not None:
        rank = edit.rank(key)
        if rank not in (3, 4) or not _alike(query, 1, key, 1 if rank == 3 else 2, edit):
            return Miss("queries and keys may not be of the same tokens")
    return _behind(query, 1, past, edit)


def _standard(node: ir.Node, edit: Editor) -> Places | Miss:
    query, key, past = node.inputs[0], _given(node, 1), _given(node, 4)
    assert query is not None
    rank = edit.rank(query)
    if _given(node, 6) is not None:
        return Miss("its keys are padded by nonpad_kv_seqlen")
    axis = 1 if rank == 3 else 2
    if rank not in (3, 4) or key is None or not _alike(query, axis, key, axis, edit):
        return Miss("queries and keys may not be of the same tokens")
    return _behind(query, axis, past, edit)


_Finder: TypeAlias = Callable[[ir.Node, Editor], "Places | Miss"]
_FINDERS: dict[str, _Finder] = {_GQA: _group_query, _MHA: _multi_head, "Attention": _standard}


def _alike(query: ir.Value, axis: int, key: ir.Value, other: int, edit: Editor) -> bool:
    first, second = edit.shape(query), edit.shape(key)
    if first is None or second is None:
        return False
    return edit.same_dim(first[axis], second[other])


def _from_start(query: ir.Value, axis: int, edit: Editor) -> Places:
    """Queries and keys are the same tokens."""

    def make() -> tuple[ir.Value, ir.Value]:
        every = _range(_extent(query, axis, edit), edit)
        return _column(every, edit), every

    dim = _dim(query, axis, edit)
    return Places(dim if isinstance(dim, int) else None, dim, make)


def _behind(query: ir.Value, axis: int, past: ir.Value | None, edit: Editor) -> Places | Miss:
    """Queries follow the keys of the past, `[batch, heads, past, size]`."""
    if past is None:
        return _from_start(query, axis, edit)

    def make() -> tuple[ir.Value, ir.Value]:
        length, before = _extent(query, axis, edit), _extent(past, 2, edit)
        queries = edit.op("Add", [_column(_range(length, edit), edit), before])
        return queries, _range(edit.op("Add", [length, before]), edit)

    new, old = _dim(query, axis, edit), _dim(past, 2, edit)
    longest = new + old if isinstance(new, int) and isinstance(old, int) else None
    return Places(longest, (new, old), make)


def _dim(value: ir.Value, axis: int, edit: Editor) -> object:
    """Return an extent, or the value itself where that is not known."""
    shape = edit.shape(value)
    return value if shape is None else shape[axis]


def _extent(value: ir.Value, axis: int, edit: Editor) -> ir.Value:
    """Return an extent, int64 `[1]`."""
    shape = edit.op("Shape", [value])
    return edit.op("Gather", [shape, edit.constant([axis], "axis")], {"axis": 0})


def _range(extent: ir.Value, edit: Editor) -> ir.Value:
    """Return 0, 1, … below an extent `[1]`."""
    end = edit.op("Squeeze", [extent, edit.constant([0], "axes")])
    zero, one = (edit.constant(np.array(number, np.int64), "number") for number in (0, 1))
    return edit.op("Range", [zero, end, one])


def _column(places: ir.Value, edit: Editor) -> ir.Value:
    return edit.op("Unsqueeze", [places, edit.constant([1], "axes")])
