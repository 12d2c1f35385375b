"""What no consumer asks for: weights, outputs of control flow, and functions."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from lwc.core.module import Module
from lwc.rewrite import EDITED, Editor, Outcome, Rule, attribute, rule, use_count

__all__ = ["RULES", "lift_constant", "remove_unused"]


@rule("Constant")
def lift_constant(node: ir.Node, edit: Editor) -> Outcome:
    """A Constant node: an initializer, shared with equal ones; functions hold none."""
    if edit.in_function(node):
        return None
    tensor = edit.tensor(node.outputs[0])
    if tensor is None:
        return None
    assert node.graph is not None
    if node.outputs[0].is_graph_output():
        if not node.outputs[0].uses():
            return None
        edit.redirect(node.outputs[0], edit.constant(tensor))
        return EDITED
    return edit.constant(tensor)


@rule("If")
def unused_branch_outputs(node: ir.Node, edit: Editor) -> Outcome:
    """Outputs of an If that nothing reads: neither branch computes them any more."""
    unused = [
        index
        for index, value in enumerate(node.outputs)
        if not use_count(value) and not value.is_graph_output()
    ]
    if not unused or len(unused) == len(node.outputs):
        return None
    for branch in (attribute(node, "then_branch"), attribute(node, "else_branch")):
        for index in reversed(unused):
            producer = branch.outputs.pop(index).producer()
            if producer is not None:
                edit.touch(producer)
    kept = [value for index, value in enumerate(node.outputs) if index not in unused]
    attributes = dict(node.attributes.items())
    node.attributes.clear()
    made = edit.node("If", [node.inputs[0]], attributes, outputs=len(kept))
    replacements = iter(made.outputs)
    return [None if index in unused else next(replacements) for index in range(len(node.outputs))]


def remove_unused(module: Module) -> Counter[str]:
    """Remove initializers nothing reads, and functions nothing calls.

    Returns:
        How many of each went.
    """
    gone: Counter[str] = Counter()
    for graph, value in list(module.initializers()):
        if use_count(value) or value.is_graph_output() or value.is_graph_input():
            continue
        assert value.name is not None
        del graph.initializers[value.name]
        gone["unused-initializers"] += 1
    functions = module.model.functions
    while functions:
        called = {node.op_identifier() for node in module.nodes()}
        unused = [key for key in functions if key not in called]
        if not unused:
            break
        for key in unused:
            del functions[key]
            gone["unused-functions"] += 1
    return gone


RULES: tuple[Rule, ...] = (lift_constant, unused_branch_outputs)
