"""fuse-attention: attention in any exporter's spelling becomes one operator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lwc.passes.attention.joined import joined_rules
from lwc.passes.attention.lowering import MASKS_PAD_RIGHT, Form, choose_form, write
from lwc.passes.attention.recognise import Attention, recognise
from lwc.passes.attention.recognise_standard import recognise_standard
from lwc.passes.attention.rotary_in_attention import GQA, POSITIONS_COUNT, absorb_rotary
from lwc.pipeline.passes import Exact, PassContext
from lwc.pipeline.rule_pass import AnyRule, RulePass
from lwc.rewrite import EDITED, Editor, Miss, Rule
from lwc.rewrite.rules import Outcome

__all__ = ["FuseAttention"]


@dataclass(frozen=True)
class FuseAttention(RulePass):
    """Compute attention as one operator: MultiHeadAttention, GroupQueryAttention or Attention.

    Attributes:
        form: `gqa` and `mha` are ONNX Runtime's GroupQueryAttention and MultiHeadAttention,
            `standard` is the Attention of opset 23; `auto` takes the first that can express it.
    """

    form: Form = "auto"

    name: ClassVar[str] = "fuse-attention"
    contract: ClassVar[Exact] = Exact(assumptions=(MASKS_PAD_RIGHT, POSITIONS_COUNT))

    def find_rules(self) -> Iterable[AnyRule]:
        """Return the rules as they are where nothing is granted."""
        return (self._rule(None), _rotary_rule(None), *joined_rules())

    def rules_under(self, ctx: PassContext) -> Iterable[AnyRule]:
        """Return the rules; masks of causal decoders go where the user vouches for them."""
        return (
            self._rule(ctx if ctx.is_granted(MASKS_PAD_RIGHT) else None),
            _rotary_rule(ctx if ctx.is_granted(POSITIONS_COUNT) else None),
            *joined_rules(),
        )

    def _rule(self, granting: PassContext | None) -> Rule:
        told = False

        def attention(node: ir.Node, edit: Editor) -> Outcome:
            """softmax(q kᵀ · scale + mask) v becomes one operator."""
            nonlocal told
            is_operator = node.op_type == "Attention"
            found = recognise_standard(node, edit) if is_operator else recognise(node, edit)
            if found is None or isinstance(found, Miss):
                return found
            granted = granting is not None
            form = choose_form(found, self.form, edit, granted=granted)
            if is_operator and "standard" in (form, self.form) and not _repeats_in_graph(found):
                return None
            if isinstance(form, Miss):
                return form
            if granting is not None and found.mask.padding and found.mask.causal and not told:
                granting.assume(MASKS_PAD_RIGHT)
                told = True
            flat = is_operator and edit.rank(node.inputs[0]) == 3
            return write(found, form, edit, granted=granted, flat=flat)

        return Rule("attention", ("MatMul", "Attention"), attention)


def _repeats_in_graph(found: Attention) -> bool:
    """Tell whether keys are repeated by what stands before the operator."""
    return found.key.repeats > 1 and found.key.whole is not found.key.value


def _rotary_rule(granting: PassContext | None) -> Rule:
    told = False

    def rotary_in_attention(node: ir.Node, edit: Editor) -> Outcome:
        """Rotary embeddings of queries and keys go into their GroupQueryAttention."""
        nonlocal told
        done = absorb_rotary(node, edit, granted=False)
        if granting is None or not isinstance(done, Miss):
            return done
        done = absorb_rotary(node, edit, granted=True)
        if done is EDITED and not told:
            granting.assume(POSITIONS_COUNT)
            told = True
        return done

    return Rule("rotary-in-attention", (GQA,), rotary_in_attention)
