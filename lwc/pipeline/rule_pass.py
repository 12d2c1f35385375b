"""Passes made of rewrite rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import ClassVar, TypeAlias

from lwc.core.collector import without_collections
from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.core.text import kebab_case
from lwc.pipeline.passes import Pass, PassContext, PassResult
from lwc.rewrite import Rewriting, Rule, RuleSet, remove_unused, rewrite
from lwc.rewrite.patterns import PatternRule, pattern_rule

__all__ = ["AnyRule", "RulePass"]

AnyRule: TypeAlias = PatternRule | type[PatternRule] | Rule
"""What a rule pass is made of; of a pattern rule the class does."""

_ROUNDS = 8


class RulePass(Pass):
    """Applies rules until none matches.

    A subclass names its rules; it needs the decorator `@dataclass(frozen=True)` only where it adds
    options. Its name is by default that of the class in kebab case.

    Class attributes:
        rules: The rules; where several match at a node, the first one wins.
    """

    rules: ClassVar[tuple[AnyRule, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = kebab_case(cls.__name__)

    def find_rules(self) -> Iterable[AnyRule]:
        """Return the rules to apply; overridden where they depend on the options."""
        return self.rules

    def rules_under(self, ctx: PassContext) -> Iterable[AnyRule]:
        """Return the rules of a run; overridden where they depend on what the user granted."""
        return self.find_rules()

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Rewrite until nothing changes; what nothing reads any more goes, too.

        That tidying is in the statistics and counts as no rewrite: who requires a match means
        one of a rule.

        Raises:
            PassError: There are no rules, or one is none.
        """
        rules = RuleSet([_as_rule(each, self.name) for each in self.rules_under(ctx)])
        if not rules:
            raise PassError(f"'{self.name}' has no rules", remedy="set rules = (MyRule,)")
        with without_collections():
            done, changed = _apply(rules, ctx)
        ctx.report(done)
        if not changed:
            ctx.note("nothing to rewrite")
            return PassResult(False)
        tidied = remove_unused(module)
        if done.erased:
            tidied["dead-code"] = done.erased
        return PassResult(True, statistics=_sorted(tidied), rewrites=_sorted(done.hits))


def _apply(rules: RuleSet, ctx: PassContext) -> tuple[Rewriting, bool]:
    """Apply rules to a fixed point, of the shape analysis too: it is built anew after a change."""
    total = Rewriting()
    changed = False
    for _ in range(_ROUNDS):
        editor = ctx.editor()
        done = rewrite(editor, rules)
        total.hits += done.hits
        total.erased += done.erased
        total.applied += done.applied
        total.missed = done.missed
        if not editor.changed:
            break
        changed = True
        ctx.analyses.invalidate()
    return total, changed


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _as_rule(given: object, name: str) -> Rule:
    if isinstance(given, Rule):
        return given
    if isinstance(given, PatternRule) or (
        isinstance(given, type) and issubclass(given, PatternRule)
    ):
        return pattern_rule(given)
    raise PassError(
        f"'{name}' has {given!r} among its rules, which is none",
        remedy="give PatternRule classes, or functions decorated with @rule(...)",
    )
