"""Common subexpressions: equal nodes, and values of equal symbolic content, computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.walk import attribute_graphs, is_random
from lwc.rewrite import Editor

__all__ = ["merge_duplicates"]

_KNOWN_DOMAINS = {"", "ai.onnx.ml", "com.microsoft"}
_SMALL = 1024
_INTEGRAL = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}

_Scope = dict[Hashable, list[ir.Value]]


def merge_duplicates(editor: Editor) -> Counter[str]:
    """Let one node do the work of all that compute the same.

    An earlier node of the same graph or of an enclosing one is reused; functions stand alone.

    Returns:
        How many nodes became superfluous, by reason.
    """
    hits: Counter[str] = Counter()
    shared = editor.share_constants()
    if shared:
        hits["shared-constants"] = shared
    for graph in editor.roots():
        _walk(editor, graph, [], hits)
    return hits


def _walk(editor: Editor, graph: ir.Graph, outer: list[_Scope], hits: Counter[str]) -> None:
    own: _Scope = {}
    scopes = [own, *outer]
    for node in graph:
        if any(True for _ in attribute_graphs(node)):
            for body in attribute_graphs(node):
                _walk(editor, body, scopes, hits)
            continue
        if editor.limit.exhausted:
            return
        key = _key(node)
        if key is not None and _reuse(editor, node, "common-subexpression", key, scopes):
            hits["common-subexpression"] += 1
            continue
        content = _content(editor, node)
        if content is not None and _reuse(editor, node, "equal-content", content, scopes):
            hits["equal-content"] += 1


def _reuse(editor: Editor, node: ir.Node, rule: str, key: Hashable, scopes: list[_Scope]) -> bool:
    for scope in scopes:
        earlier = scope.get(key)
        if earlier is not None:
            return _merge(editor, node, rule, earlier)
    scopes[0][key] = list(node.outputs)
    return False


def _merge(editor: Editor, node: ir.Node, rule: str, earlier: list[ir.Value]) -> bool:
    """Redirect the users of a duplicate; a second graph output of one value needs its node."""
    graph = node.graph
    assert graph is not None
    if len(earlier) < len(node.outputs):
        return False
    for old, new in zip(node.outputs, earlier, strict=False):
        if old.is_graph_output() and not editor.may_become_output(new, graph):
            return False
    editor.spend(rule, node)
    for old, new in zip(node.outputs, earlier, strict=False):
        editor.replace(old, new)
    editor.touch(node)
    return True


def _key(node: ir.Node) -> Hashable | None:
    if node.domain not in _KNOWN_DOMAINS or is_random(node):
        return None
    return (
        node.domain,
        node.op_type,
        node.overload,
        tuple(bool(value.name) for value in node.outputs),
        tuple(map(id, node.inputs)),
        tuple(sorted((name, _attribute_key(each)) for name, each in node.attributes.items()))
        if node.attributes
        else (),
    )


def _attribute_key(attribute: ir.Attr) -> Any:
    if attribute.is_ref():
        return ("ref", attribute.ref_attr_name)
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        if value.nbytes > _SMALL or value.dtype == ir.DataType.STRING:
            return ("tensor", id(value))
        return ("content", int(value.dtype), tuple(value.shape), value.tobytes())
    return (str(attribute.type), repr(value))


def _content(editor: Editor, node: ir.Node) -> Hashable | None:
    """Describe what the shape analysis knows about the content of a node's only output."""
    if len(node.outputs) != 1:
        return None
    value = node.outputs[0]
    known = editor.shapes.known(value)
    if known is None or editor.dtype(value) not in _INTEGRAL:
        # Floating-point contents compare equal for 0.0 and -0.0.
        return None
    elements = np.asarray(known, dtype=object)
    return ("known", editor.dtype(value), elements.shape, tuple(elements.ravel()))
