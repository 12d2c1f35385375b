"""Looking at the operators that a fused one replaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from lwc.core.walk import is_default_domain
from lwc.rewrite import Editor, Miss

__all__ = ["inner_nodes", "orders", "same", "shared_inside"]

_PURE = frozenset({"Add", "Cast", "Identity", "Mul", "Pow", "ReduceMean", "ReduceSum", "Sub"})
_DEPTH = 4


def orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the two operands of a commutative node in both orders."""
    if len(node.inputs) == 2:
        first, second = node.inputs
        if first is not None and second is not None:
            yield first, second
            yield second, first


def same(a: ir.Value | None, b: ir.Value | None, edit: Editor, depth: int = _DEPTH) -> bool:
    """Tell whether two values are the same number for number: exporters compute some twice."""
    if a is b:
        return True
    if a is None or b is None:
        return False
    array = edit.array(a)
    if array is not None:
        other = edit.array(b)
        return (
            other is not None
            and (array.dtype, array.shape) == (other.dtype, other.shape)
            and array.tobytes() == other.tobytes()
        )
    first, second = a.producer(), b.producer()
    if not depth or first is None or second is None or first.op_type != second.op_type:
        return False
    if first.op_type not in _PURE or not (is_default_domain(first) and is_default_domain(second)):
        return False
    attributes = _attributes(first)
    if len(first.inputs) != len(second.inputs) or attributes is None:
        return False
    if attributes != _attributes(second):
        return False
    pairs = zip(first.inputs, second.inputs, strict=True)
    return all(same(one, other, edit, depth - 1) for one, other in pairs)


def _attributes(node: ir.Node) -> dict[str, object] | None:
    """Return attributes by name; None where they are parameters of a function."""
    if any(each.is_ref() for each in node.attributes.values()):
        return None
    return {name: each.value for name, each in node.attributes.items()}


def inner_nodes(root: ir.Node, ends: Sequence[ir.Value | None], edit: Editor) -> list[ir.Node]:
    """Return the nodes from `root` back to the values `ends` and to constants, `root` first."""
    found = {root: None}
    stack = [root]
    while stack:
        for value in stack.pop().inputs:
            if value is None or edit.is_constant(value):
                continue
            node = value.producer()
            if node is None or node in found or any(same(value, end, edit) for end in ends):
                continue
            found[node] = None
            stack.append(node)
    return list(found)


def shared_inside(nodes: Sequence[ir.Node]) -> Miss | None:
    """Object to what would not go: values that more than `nodes` read, the first one's aside."""
    inside = set(nodes)
    for node in nodes:
        if node.graph is not nodes[0].graph:
            return Miss("a part of it lies outside this body", node)
        for value in node.outputs if node is not nodes[0] else ():
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                return Miss("a value inside has other consumers", node)
    return None
