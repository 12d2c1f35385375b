"""How many rewrites a pass may still do: what bisection turns to find the wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lwc.core.diagnostics import describe

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RewriteLimit", "Step"]


@dataclass(frozen=True)
class Step:
    """One rewrite.

    Attributes:
        rule: The rule, or what the pass calls this kind of rewrite.
        node: The node it started at, as `describe` of `lwc.core.diagnostics` names it.
    """

    rule: str
    node: str | None


class RewriteLimit:
    """Counts rewrites and stops a pass after a given number of them.

    Rewrites are numbered from 1 in the order in which the pass does them. A pass that honours the
    limit does with `allowed=n` exactly the first n rewrites of its unlimited run. What only tidies
    up (dead nodes, unread constants) is not counted and goes on after the limit.

    Args:
        allowed: How many may happen; None for all.
        record: Keep every step in `steps`; otherwise only the one that reached the limit is kept.
    """

    def __init__(self, allowed: int | None = None, *, record: bool = False) -> None:
        self.allowed = allowed
        self.count = 0
        self.steps: list[Step] = []
        self._record = record

    @property
    def exhausted(self) -> bool:
        """Whether no further rewrite may happen."""
        return self.allowed is not None and self.count >= self.allowed

    @property
    def last(self) -> Step | None:
        """The last step kept: with `allowed`, the one that reached it."""
        return self.steps[-1] if self.steps else None

    def spend(self, rule: str, node: ir.Node | None = None) -> None:
        """Count one rewrite; called before the graph changes, so that the node is still whole."""
        self.count += 1
        if self._record or self.count == self.allowed:
            self.steps.append(Step(rule, None if node is None else describe(node)))
