"""Bodies: do the graphs that a node runs take what it gives, and give what it returns?"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lwc.core.walk import graph_and_subgraphs

__all__ = ["BODIES", "body_problem", "call_problem", "recursion"]


def body_problem(node: ir.Node) -> str | None:
    """Say why the body of a control-flow operator does not fit it, or return None.

    Args:
        node: An operator in `BODIES`, with the attributes it must have.
    """
    return BODIES[node.op_type](node)


def _if(node: ir.Node) -> str | None:
    for name in ("then_branch", "else_branch"):
        problem = _counts(node, name, 0, len(node.outputs))
        if problem is not None:
            return problem
    return None


def _loop(node: ir.Node) -> str | None:
    carried = len(node.inputs) - 2
    if len(node.outputs) < carried:
        return f"has {len(node.outputs)} outputs for {carried} loop-carried values"
    return _counts(node, "body", len(node.inputs), 1 + len(node.outputs))


def _scan(node: ir.Node) -> str | None:
    scanned = node.attributes.get_int("num_scan_inputs", 0)
    if not 0 < scanned <= len(node.inputs):
        return f"scans {scanned} of its {len(node.inputs)} inputs"
    if len(node.outputs) < len(node.inputs) - scanned:
        return f"has {len(node.outputs)} outputs for {len(node.inputs) - scanned} state variables"
    return _counts(node, "body", len(node.inputs), len(node.outputs))


def _sequence_map(node: ir.Node) -> str | None:
    return _counts(node, "body", len(node.inputs), len(node.outputs))


BODIES: dict[str, Callable[[ir.Node], str | None]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _sequence_map,
}
"""The standard operators that run bodies, each with its rule."""


def _counts(node: ir.Node, name: str, inputs: int, outputs: int) -> str | None:
    attribute = node.attributes[name]
    if attribute.is_ref():
        return None
    graph = attribute.as_graph()
    for what, have, need in (
        ("inputs", len(graph.inputs), inputs),
        ("outputs", len(graph.outputs), outputs),
    ):
        if have != need:
            return f"its {name} has {have} {what}, {need} expected"
    return None


def call_problem(node: ir.Node, function: ir.Function) -> str | None:
    """Say why a call does not fit its function, or return None.

    Attributes need not fit: runtimes take an absent one as not given, and ignore one too many.
    """
    for what, have, most in (
        ("inputs", len(node.inputs), len(function.inputs)),
        ("outputs", len(node.outputs), len(function.outputs)),
    ):
        if have > most:
            return f"has {have} {what}, but the function has {most}"
    return None


def recursion(model: ir.Model) -> str | None:
    """Say which function calls itself, by whatever way, or return None."""
    functions = model.functions
    calls = {
        key: {
            node.op_identifier(): None
            for graph in graph_and_subgraphs(function.graph)
            for node in graph
            if node.op_identifier() in functions
        }
        for key, function in functions.items()
    }
    done: set[ir.OperatorIdentifier] = set()
    for start in calls:
        path: dict[ir.OperatorIdentifier, None] = {}
        stack = [(start, False)]
        while stack:
            key, left = stack.pop()
            if left:
                path.pop(key)
                done.add(key)
            elif key in path:
                return f"function '{key[1]}' calls itself"
            elif key not in done:
                path[key] = None
                stack.append((key, True))
                stack.extend((callee, False) for callee in calls[key])
    return None
