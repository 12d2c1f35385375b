"""What a rewrite rule is: a function indexed by the operators it starts at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.rewrite.editor import Editor

__all__ = ["ANY", "EDITED", "Edited", "Miss", "Outcome", "Rule", "RuleSet", "first_line", "rule"]

ANY = "*"
"""The operator name under which a rule sees every node."""


@dataclass(frozen=True)
class Miss:
    """A rule came near: the structure is there, but a condition of legality failed.

    Attributes:
        reason: One sentence for the user.
        node: The furthest node that was reached, or None for the rule's root.
    """

    reason: str
    node: ir.Node | None = None


class Edited:
    """The rule changed the node in place instead of replacing its outputs."""


EDITED = Edited()

Outcome: TypeAlias = "ir.Value | Sequence[ir.Value | None] | Miss | Edited | None"
"""What a rule returns: the values that take the place of the root's outputs (None leaves one as
it is), `EDITED`, a `Miss`, or None where nothing like it is there."""


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: Names it in statistics and remarks.
        ops: The operators of its root node, as `op_name` of `lwc.core.walk` spells them.
        apply: Looks at a root node and rewrites through the editor.
        summary: What it looks for and makes of it, in a line; `--explain` shows it.
    """

    name: str
    ops: tuple[str, ...]
    apply: Callable[[ir.Node, Editor], Outcome]
    summary: str = ""

    def __post_init__(self) -> None:
        if not self.summary:
            object.__setattr__(self, "summary", first_line(self.apply))


def first_line(documented: object) -> str:
    """Return the first line of a docstring, without its full stop; empty where there is none."""
    lines = (getattr(documented, "__doc__", None) or "").strip().splitlines()
    return lines[0].strip().removesuffix(".") if lines else ""


def rule(*ops: str) -> Callable[[Callable[[ir.Node, Editor], Outcome]], Rule]:
    """Make a rule of a function: its name in kebab case is the rule's name."""

    def wrap(function: Callable[[ir.Node, Editor], Outcome]) -> Rule:
        return Rule(function.__name__.replace("_", "-"), ops, function)

    return wrap


class RuleSet:
    """Rules by root operator, so that cost grows with the nodes that can match."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._by_op: dict[str, list[Rule]] = {}
        self._everywhere: list[Rule] = []
        for each in rules:
            if ANY in each.ops:
                self._everywhere.append(each)
            for op in each.ops:
                if op != ANY:
                    self._by_op.setdefault(op, []).append(each)
        self._merged: dict[str, tuple[Rule, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_op or self._everywhere)

    def at(self, op: str) -> tuple[Rule, ...]:
        """Return the rules that may start at a node of this operator, in the order given."""
        found = self._merged.get(op)
        if found is None:
            found = (*self._everywhere, *self._by_op.get(op, ()))
            self._merged[op] = found
        return found
