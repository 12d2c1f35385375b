"""Passes made of rules: what they count and what they only tidy up."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from support import module_of

import lwc
from lwc.core.errors import PassError, RequirementError

TEXT = """g (float[n, 4] x) => (float[n, 4] y) <float one = {1}> {
    dead = Add (x, one)
    once = Neg (x)
    {line}
}"""


class DoubleNeg(lwc.PatternRule):
    """A value negated twice is itself."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def rewrite(self, edit: lwc.Editor, x: ir.Value) -> ir.Value:
        return x


class DropNegs(lwc.RulePass):
    """Remove double negations."""

    rules = (DoubleNeg,)


def graph(line: str) -> lwc.Module:
    return module_of(TEXT.replace("{line}", line))


def test_tidying_is_counted_apart_from_rewrites() -> None:
    (entry,) = lwc.optimize(graph("y = Neg (once)"), DropNegs()).record.passes
    assert entry.rewrites == {"double-neg": 1}
    assert entry.statistics == {"dead-code": 1, "unused-initializers": 1}


def test_tidying_is_no_match() -> None:
    result = lwc.optimize(graph("y = Abs (once)"), DropNegs())
    (entry,) = result.record.passes
    assert entry.changed
    assert entry.rewrites == {}
    with pytest.raises(RequirementError, match="applied 0 rewrites"):
        lwc.optimize(graph("y = Abs (once)"), DropNegs(), require_match=1)


def test_a_pass_without_rules_is_an_error() -> None:
    class Empty(lwc.RulePass):
        """Have no rules."""

    with pytest.raises(PassError, match="'empty' has no rules"):
        lwc.optimize(graph("y = Abs (once)"), Empty())
