"""Fuse x * sigmoid(alpha * x) into one operator."""

import onnx_ir as ir
from lwc import Miss, PatternRule, RulePass


class PlainSwish(PatternRule):
    """x * sigmoid(x) becomes one operator."""

    def pattern(self, op, x):
        return op.Mul(x, op.Sigmoid(x))

    def check(self, edit, x):
        return None if edit.dtype(x) == ir.DataType.FLOAT else Miss("x is not float32")

    def rewrite(self, edit, x, alpha=1.0, **_):
        if edit.opset(edit.root) >= 24:
            return edit.op("Swish", [x], {"alpha": alpha})
        return edit.op("QuickGelu", [x], {"alpha": alpha}, domain="com.microsoft")


class ScaledSwish(PlainSwish):
    """x * sigmoid(alpha * x) becomes one operator."""

    def pattern(self, op, x, scale):
        return op.Mul(x, op.Sigmoid(op.Mul(x, scale)))

    def check(self, edit, x, scale):
        alpha = edit.scalar(scale)
        if alpha is None or not edit.same_shape(x, edit.root.outputs[0]):
            return Miss("alpha is not one constant number for all of x")
        return super().check(edit, x) or {"alpha": alpha}


class FuseSwish(RulePass):
    """Compute x * sigmoid(alpha * x) as one operator."""

    rules = (PlainSwish, ScaledSwish)
    never_more = frozenset({"nodes"})
