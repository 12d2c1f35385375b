"""fuse-norm: LayerNorm and RMSNorm in any exporter's spelling become one operator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lwc.passes.fusion.norm_ops import (
    Form,
    absorb_bias,
    absorb_cast,
    absorb_weight,
    with_bias,
    with_weight,
    without_casts,
    write_norm,
)
from lwc.passes.fusion.norm_parts import Kind, spelled_batch_form, spelled_norm
from lwc.passes.fusion.norm_skip import Skip, skip_norm
from lwc.pipeline.passes import Exact
from lwc.pipeline.rule_pass import AnyRule, RulePass
from lwc.rewrite import Editor, Miss, Outcome, Rule, rule

__all__ = ["FuseNorm"]


@dataclass(frozen=True)
class FuseNorm(RulePass):
    """Compute LayerNorm and RMSNorm as one operator, with the residual sum before it.

    A norm computes in float32; its input and result may be float16 with a Cast on either side.
    Norms that compute in half precision itself overflow where the operators do not, and stay.

    Attributes:
        form: `standard` is LayerNormalization (opset 17) and RMSNormalization (opset 23),
            `contrib` ONNX Runtime's SimplifiedLayerNormalization for RMSNorm; `auto` takes the
            standard's where the opset has it, else ONNX Runtime's of the same domain, which other
            tools do not know.
        skip: Which norms take the sum before them along, into ONNX Runtime's
            SkipLayerNormalization and SkipSimplifiedLayerNormalization: `all`, `none`, or with
            `auto` those where that is no slower on the CPU, which is RMSNorm. None where `form`
            is `standard`.
    """

    form: Form = "auto"
    skip: Skip = "auto"

    name: ClassVar[str] = "fuse-norm"
    contract: ClassVar[Exact] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes"})

    def find_rules(self) -> Iterable[AnyRule]:
        """Return the rules: first the operator, then what it takes over, then the sum."""
        yield self._spelled("layer", "layer-norm", "(x - mean(x)) / sqrt(variance(x) + epsilon)")
        yield self._spelled("rms", "rms-norm", "x / sqrt(mean(x * x) + epsilon)")
        yield self._batch_form()
        yield from (norm_weight, norm_bias, norm_casts)
        if self.skip != "none" and self.form != "standard":
            yield self._skip()

    def _spelled(self, kind: Kind, name: str, formula: str) -> Rule:
        def apply(node: ir.Node, edit: Editor) -> Outcome:
            found = spelled_norm(node, edit, kind)
            if found is None or isinstance(found, Miss):
                return found
            return write_norm(found, node, self.form, edit)

        return Rule(name, ("Mul", "Div"), apply, f"{formula} becomes one operator")

    def _batch_form(self) -> Rule:
        def apply(node: ir.Node, edit: Editor) -> Outcome:
            """x * k + (bias - mean(x) * k), k = weight / deviation, becomes one operator."""
            found = spelled_batch_form(node, edit)
            if found is None or isinstance(found, Miss):
                return found
            return write_norm(found, node, self.form, edit)

        return Rule("layer-norm-batch-form", ("Add",), apply)

    def _skip(self) -> Rule:
        def apply(node: ir.Node, edit: Editor) -> Outcome:
            """norm(x + residual) becomes one operator, which gives the sum too."""
            return skip_norm(node, edit, self.skip)

        roots = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
        return Rule("skip-norm", roots, apply)


@rule("Mul")
def norm_weight(node: ir.Node, edit: Editor) -> Outcome:
    """norm(x) * weight, the norm's own weight all ones, becomes its weight."""
    found = absorb_weight(node, edit)
    return found if found is None or isinstance(found, Miss) else with_weight(*found, edit)


@rule("Add")
def norm_bias(node: ir.Node, edit: Editor) -> Outcome:
    """norm(x) + bias becomes its bias."""
    found = absorb_bias(node, edit)
    return None if found is None else with_bias(*found, edit)


@rule("Cast")
def norm_casts(node: ir.Node, edit: Editor) -> Outcome:
    """float16(norm(float32(x))) becomes a norm of half precision."""
    found = absorb_cast(node, edit)
    return found if found is None or isinstance(found, Miss) else without_casts(found, edit)
