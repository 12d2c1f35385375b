"""Rewriting: rules, the editor they change graphs through, and the driver that applies them."""

from lwc.rewrite.driver import Missed, Rewriting, rewrite
from lwc.rewrite.editor import MIN_OPSET, Editor, attribute, producer_of, use_count
from lwc.rewrite.limit import RewriteLimit, Step
from lwc.rewrite.rules import ANY, EDITED, Edited, Miss, Outcome, Rule, RuleSet, first_line, rule
from lwc.rewrite.unused import remove_unused

__all__ = [
    "ANY",
    "EDITED",
    "MIN_OPSET",
    "Edited",
    "Editor",
    "Miss",
    "Missed",
    "Outcome",
    "RewriteLimit",
    "Rewriting",
    "Rule",
    "RuleSet",
    "Step",
    "attribute",
    "first_line",
    "producer_of",
    "remove_unused",
    "rewrite",
    "rule",
    "use_count",
]
