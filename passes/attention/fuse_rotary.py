"""fuse-rotary: rotary position embedding in any exporter's spelling becomes one operator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lwc.core.errors import UsageError
from lwc.passes.attention.rotary_bounds import bound_of, stated_positions
from lwc.passes.attention.rotary_lowering import Form, Tables, against, write_rotation
from lwc.passes.attention.rotary_turns import read_rotation
from lwc.passes.attention.rotary_waves import Known
from lwc.pipeline.passes import Exact, PassContext
from lwc.pipeline.rule_pass import AnyRule, RulePass
from lwc.rewrite import Editor, Miss, Rule, attribute
from lwc.rewrite.rules import Outcome

__all__ = ["POSITIONS_FIT", "FuseRotary"]

POSITIONS_FIT = "Positions lie in the tables: from 0 on and below max-positions."

_POSITIONS = 4096
_MOST = 1 << 17
"""Positions beyond which tables are made only where `max_positions` asks: 67 MB of 128 columns."""


@dataclass(frozen=True)
class FuseRotary(RulePass):
    """Compute rotary position embedding as one operator that looks cosines and sines up.

    Tables are as long as the graph shows that they must be, else as `max_positions` or the
    `config.json` beside the model says. ONNX Runtime stops with an error at a position behind the
    end of a table or below 0: no output is ever wrong. So tables need no grant; a note says how far
    they reach, a warning where nothing says that this is far enough.

    Attributes:
        max_positions: Positions in tables where the graph does not bound them; 0 for what
            `config.json` says, up to 131072, or 4096.
        form: `contrib` is ONNX Runtime's RotaryEmbedding, `standard` that of opset 23; `auto`
            takes the standard one where the model has that opset.
    """

    max_positions: int = 0
    form: Form = "auto"

    name: ClassVar[str] = "fuse-rotary"
    contract: ClassVar[Exact] = Exact(assumptions=(POSITIONS_FIT,))
    positional: ClassVar[str] = "max_positions"

    def __post_init__(self) -> None:
        if self.max_positions < 0:
            raise UsageError(
                f"max-positions cannot be {self.max_positions}", remedy="give a number above 0"
            )

    def find_rules(self) -> Iterable[AnyRule]:
        """Return the rule as it is where nobody reads notes."""
        return (self._rule(None),)

    def rules_under(self, ctx: PassContext) -> Iterable[AnyRule]:
        """Return the rule that notes how far tables reach."""
        return (self._rule(ctx),)

    def _rule(self, ctx: PassContext | None) -> Rule:
        state: list[Tables] = []
        told, stated = False, 0

        def rotary(node: ir.Node, edit: Editor) -> Outcome:
            """x · cos + rotate(x) · sin becomes one operator."""
            nonlocal told, stated
            if not state or state[0].edit is not edit:
                state[:] = [Tables(edit)]
                stated = self.max_positions or stated_positions(edit.module) or 0
            known = state[0].waves
            if edit.in_function(node) or _is_part(node, edit, known):
                return None
            found = read_rotation(node, edit, known)
            if found is None or isinstance(found, Miss):
                return found
            bound = bound_of(found, self.max_positions or min(stated or _POSITIONS, _MOST), edit)
            if isinstance(bound, Miss):
                return bound
            objection = against(found, self.form, edit)
            if objection is not None:
                return Miss(objection)
            tables = state[0].compute(found, bound.positions)
            if isinstance(tables, Miss):
                return tables
            dtype = edit.dtype(found.source)
            assert dtype is not None
            values = [
                state[0].value(table, dtype, name)
                for table, name in zip(tables, ("cos_table", "sin_table"), strict=True)
            ]
            made = write_rotation(found, (values[0], values[1]), self.form, edit)
            if not bound.proved and ctx is not None and not told:
                told = True
                self._tell(ctx, bound.positions, enough=0 < stated <= bound.positions)
            return made

        return Rule("rotary", ("Add", "Sub", "Concat", "Reshape"), rotary)

    def _tell(self, ctx: PassContext, positions: int, *, enough: bool) -> None:
        if ctx.is_granted(POSITIONS_FIT):
            ctx.assume(POSITIONS_FIT)
        told = f"tables hold {positions} positions; ONNX Runtime stops with an error at others"
        if enough:
            ctx.note(told)
        else:
            ctx.warn(f"{told}: max-positions sets another number")


def _is_part(node: ir.Node, edit: Editor, known: Known) -> bool:
    """Tell whether what a node makes only goes into a rotation that is wider."""
    value = node.outputs[0]
    if node.op_type not in ("Add", "Sub", "Concat", "Reshape") or not edit.single_use(value):
        return False
    (use,) = value.uses()
    user, rank = use.node, edit.rank(value)
    if user.op_type != "Concat" or user.domain or user.graph is not node.graph or rank is None:
        return False
    if attribute(user, "axis") % rank != rank - 1:
        return False
    return not isinstance(read_rotation(user, edit, known), Miss | type(None))
