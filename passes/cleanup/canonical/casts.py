"""Casts that change nothing, and chains of casts that lose nothing on the way."""

from __future__ import annotations

import onnx_ir as ir

from lwc.rewrite import Editor, Outcome, Rule, attribute, producer_of, rule

__all__ = ["RULES"]

_T = ir.DataType
_CONTAINS: dict[ir.DataType, frozenset[ir.DataType]] = {
    _T.BOOL: frozenset({
        _T.INT8, _T.INT16, _T.INT32, _T.INT64, _T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64,
        _T.FLOAT16, _T.BFLOAT16, _T.FLOAT, _T.DOUBLE,
    }),
    _T.INT8: frozenset({_T.INT16, _T.INT32, _T.INT64, _T.FLOAT16, _T.FLOAT, _T.DOUBLE}),
    _T.UINT8: frozenset({
        _T.INT16, _T.INT32, _T.INT64, _T.UINT16, _T.UINT32, _T.UINT64,
        _T.FLOAT16, _T.FLOAT, _T.DOUBLE,
    }),
    _T.INT16: frozenset({_T.INT32, _T.INT64, _T.FLOAT, _T.DOUBLE}),
    _T.UINT16: frozenset({_T.INT32, _T.INT64, _T.UINT32, _T.UINT64, _T.FLOAT, _T.DOUBLE}),
    _T.INT32: frozenset({_T.INT64, _T.DOUBLE}),
    _T.UINT32: frozenset({_T.INT64, _T.UINT64, _T.DOUBLE}),
    _T.FLOAT16: frozenset({_T.FLOAT, _T.DOUBLE}),
    _T.BFLOAT16: frozenset({_T.FLOAT, _T.DOUBLE}),
    _T.FLOAT: frozenset({_T.DOUBLE}),
}  # fmt: skip
"""Which types hold every value of a type exactly."""

_PLAIN = frozenset({*_CONTAINS, _T.INT64, _T.UINT64, _T.DOUBLE})


@rule("Cast")
def cast_to_own_type(node: ir.Node, edit: Editor) -> Outcome:
    """A cast to the type the value has."""
    have = edit.dtype(node.inputs[0])
    return node.inputs[0] if have is not None and have == attribute(node, "to") else None


@rule("Cast")
def cast_of_cast(node: ir.Node, edit: Editor) -> Outcome:
    """Cast(Cast(x)) where the inner cast is exact: one cast of x, or x itself."""
    inner = producer_of(node.inputs[0], "Cast")
    if inner is None:
        return None
    source = inner.inputs[0]
    start, between = edit.dtype(source), ir.DataType(attribute(inner, "to"))
    end = ir.DataType(attribute(node, "to"))
    if start is None or end not in _PLAIN or between not in _CONTAINS.get(start, ()):
        return None
    return source if end == start else edit.op("Cast", [source], {"to": int(end)})


@rule("CastLike")
def cast_to_a_known_type(node: ir.Node, edit: Editor) -> Outcome:
    """A cast to the type of another value: a cast to that type, which does not wait for it."""
    kind = edit.dtype(node.inputs[1])
    if kind is None:
        return None
    return edit.op("Cast", node.inputs[:1], {**dict(node.attributes), "to": int(kind)})


RULES: tuple[Rule, ...] = (cast_to_own_type, cast_of_cast, cast_to_a_known_type)
