"""Constants as initializers, and outputs of control flow that no consumer asks for."""

from __future__ import annotations

import onnx_ir as ir

from lwc.rewrite import EDITED, Editor, Outcome, Rule, attribute, rule, use_count

__all__ = ["RULES", "lift_constant"]


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


RULES: tuple[Rule, ...] = (lift_constant, unused_branch_outputs)
