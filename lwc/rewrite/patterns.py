"""Rules written in onnxscript's pattern language, behind lwc's driver.

A pattern rule has three parts: `pattern` says what the graph looks like, `check` says when the
rewrite is legal and returns what it found out, `rewrite` builds the replacement. onnxscript
matches; the driver names, records, counts and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from lwc.core.errors import PassError
from lwc.core.text import kebab_case
from lwc.rewrite.editor import Editor
from lwc.rewrite.rules import Miss, Outcome, Rule, first_line

if TYPE_CHECKING:
    from lwc.rewrite.matching import Stop

__all__ = ["PatternRule", "pattern_rule"]


def _no_condition(self: PatternRule, edit: Editor, **bindings: Any) -> None:
    """Every match is legal."""


class PatternRule:
    """A rewrite in three methods. Instances hold no state: a match carries what `check` found.

    The methods' parameters after `edit` are named after those of `pattern`; each gets the value
    (or attribute) that it stands for in the match.

    Class attributes:
        name: The rule's name in statistics and remarks; by default the class's in kebab case.
        roots: The operators of the node that produces the pattern's outputs, as `op_name` of
            `lwc.core.walk` spells them; by default read from the pattern.
    """

    name: ClassVar[str]
    roots: ClassVar[tuple[str, ...]] = ()

    pattern: ClassVar[Callable[..., Any]]
    """Method: describes the graph in onnxscript's pattern language, given `op` and its inputs.

    A parameter that appears twice must be the same value both times; a number is a constant.
    """

    check: ClassVar[Callable[..., dict[str, Any] | Miss | None]] = _no_condition
    """Method: returns a `Miss` where the rewrite is not legal, else what else it needs by name."""

    rewrite: ClassVar[Callable[..., ir.Value | Sequence[ir.Value] | Miss]]
    """Method: builds the replacement of the pattern's outputs through the editor."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = kebab_case(cls.__name__)


def pattern_rule(definition: PatternRule | type[PatternRule]) -> Rule:
    """Make a driver rule.

    Nodes inside the match may have no other consumers and leave no graph: else it is a miss. So
    is a graph in which at least half of the pattern's nodes, and two, are found; the miss names
    the furthest node and the condition that failed. With `Editor.explain` less will do.

    Raises:
        PassError: A method is missing, or the pattern is none that a rule can have.
    """
    made = _instance(definition)
    compiled = _Compiled(made)
    roots = made.roots or compiled.roots()
    return Rule(made.name, roots, compiled.apply, first_line(type(made)))


def _instance(definition: PatternRule | type[PatternRule]) -> PatternRule:
    cls = definition if isinstance(definition, type) else type(definition)
    lacking = [method for method in ("pattern", "rewrite") if not callable(getattr(cls, method, 0))]
    if lacking:
        raise PassError(f"rule '{cls.__name__}' has no method {' and no '.join(lacking)}")
    return definition() if isinstance(definition, type) else definition


class _Compiled:
    """A rule with its pattern in every order of commutative operands.

    The pattern is compiled when it is first needed: onnxscript takes a while to import.
    """

    def __init__(self, definition: PatternRule) -> None:
        self._definition = definition
        self._variants: list[Any] = []

    def variants(self) -> list[Any]:
        """Return the compiled pattern, once for each order of its commutative operands.

        Raises:
            PassError: The pattern has several ends, or gives away values from its middle.
        """
        if self._variants:
            return self._variants
        from onnxscript.rewriter import pattern as language

        from lwc.rewrite.matching import Matcher

        made = self._definition
        try:
            rule = language.RewriteRule(
                made.pattern, lambda op, **_: None, matcher=Matcher, name=made.name
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            raise PassError(f"rule '{made.name}' has no usable pattern: {error}") from error
        graph = rule._target_pattern
        if not graph.has_single_output_node or any(
            output.producer() is not graph.output_node for output in graph.outputs
        ):
            raise PassError(
                f"rule '{made.name}' rewrites more than one end of a pattern",
                remedy="return outputs of one node only",
            )
        self._variants = list(rule.commute())
        if made.roots and not set(made.roots) & set(self.roots()):
            raise PassError(
                f"rule '{made.name}' starts at {', '.join(made.roots)}, but its pattern ends in "
                f"{', '.join(self.roots())}"
            )
        return self._variants

    def roots(self) -> tuple[str, ...]:
        """Return the operator at the end of the pattern; any where it has no fixed name."""
        identifier = self.variants()[0]._target_pattern.output_node.op_identifier()
        if identifier is None:
            return ("*",)
        domain, op_type, _ = identifier
        return (f"{domain}::{op_type}" if domain else op_type,)

    def apply(self, node: ir.Node, edit: Editor) -> Outcome:
        """Look at one node as the end of the pattern."""
        made = self._definition
        objection: Miss | None = None
        nearest: Stop | None = None
        for variant in self.variants():
            matcher = variant._matcher
            match = variant.match(
                edit.module.model, node.graph, node, check_nodes_are_removable=False
            )
            if not match:
                stop = matcher.stop or _refusal(matcher, node)
                if nearest is None or stop.matched > nearest.matched:
                    nearest = stop
                continue
            shared = _shared_inside(match)
            if shared is not None:
                objection = Miss("a value inside the pattern has other consumers", shared)
                continue
            found = made.check(edit, **match.bindings)
            if isinstance(found, Miss):
                objection = found
                continue
            if not isinstance(found, Mapping | None):
                raise TypeError(f"check returned a {type(found).__name__}, not a dict or a Miss")
            made_values = made.rewrite(edit, **{**match.bindings, **(found or {})})
            return _in_place(made_values, variant._target_pattern, node)
        if objection is not None or nearest is None:
            return objection
        needed = max(2, (len(variant._target_pattern) + 1) // 2)
        asked = edit.asks_about(node) or edit.asks_about(nearest.node)
        if nearest.matched >= needed or asked:
            return Miss(nearest.reason, nearest.node)
        return None


def _refusal(matcher: Any, node: ir.Node) -> Stop:
    """Describe a match that a `_check` inside the pattern refused."""
    from lwc.rewrite.matching import Stop

    match = matcher._match
    places = [each for each in match.failure_nodes_and_values if isinstance(each, ir.Node)]
    return Stop(match.num_matched_nodes(), places[-1] if places else node, match.reason)


def _in_place(made: Any, pattern: Any, node: ir.Node) -> Outcome:
    """Put the values a rewrite made where the node's outputs are that they stand for."""
    if isinstance(made, Miss):
        return made
    values = [made] if isinstance(made, ir.Value) else made
    if not isinstance(values, list | tuple) or len(values) != len(pattern.outputs):
        got = f"{len(values)}" if isinstance(values, list | tuple) else f"a {type(made).__name__}"
        raise TypeError(f"rewrite returned {got}, not {len(pattern.outputs)} values or a Miss")
    placed: list[ir.Value | None] = [None] * len(node.outputs)
    for output, value in zip(pattern.outputs, values, strict=True):
        placed[output.output_index] = value
    return placed


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
