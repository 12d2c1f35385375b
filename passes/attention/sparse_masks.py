"""Which keys a query sees under sparse attention, as nodes of the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lwc.passes.attention.masks import lowest
from lwc.rewrite import Editor

__all__ = ["Places", "Sparsity", "hide"]

_HIDDEN = {ir.DataType.FLOAT16: -3e4}
"""Sums of the lowest number of float16 with scores would be infinite."""


@dataclass(frozen=True)
class Places:
    """Where queries and keys stand in the sequence.

    Attributes:
        longest: How many keys there are, or None where that depends on the run.
        key: Equal for operators whose queries and keys stand alike.
        make: Makes their places: of queries int64 `[queries, 1]` or `[batch, 1, queries, 1]`, of
            keys int64 `[keys]`.
    """

    longest: int | None
    key: object
    make: Callable[[], tuple[ir.Value, ir.Value]]


@dataclass(frozen=True)
class Sparsity:
    """What is asked for; see `lwc.passes.attention.sparse_attention.SparseAttention`.

    Attributes:
        pattern: `window`, `strided` or `fixed`.
        reach: The window or the stride: up to so many keys, all are seen.
        summary: Keys at the end of each block that all later ones see.
        tokens: Global tokens.
    """

    pattern: str
    reach: int
    summary: int
    tokens: int

    @property
    def is_plain_window(self) -> bool:
        """Tell whether a window is all there is."""
        return self.pattern == "window" and not self.tokens

    def condition(self, places: Places, edit: Editor, *, causal: bool) -> ir.Value:
        """Return where a key is seen, `[1 or batch, 1, queries, keys]` of booleans.

        Everything but comparisons is done on vectors: only booleans are as large as the scores.

        Args:
            places: Where queries and keys stand.
            edit: Makes nodes before its root.
            causal: Whether later keys are hidden anyway.
        """
        (i, j), reach = places.make(), self.reach
        if self.pattern == "fixed":
            block = _number(reach, edit)
            own = edit.op("Equal", [edit.op("Div", [i, block]), edit.op("Div", [j, block])])
            end = _number(reach - self.summary, edit)
            others = edit.op("GreaterOrEqual", [edit.op("Mod", [j, block]), end])
            seen = edit.op("Or", [own, others])
        else:
            near = reach if self.pattern == "window" else reach + 1
            seen = self._near(i, j, near, edit, causal=causal)
            if self.pattern == "strided":
                step = _number(reach, edit)
                rest = edit.op("Equal", [edit.op("Mod", [i, step]), edit.op("Mod", [j, step])])
                seen = edit.op("Or", [seen, rest])
        if self.tokens:
            first = _number(self.tokens, edit)
            either = edit.op("Or", [edit.op("Less", [i, first]), edit.op("Less", [j, first])])
            seen = edit.op("Or", [seen, either])
        if edit.rank(seen) == 2:
            seen = edit.op("Unsqueeze", [seen, edit.constant([0, 1], "axes")])
        return seen

    def _near(self, i: ir.Value, j: ir.Value, near: int, edit: Editor, *, causal: bool) -> ir.Value:
        """Return where |i - j| < near."""
        distance = _number(near, edit)
        seen = edit.op("Less", [edit.op("Sub", [i, distance]), j])
        if causal:
            return seen
        later = edit.op("Less", [j, edit.op("Add", [i, distance])])
        return edit.op("And", [seen, later])


def hide(seen: ir.Value, bias: ir.Value | None, dtype: ir.DataType, edit: Editor) -> ir.Value:
    """Return what to add to the scores: `bias`, or nothing, where a key is seen."""
    low = np.array(_HIDDEN.get(dtype, lowest(dtype)), dtype.numpy())
    if bias is None:
        bias = edit.constant(np.zeros((), dtype.numpy()), "zero")
    return edit.op("Where", [seen, bias, edit.constant(low, "hidden")])


def _number(number: int, edit: Editor) -> ir.Value:
    return edit.constant(np.array(number, np.int64), "number")
