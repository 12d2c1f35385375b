"""Attention as one operator: which forms can express it, and how each is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim
from lwc.passes.attention.heads import Heads, Layout
from lwc.passes.attention.recognise import Added, Attention, extents_of
from lwc.rewrite import Editor, Miss

__all__ = ["MASKS_PAD_RIGHT", "Form", "choose_form", "write"]

Form: TypeAlias = Literal["auto", "standard", "mha", "gqa"]

MASKS_PAD_RIGHT = (
    "Attention masks are 0 or 1 and pad on the right, and what is computed for padding is not read."
)

_MS = "com.microsoft"
_STANDARD_OPSET = 23


@dataclass(frozen=True)
class _Problem:
    """Attention, and what is asked of it.

    Attributes:
        attention: What was recognised.
        edit: Knows shapes and types, and makes nodes.
        granted: Whether masks may be taken to pad on the right.
    """

    attention: Attention
    edit: Editor
    granted: bool

    @property
    def dtype(self) -> ir.DataType | None:
        """The type that attention is computed in."""
        return self.edit.dtype(self.attention.query.whole)

    @property
    def extents(self) -> tuple[Dim, Dim, Dim]:
        """Batch, queries and keys."""
        batch, queries = extents_of(self.attention.query, self.edit)
        return batch, queries, extents_of(self.attention.key, self.edit)[1]

    @property
    def by_flags(self) -> bool:
        """Tell whether causality and a window say all of the mask."""
        mask = self.attention.mask
        causal = mask.known and mask.causal and (not mask.padding or self.granted)
        return causal or self.unmasked

    @property
    def unmasked(self) -> bool:
        """Tell whether every query sees every key."""
        mask = self.attention.mask
        return mask.known and not mask.causal and mask.window is None and not mask.padding

    @property
    def by_padding(self) -> bool:
        """Tell whether one padding mask says all, and hidden numbers absorb every score."""
        mask = self.attention.mask
        if not mask.known or mask.causal or mask.window is not None or len(mask.padding) != 1:
            return False
        batch, _, keys = self.extents
        shape = self.edit.shape(mask.padding[0])
        if shape is None or not all(map(self.edit.same_dim, shape, (batch, keys))):
            return False
        return len(mask.numbers) == 1 and np.isfinite(mask.numbers[0]) and mask.numbers[0] <= -1e30

    @property
    def may_be_nan(self) -> bool:
        """Tell whether a query may see no key by a bias of minus infinity."""
        mask = self.attention.mask
        return not mask.shows_itself and not mask.finite(self.dtype)

    @property
    def guarded(self) -> bool:
        """Tell whether what is no number must become 0."""
        return self.attention.guarded and self.may_be_nan

    def needs_bias(self, form: Form) -> bool:
        """Tell whether a form needs the mask as numbers to add."""
        if self.unmasked:
            return False
        if form == "gqa":
            return not self.by_flags
        if form == "standard":
            return not (self.by_flags and self.attention.mask.window is None)
        return not self.by_padding


def choose_form(
    attention: Attention, form: Form, edit: Editor, *, granted: bool = False
) -> Form | Miss:
    """Return the form to write, or why none fits.

    Args:
        attention: What was recognised.
        form: The form wished for; `auto` takes the one ONNX Runtime runs best.
        edit: Knows shapes and the opset.
        granted: Whether `MASKS_PAD_RIGHT` holds.
    """
    problem = _Problem(attention, edit, granted)
    if form != "auto":
        objection = _OBJECTIONS[form](problem)
        return form if objection is None else Miss(f"{form} cannot express it: {objection}")
    order: tuple[Form, ...] = ("mha", "gqa", "standard")
    if (attention.mask.causal and problem.by_flags) or attention.key.repeats > 1:
        order = ("gqa", "mha", "standard")
    reasons = []
    for each in order:
        objection = _OBJECTIONS[each](problem)
        if objection is None:
            return each
        reasons.append(f"{each}: {objection}")
    return Miss("; ".join(reasons))


# What a form cannot express


def _against_mha(problem: _Problem) -> str | None:
    if problem.attention.softcap:
        return "it has no soft cap"
    return _against_type(problem) or _against_mask(problem, "mha")


def _against_gqa(problem: _Problem) -> str | None:
    attention = problem.attention
    if attention.query.size % 8:
        return f"a head size of {attention.query.size} is no multiple of 8"
    if attention.value.size != attention.query.size:
        return "values differ from keys in size"
    _, queries, keys = problem.extents
    if not problem.edit.same_dim(queries, keys):
        return "queries and keys may differ in length"
    return _against_type(problem) or _against_mask(problem, "gqa")


def _against_standard(problem: _Problem) -> str | None:
    root = problem.edit.root
    if root is None or problem.edit.opset(root) < _STANDARD_OPSET:
        return f"it needs opset {_STANDARD_OPSET}"
    if problem.dtype == ir.DataType.FLOAT16:
        return "ONNX Runtime rounds its scores more often in float16"
    mask = problem.attention.mask
    if problem.needs_bias("standard") and not mask.shows_itself:
        zero = problem.guarded and mask.infinite
        if not zero and not mask.finite(problem.dtype):
            return "it gives 0 for rows that are hidden as a whole"
    return _against_type(problem) or _against_mask(problem, "standard")


def _against_type(problem: _Problem) -> str | None:
    if problem.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "ONNX Runtime computes it in float32 and float16"
    return None


def _against_mask(problem: _Problem, form: Form) -> str | None:
    if problem.unmasked or (problem.by_flags and not problem.needs_bias(form)):
        return None
    mask = problem.attention.mask
    if problem.dtype == ir.DataType.FLOAT16 and not mask.shows_itself and not mask.infinite:
        return "rows that are hidden as a whole may be rounded otherwise in float16"
    if not problem.needs_bias(form):
        return None
    if not problem.attention.steps:
        return "it has no flag for causality"
    for step in problem.attention.steps:
        value = step.value if isinstance(step, Added) else step.condition
        rank = problem.edit.rank(value)
        if rank is None or rank > 4:
            return "the rank of what is added to the scores is not known"
        if isinstance(step, Added) and problem.edit.dtype(value) != problem.dtype:
            return "what is added to the scores has another type"
    return None


_OBJECTIONS: dict[Form, Callable[[_Problem], str | None]] = {
    "mha": _against_mha,
    "gqa": _against_gqa,
    "standard": _against_standard,
}


# Writing


def write(
    attention: Attention,
    form: Form,
    edit: Editor,
    *,
    granted: bool = False,
    flat: bool = False,
) -> ir.Value:
    """Write attention in a form that `choose_form` gave.

    Args:
        attention: What was recognised.
        form: The form.
        edit: Makes the nodes.
        granted: Whether `MASKS_PAD_RIGHT` holds.
        flat: Which shape the result gets.

    Returns:
        `[batch, heads, queries, size]`; `flat`: `[batch, queries, heads · size]`.
    """
    problem = _Problem(attention, edit, granted)
    result = _WRITERS[form](problem)
    if not flat:
        apart = edit.constant([0, 0, attention.heads, attention.value.size], "heads_shape")
        result = edit.op("Transpose", [edit.op("Reshape", [result, apart])], {"perm": [0, 2, 1, 3]})
    if problem.guarded and problem.needs_bias(form) and form != "standard":
        result = edit.op("Where", [edit.op("IsNaN", [result]), _number(problem, 0), result])
    return result


def _number(problem: _Problem, number: float) -> ir.Value:
    """Return a constant of the type that attention is computed in."""
    assert problem.dtype is not None
    return problem.edit.constant(np.array(number, problem.dtype.numpy()), "number")


def _flat(heads: Heads, edit: Editor) -> ir.Value:
    """Return heads, before they are repeated, as `[batch, length, heads · size]`."""
    return _joined(heads.value, heads.layout, heads.heads * heads.size, edit)


def _flat_repeated(heads: Heads, edit: Editor) -> ir.Value:
    """Return heads, repeated, as `[batch, length, heads · repeats · size]`."""
    if heads.repeats == 1:
        return _flat(heads, edit)
    count, shape = heads.heads * heads.repeats, edit.shape(heads.whole) or ()
    if len(shape) == 4 and shape[1] == count:
        layout: Layout = "turned" if heads.turned else "apart"
        return _joined(heads.whole, layout, count * heads.size, edit)
    apart = edit.constant([0, 0, heads.heads, 1, heads.size], "heads_shape")
    times = edit.constant([1, 1, 1, heads.repeats, 1], "repeats")
    wide = edit.op("Expand", [edit.op("Reshape", [_flat(heads, edit), apart]), times])
    return edit.op("Reshape", [wide, edit.constant([0, 0, count * heads.size], "width")])


def _joined(value: ir.Value, layout: Layout, width: int, edit: Editor) -> ir.Value:
    if layout == "flat":
        return value
    perm = [0, 2, 1, 3] if layout == "apart" else [0, 3, 1, 2]
    turned = edit.op("Transpose", [value], {"perm": perm})
    return edit.op("Reshape", [turned, edit.constant([0, 0, width], "width")])


def _extents(value: ir.Value, edit: Editor) -> tuple[ir.Value, ir.Value]:
    """Return batch and length of `[batch, length, …]`, each `[1]`."""
    shape = edit.op("Shape", [value])
    places = (edit.constant([axis], "axis") for axis in (0, 1))
    batch, length = (edit.op("Gather", [shape, place], {"axis": 0}) for place in places)
    return batch, length


def _bias(problem: _Problem, query: ir.Value, key: ir.Value) -> ir.Value:
    """Return what is added to the scores, `[1 or batch, 1 or heads, queries, keys]`."""
    edit = problem.edit
    total: ir.Value | None = None
    for step in problem.attention.steps:
        if isinstance(step, Added):
            total = step.value if total is None else edit.op("Add", [total, step.value])
            continue
        kept, low = _number(problem, 0) if total is None else total, _number(problem, step.number)
        total = edit.op("Where", [step.condition, *((kept, low) if step.shown else (low, kept))])
    assert total is not None
    rank = edit.rank(total) or 0
    if rank < 4:
        axes = edit.constant(list(range(4 - rank)), "axes")
        total = edit.op("Unsqueeze", [total, axes])
    shape = edit.shape(total)
    _, *wanted = problem.extents
    if shape is None or not all(map(edit.same_dim, shape[2:], wanted)):
        whole = _extents(query, edit)[1], _extents(key, edit)[1]
        target = edit.op("Concat", [edit.constant([1, 1], "ones"), *whole], {"axis": 0})
        total = edit.op("Expand", [total, target])
    return total


def _mha(problem: _Problem) -> ir.Value:
    attention, edit = problem.attention, problem.edit
    query = _flat(attention.query, edit)
    key, value = (_flat_repeated(each, edit) for each in (attention.key, attention.value))
    inputs: list[ir.Value | None] = [query, key, value]
    attributes: dict[str, Any] = {"num_heads": attention.heads, "scale": attention.scale}
    if problem.by_padding:
        (padding,) = attention.mask.padding
        seen = edit.op("Cast", [padding], {"to": int(ir.DataType.BOOL)})
        inputs += [None, edit.op("Cast", [seen], {"to": int(ir.DataType.INT32)})]
        attributes["mask_filter_value"] = attention.mask.numbers[0]
    elif problem.needs_bias("mha"):
        inputs += [None, None, _bias(problem, query, key)]
    return edit.op("MultiHeadAttention", inputs, attributes, domain=_MS)


def _gqa(problem: _Problem) -> ir.Value:
    attention, edit = problem.attention, problem.edit
    query, key, value = (
        _flat(each, edit) for each in (attention.query, attention.key, attention.value)
    )
    batch, length = _extents(query, edit)
    total = edit.op("Cast", [length], {"to": int(ir.DataType.INT32)})
    one = edit.constant(np.array([1], np.int32), "one")
    lengths = edit.op("Expand", [edit.op("Sub", [total, one]), batch])
    inputs: list[ir.Value | None] = [query, key, value, None, None, lengths, total]
    attributes: dict[str, Any] = {
        "num_heads": attention.heads,
        "kv_num_heads": attention.key.heads,
        "scale": attention.scale,
    }
    if attention.softcap:
        attributes["softcap"] = attention.softcap
    causal = problem.by_flags and attention.mask.causal
    if not causal:
        attributes["causal"] = 0
    elif attention.mask.window is not None:
        attributes["local_window_size"] = attention.mask.window
    if problem.needs_bias("gqa"):
        inputs += [None, None, None, _bias(problem, query, key)]
    # ONNX Runtime holds no matrix of scores where it makes the present keys and values.
    made = edit.node("GroupQueryAttention", inputs, attributes, domain=_MS, outputs=3)
    return made.outputs[0]


def _standard(problem: _Problem) -> ir.Value:
    attention, edit = problem.attention, problem.edit
    query, key, value = (
        _flat(each, edit) for each in (attention.query, attention.key, attention.value)
    )
    inputs: list[ir.Value | None] = [query, key, value]
    attributes: dict[str, Any] = {
        "q_num_heads": attention.heads,
        "kv_num_heads": attention.key.heads,
        "scale": attention.scale,
    }
    if attention.softcap:
        attributes["softcap"] = attention.softcap
    if problem.needs_bias("standard"):
        inputs.append(_bias(problem, query, key))
    elif attention.mask.causal:
        attributes["is_causal"] = 1
    return edit.op("Attention", inputs, attributes)


_WRITERS: dict[Form, Callable[[_Problem], ir.Value]] = {
    "mha": _mha,
    "gqa": _gqa,
    "standard": _standard,
}
