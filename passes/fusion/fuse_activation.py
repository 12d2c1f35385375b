"""fuse-activation: GELU and SiLU in any exporter's spelling become one operator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import onnx_ir as ir

from lwc.core.walk import op_name
from lwc.passes.fusion.activation_parts import Activation, Gate, spelled_activation
from lwc.passes.fusion.pieces import orders
from lwc.pipeline.passes import Exact
from lwc.pipeline.rule_pass import AnyRule, RulePass
from lwc.rewrite import Editor, Miss, Outcome, Rule, attribute, producer_of, rule

__all__ = ["FuseActivation"]

Form: TypeAlias = Literal["auto", "standard", "contrib"]

MICROSOFT = "com.microsoft"
_GELU_OPSET, _SWISH_OPSET = 20, 24


@dataclass(frozen=True)
class FuseActivation(RulePass):
    """Compute GELU and SiLU as one operator, with the bias before it.

    Only float32 is fused: ONNX Runtime's CPU has these operators for no other type. The product of
    a gated network, silu(gate) * up, stays: ONNX Runtime 1.32 declares com.microsoft::SwiGLU, but
    has no kernel of it for the CPU.

    Attributes:
        form: `standard` is Gelu (opset 20) and Swish (opset 24), `contrib` ONNX Runtime's Gelu,
            FastGelu, BiasGelu and QuickGelu; `auto` takes the standard's Gelu where the opset has
            it and nothing is added before, and always QuickGelu, because ONNX Runtime takes Swish
            apart again.
    """

    form: Form = "auto"

    name: ClassVar[str] = "fuse-activation"
    contract: ClassVar[Exact] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes", "parameter-bytes"})

    def find_rules(self) -> Iterable[AnyRule]:
        """Return the rules: first the operator, then the bias it takes along."""
        yield self._spelled("Erf", "gelu", "x / 2 * (1 + erf(x / sqrt(2)))")
        yield self._spelled("Tanh", "gelu-tanh", "x / 2 * (1 + tanh(cubic(x)))")
        yield self._spelled("Sigmoid", "swish", "x * sigmoid(alpha * x)")
        if self.form != "standard":
            yield from (swish_operator, gelu_bias)

    def _spelled(self, gate: Gate, name: str, formula: str) -> Rule:
        def apply(node: ir.Node, edit: Editor) -> Outcome:
            found = spelled_activation(node, edit, gate)
            if found is None or isinstance(found, Miss):
                return found
            return _write(found, self.form, edit.opset(node), edit)

        return Rule(name, ("Mul", "Div"), apply, f"{formula} becomes one operator")


def _write(found: Activation, form: Form, opset: int, edit: Editor) -> ir.Value | Miss:
    """Make the operator and return its output."""
    if found.kind == "swish":
        if form != "standard":
            return _quick_gelu(found.source, found.alpha, edit)
        if opset < _SWISH_OPSET:
            return Miss(f"the standard has Swish from opset {_SWISH_OPSET} on, this is {opset}")
        return edit.op("Swish", [found.source], {"alpha": found.alpha})
    tanh = found.kind == "gelu-tanh"
    if form != "contrib" and opset >= _GELU_OPSET:
        return edit.op("Gelu", [found.source], {"approximate": "tanh" if tanh else "none"})
    if form == "standard":
        return Miss(f"the standard has Gelu from opset {_GELU_OPSET} on, this is {opset}")
    if not tanh:
        return edit.op("Gelu", [found.source], domain=MICROSOFT)
    if not edit.rank(found.source):
        return Miss("ONNX Runtime's FastGelu takes no single number")
    return edit.op("FastGelu", [found.source], domain=MICROSOFT)


def _quick_gelu(source: ir.Value, alpha: float, edit: Editor) -> ir.Value:
    return edit.op("QuickGelu", [source], {"alpha": alpha}, domain=MICROSOFT)


@rule("Swish")
def swish_operator(node: ir.Node, edit: Editor) -> Outcome:
    """Swish, which ONNX Runtime takes apart, becomes its QuickGelu."""
    source = node.inputs[0]
    if source is None or edit.dtype(source) != ir.DataType.FLOAT:
        return None
    return _quick_gelu(source, attribute(node, "alpha", 1.0), edit)


@rule("Gelu", "com.microsoft::Gelu", "com.microsoft::FastGelu")
def gelu_bias(node: ir.Node, edit: Editor) -> Outcome:
    """gelu(x + bias) becomes one operator."""
    total = node.inputs[0]
    add = producer_of(total, "Add")
    if add is None or total is None or len(node.inputs) > 1 or add.graph is not node.graph:
        return None
    if edit.dtype(total) != ir.DataType.FLOAT:
        return Miss("ONNX Runtime adds the bias in float alone")
    for source, bias in orders(add):
        if _is_bias(bias, total, edit) and edit.same_shape(source, total):
            if not edit.single_use(total):
                return Miss("the sum has other consumers", add)
            tanh = op_name(node) == "com.microsoft::FastGelu" or (
                attribute(node, "approximate", "none") in ("tanh", b"tanh")
            )
            op = "FastGelu" if tanh else "BiasGelu"
            return edit.op(op, [source, bias], domain=MICROSOFT)
    return None


def _is_bias(value: ir.Value, total: ir.Value, edit: Editor) -> bool:
    """Tell whether a value is a vector along the last axis; the kernel divides by its length."""
    shape, whole = edit.shape(value), edit.shape(total)
    if shape is None or not whole or len(shape) != 1 or edit.dtype(value) != ir.DataType.FLOAT:
        return False
    return isinstance(shape[0], int) and shape[0] > 0 and shape[0] == whole[-1]
