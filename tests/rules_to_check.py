"""Rule passes that tests of the property verifier check: a right one, and the same with faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from lwc.pipeline.passes import PassContext, PassResult
from lwc.pipeline.rule_pass import RulePass
from lwc.rewrite import Editor, Miss
from lwc.rewrite.patterns import PatternRule

__all__ = ["Double", "DoubleForgetsConsumers", "DoubleIgnoresOrder", "DoubleOfAnything"]


class AddItself(PatternRule):
    """x + x is x times two."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Add(x, x)

    def check(self, edit: Editor, **bindings: Any) -> dict[str, Any] | Miss:
        if edit.dtype(bindings["x"]) != ir.DataType.FLOAT:
            return Miss("it is no float32")
        return {}

    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value | Sequence[ir.Value] | Miss:
        import numpy as np

        return edit.op("Mul", [bindings["x"], edit.constant(np.array(2.0, np.float32), "two")])


class Double(RulePass):
    """Double by a product."""

    rules = (AddItself,)


class AddAnything(AddItself):
    """x + y is x times two: only where both are one value."""

    def pattern(self, op: Any, x: Any, y: Any) -> Any:  # type: ignore[override]
        return op.Add(x, y)


class DoubleOfAnything(RulePass):
    """Double whatever is added."""

    rules = (AddAnything,)


class DoubleTwice(RulePass):
    """Double by a product of four."""

    rules = (AddItself,)


class SubtractItself(PatternRule):
    """x - y is -(x - y)."""

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Sub(x, y)

    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value | Sequence[ir.Value] | Miss:
        return edit.op("Neg", [edit.op("Add", [bindings["x"], edit.op("Neg", [bindings["y"]])])])


class DoubleIgnoresOrder(RulePass):
    """Turn differences into sums, with the sign wrong."""

    rules = (SubtractItself,)


class DoubleForgetsConsumers(RulePass):
    """Double, and say nothing of it."""

    rules = (AddItself,)

    def run(self, module: Any, ctx: PassContext) -> PassResult:
        super().run(module, ctx)
        return PassResult(False)
