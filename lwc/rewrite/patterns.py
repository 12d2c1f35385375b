"""Rules written in onnxscript's pattern language, behind lwc's driver.

A pattern rule has three parts: `pattern` says what the graph looks like, `check` says when the
rewrite is legal and returns what it found out, `rewrite` builds the replacement. onnxscript
matches; the driver names, records, counts and reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from lwc.rewrite.editor import Editor
from lwc.rewrite.rules import Miss, Outcome, Rule

__all__ = ["PatternRule", "pattern_rule"]


class PatternRule(ABC):
    """A rewrite in three methods. Instances hold no state: a match carries what `check` found.

    Class attributes:
        name: The rule's name in statistics and remarks.
        roots: The operators of the node that produces the pattern's output.
    """

    name: ClassVar[str]
    roots: ClassVar[tuple[str, ...]]

    pattern: ClassVar[Callable[..., Any]]
    """Method: describes the graph in onnxscript's pattern language, given `op` and its inputs."""

    def check(self, edit: Editor, **bindings: Any) -> dict[str, Any] | Miss:
        """Return what the rewrite needs besides the bindings, or the reason it is not legal."""
        return {}

    @abstractmethod
    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value | Sequence[ir.Value] | Miss:
        """Build the replacement of the pattern's outputs through the editor."""


def pattern_rule(definition: PatternRule) -> Rule:
    """Make a driver rule; the pattern is compiled when the first root is met.

    Nodes inside the match may have no other consumers and leave no graph: else it is a miss.
    """
    compiled: list[Any] = []

    def apply(node: ir.Node, edit: Editor) -> Outcome:
        if not compiled:
            compiled.extend(_compile(definition))
        furthest: Miss | None = None
        for pattern in compiled:
            assert node.graph is not None
            match = pattern.match(
                edit.module.model, node.graph, node, check_nodes_are_removable=False
            )
            if not match:
                continue
            shared = _shared_inside(match)
            if shared is not None:
                furthest = Miss("a value inside the pattern has other consumers", shared)
                continue
            found = definition.check(edit, **match.bindings)
            if isinstance(found, Miss):
                furthest = found
                continue
            return definition.rewrite(edit, **{**match.bindings, **found})
        return furthest

    return Rule(definition.name, definition.roots, apply)


def _compile(definition: PatternRule) -> list[Any]:
    """Return the pattern in every order of its commutative operands."""
    from onnxscript.rewriter import pattern as language

    rule = language.RewriteRule(definition.pattern, lambda op, **_: None, name=definition.name)
    return list(rule.commute())


def _shared_inside(match: Any) -> ir.Node | None:
    """Return a matched node that something outside the match also reads."""
    inside = set(match.nodes)
    results = set(match.outputs)
    for node in match.nodes:
        for value in node.outputs:
            if value in results:
                continue
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                found: ir.Node = node
                return found
    return None
