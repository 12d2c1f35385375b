"""The driver: a worklist that applies rules until none matches.

Every node is visited once in topological order; after that only nodes that a rewrite touched are
visited again, so that the cost grows with the graph and the matches.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, PassError
from lwc.core.walk import attribute_graphs, op_name
from lwc.rewrite.editor import Editor
from lwc.rewrite.limit import Step
from lwc.rewrite.rules import Edited, Miss, Rule, RuleSet

if TYPE_CHECKING:
    from lwc.analysis.shapes import Fact, Shapes

__all__ = ["Missed", "Rewriting", "rewrite"]

_EDITS_PER_NODE = 64
"""A node edited this often in one run means that rules undo each other."""

_REWRITES_PER_NODE = 32
_REWRITES_AT_LEAST = 1000
"""More rewrites than this for a graph of that many nodes mean that rules undo each other through
nodes that they make; the built-in passes need less than two."""


@dataclass(frozen=True)
class Missed:
    """A rule that did not apply.

    Attributes:
        rule: Its name.
        root: The node it started at.
        node: The furthest node it reached.
        reason: The condition that failed.
        near: Whether the structure was there; otherwise the rule only looked.
    """

    rule: str
    root: ir.Node
    node: ir.Node
    reason: str
    near: bool = True


@dataclass
class Rewriting:
    """What a run of the driver did.

    Attributes:
        hits: How often each rule applied.
        erased: Nodes removed because nothing read them.
        missed: Rules that came near and did not apply in the end; with `Editor.explain`, also
            those that looked at the nodes in question and found nothing.
        applied: With `Editor.explain`, the rewrites at the nodes in question.
    """

    hits: Counter[str] = field(default_factory=Counter)
    erased: int = 0
    missed: list[Missed] = field(default_factory=list)
    applied: list[Step] = field(default_factory=list)


def rewrite(
    editor: Editor, rules: RuleSet, *, sweep: Callable[[Editor], Counter[str]] | None = None
) -> Rewriting:
    """Apply `rules` everywhere in the editor's module until nothing changes.

    Args:
        editor: Gives access to the module.
        rules: What to apply.
        sweep: A step over whole graphs (such as common subexpressions) that runs whenever the
            worklist is empty; the nodes it touches are visited again. It counts its rewrites by
            `Editor.limit` and stops where that is exhausted.

    Once the editor's limit is exhausted only dead nodes go.

    Raises:
        PassError: Rules come to no end, or one raises or returns nonsense.
    """
    worklist = _Worklist(_in_order(editor))
    run = _Run(editor, rules, len(worklist))
    while True:
        for node, inputs_changed in worklist:
            if inputs_changed and _facts_improved(node, editor):
                for output in node.outputs:
                    editor.touch(*(use.node for use in output.uses()), inputs_changed=True)
            run.visit(node)
            if editor.touched:
                worklist.push(editor.touched)
                editor.touched = {}
        if sweep is None or editor.limit.exhausted:
            break
        run.result.hits += sweep(editor)
        if not editor.touched:
            break
        worklist.push(editor.touched)
        editor.touched = {}
    run.result.applied = editor.applied
    run.result.missed = [each for each in run.missed.values() if each.node.graph is not None]
    return run.result


class _Run:
    """Applies rules at nodes and keeps the books."""

    def __init__(self, editor: Editor, rules: RuleSet, nodes: int) -> None:
        most = max(_REWRITES_AT_LEAST, _REWRITES_PER_NODE * nodes)
        self._last = editor.limit.count + most
        self.result = Rewriting()
        self.missed: dict[tuple[str, ir.Node], Missed] = {}
        self._editor = editor
        self._rules = rules
        self._edits: Counter[ir.Node] = Counter()

    def visit(self, node: ir.Node) -> None:
        """Erase a dead node, or apply the first rule that matches.

        A node whose attributes refer to a function's parameters is left alone.
        """
        editor = self._editor
        if editor.is_dead(node):
            if editor.explain is not None:
                editor.note_applied("dead-code", node)
            self.result.erased += editor.erase(node)
            return
        if any(each.is_ref() for each in node.attributes.values()):
            return
        if editor.limit.exhausted:
            return
        editor.root = node
        for rule in self._rules.at(op_name(node)):
            try:
                outcome = rule.apply(node, editor)
            except (LwcError, OSError, MemoryError):
                raise
            except Exception as error:
                raise _blame(rule, node, error) from error
            if isinstance(outcome, Miss):
                reached = outcome.node or node
                self.missed[rule.name, node] = Missed(rule.name, node, reached, outcome.reason)
                continue
            if self.missed:
                self.missed.pop((rule.name, node), None)
            if outcome is not None:
                self._carry_out(node, rule, outcome)
                return
            if editor.explain is not None and editor.asks_about(node):
                self._note_look(node, rule)

    def _note_look(self, node: ir.Node, rule: Rule) -> None:
        """Note that a rule found nothing; for whole modules that would be every rule everywhere."""
        if self._editor.explain:
            reason = f"looked here and found nothing like it: {rule.summary}".removesuffix(": ")
            self.missed[rule.name, node] = Missed(rule.name, node, node, reason, near=False)

    def _carry_out(
        self, node: ir.Node, rule: Rule, outcome: ir.Value | Sequence[ir.Value | None] | Edited
    ) -> None:
        editor = self._editor
        self.result.hits[rule.name] += 1
        editor.spend(rule.name, node)
        if editor.limit.count > self._last:
            raise PassError(f"rule '{rule.name}' comes to no end", node=describe(node))
        if isinstance(outcome, Edited):
            self._edits[node] += 1
            if self._edits[node] > _EDITS_PER_NODE:
                raise PassError(f"rule '{rule.name}' comes to no end", node=describe(node))
            editor.changed = True
            editor.touch(node, inputs_changed=True)
            return
        values = [outcome] if isinstance(outcome, ir.Value) else outcome
        if not _are_values(values):
            raise PassError(
                f"rule '{rule.name}' returned {_shown(outcome)}, which is no outcome of a rule",
                node=describe(node),
            )
        if len(values) > len(node.outputs):
            raise PassError(
                f"rule '{rule.name}' returned {len(values)} values, not {len(node.outputs)}",
                node=describe(node),
            )
        for old, new in zip(node.outputs, values, strict=False):
            if new is not None:
                editor.replace(old, new)
        if node.graph is not None and editor.is_dead(node):
            editor.erase(node)


def _blame(rule: Rule, node: ir.Node, error: Exception) -> PassError:
    reason = " ".join(str(error).split())
    text = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return PassError(f"rule '{rule.name}' raised {text}", node=describe(node))


def _are_values(values: object) -> bool:
    return isinstance(values, list | tuple) and all(
        value is None or isinstance(value, ir.Value) for value in values
    )


def _shown(outcome: object) -> str:
    if isinstance(outcome, list | tuple):
        return f"a {type(outcome).__name__} of {', '.join(type(each).__name__ for each in outcome)}"
    return f"a {type(outcome).__name__}"


def _facts_improved(node: ir.Node, editor: Editor) -> bool:
    """Infer a node again; tell whether its consumers can learn from it.

    Facts that say no more than the old ones are put back: fresh symbols under other names would
    look like news all the way down the graph.
    """
    shapes = editor.shapes
    before = [shapes.fact(value) for value in node.outputs]
    shapes.infer(node)
    improved = False
    for value, old in zip(node.outputs, before, strict=True):
        new = shapes.fact(value)
        if old is new or _weight(old, shapes) >= _weight(new, shapes):
            shapes.set_fact(value, old)
        else:
            improved = True
    return improved


def _weight(fact: Fact, shapes: Shapes) -> int:
    """Measure how much a fact says; more for a number than for an expression."""
    weight = int(fact.dtype is not None)
    if fact.shape is not None:
        weight += 1
        for dim in fact.shape:
            weight += 2 if isinstance(dim, int) else not shapes.mentions_fresh(dim)
    if fact.known is not None:
        weight += 1
        for each in fact.known.ravel():
            weight += 2 if isinstance(each, int | float) else not shapes.mentions_fresh(each)
    return weight


def _in_order(editor: Editor) -> Iterator[ir.Node]:
    """Yield every node in topological order, the bodies it holds right after a node."""
    stack = [iter(list(graph)) for graph in reversed(editor.roots())]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        yield node
        if node.attributes:
            stack.extend(iter(list(graph)) for graph in attribute_graphs(node))


class _Worklist:
    def __init__(self, nodes: Iterator[ir.Node]) -> None:
        self._queue = deque(nodes)
        self._waiting = dict.fromkeys(self._queue, False)

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, nodes: dict[ir.Node, bool]) -> None:
        for node, inputs_changed in nodes.items():
            if node not in self._waiting:
                self._queue.append(node)
                self._waiting[node] = inputs_changed
            elif inputs_changed:
                self._waiting[node] = True

    def __iter__(self) -> Iterator[tuple[ir.Node, bool]]:
        while self._queue:
            node = self._queue.popleft()
            inputs_changed = self._waiting.pop(node)
            if node.graph is None:
                continue
            yield node, inputs_changed
