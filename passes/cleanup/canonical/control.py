"""Control flow whose course is known: branches taken and loops run at most once, inlined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lwc.core.walk import constant_tensor
from lwc.rewrite import Editor, Miss, Outcome, Rule, attribute, rule

__all__ = ["RULES"]


@rule("If")
def decided_if(node: ir.Node, edit: Editor) -> Outcome:
    """An If whose condition is constant: the branch it takes."""
    condition = _truth(node.inputs[0], edit)
    if condition is None:
        return None
    branch: ir.Graph = attribute(node, "then_branch" if condition else "else_branch")
    return _inline(node, branch, (), edit)


@rule("Loop")
def short_loop(node: ir.Node, edit: Editor) -> Outcome:
    """A Loop that runs not at all or exactly once."""
    trips = edit.ints(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    start = node.inputs[1] if len(node.inputs) > 1 else None
    go_on = True if start is None else _truth(start, edit)
    carried = list(node.inputs[2:])
    scanned = node.outputs[len(carried) :]
    if go_on is False or (trips is not None and trips[0] <= 0):
        if any(value.uses() or value.is_graph_output() for value in scanned):
            return Miss("it never runs, but its empty scan outputs are used")
        return carried
    if trips is None or trips[0] != 1 or go_on is None:
        return None
    if len(scanned) > 1:
        return Miss("it runs once, but each of its scan outputs would need a node of its own")
    first = edit.constant(np.array(0, dtype=np.int64), "iteration")
    condition = edit.constant(np.array(True), "condition")
    results = _inline(node, attribute(node, "body"), [first, condition, *carried], edit)[1:]
    axis = edit.constant([0], "axes") if len(results) > len(carried) else None
    return [
        value if index < len(carried) else edit.op("Unsqueeze", [value, axis])
        for index, value in enumerate(results)
    ]


def _truth(value: ir.Value | None, edit: Editor) -> bool | None:
    known = edit.ints(value)
    if known is not None and len(known) == 1:
        return bool(known[0])
    scalar = edit.scalar(value)
    return None if scalar is None else bool(scalar)


def _inline(
    node: ir.Node, body: ir.Graph, arguments: Sequence[ir.Value | None], edit: Editor
) -> list[ir.Value]:
    """Move the nodes of a body before its node and return the values of the body's outputs."""
    given: dict[ir.Value, ir.Value] = {}
    for parameter, argument in zip(body.inputs, arguments, strict=True):
        assert argument is not None
        given[parameter] = argument
        edit.redirect(parameter, argument)
    results = [given.get(output, output) for output in body.outputs]
    body.outputs.clear()
    _lift_initializers(body, results, edit)
    moved = list(body)
    for inner in moved:
        body.remove(inner)
    for inner in moved:
        _rename(inner, edit)
        edit.adopt(inner)
    return results


def _lift_initializers(body: ir.Graph, results: list[ir.Value], edit: Editor) -> None:
    for name, value in list(body.initializers.items()):
        tensor = constant_tensor(value)
        assert tensor is not None
        del body.initializers[name]
        lifted = edit.constant(tensor, name)
        edit.redirect(value, lifted)
        for index, result in enumerate(results):
            if result is value:
                results[index] = lifted


def _rename(node: ir.Node, edit: Editor) -> None:
    """Give a moved node and its outputs names of their own: another branch may share them."""
    fresh = edit.module.fresh_name
    if node.name:
        node.name = fresh(node.name)
    for value in node.outputs:
        if value.name:
            value.name = fresh(value.name)


RULES: tuple[Rule, ...] = (decided_if, short_loop)
