"""Attention as one operator: which forms can express it, and how each is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.passes.attention.heads import Heads
from lwc.passes.attention.recognise import Attention
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
        granted: Whether masks may be taken to pad on the right.
    """

    attention: Attention
    granted: bool

    @property
    def by_flags(self) -> bool:
        """Tell whether causality and a window say all of the mask."""
        mask = self.attention.mask
        if not mask.known or mask.shift != 0:
            return False
        return (mask.causal and (not mask.padding or self.granted)) or self.unmasked

    @property
    def unmasked(self) -> bool:
        """Tell whether every query sees every key."""
        mask = self.attention.mask
        return mask.known and not mask.causal and mask.window is None and not mask.padding

    @property
    def by_padding(self) -> bool:
        """Tell whether one padding mask says all, and hidden numbers absorb every score."""
        mask = self.attention.mask
        plain = mask.known and not mask.causal and mask.window is None and len(mask.padding) == 1
        return plain and np.isfinite(mask.hidden) and mask.hidden <= -1e30

    @property
    def may_hide_rows(self) -> bool:
        """Tell whether a query may see no key by a bias of minus infinity."""
        mask = self.attention.mask
        return not mask.shows_itself and not (mask.known and np.isfinite(mask.hidden))


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
    problem = _Problem(attention, granted)
    if form != "auto":
        objection = _OBJECTIONS[form](problem, edit)
        return form if objection is None else Miss(f"{form} cannot express it: {objection}")
    order: tuple[Form, ...] = ("mha", "gqa", "standard")
    if (attention.mask.causal and problem.by_flags) or attention.key.repeats > 1:
        order = ("gqa", "mha", "standard")
    reasons = []
    for each in order:
        objection = _OBJECTIONS[each](problem, edit)
        if objection is None:
            return each
        reasons.append(f"{each}: {objection}")
    return Miss("; ".join(reasons))


# What a form cannot express


def _against_contrib(problem: _Problem, edit: Editor) -> str | None:
    attention = problem.attention
    if edit.dtype(attention.query.whole) not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "it takes float32 and float16"
    if attention.scale == 0:
        return "a scale of 0 means its default"
    return None


def _against_mha(problem: _Problem, edit: Editor) -> str | None:
    attention = problem.attention
    if attention.softcap:
        return "it has no soft cap"
    return _against_contrib(problem, edit) or _against_bias(problem, edit, "mha")


def _against_gqa(problem: _Problem, edit: Editor) -> str | None:
    attention = problem.attention
    if attention.query.size % 8:
        return f"a head size of {attention.query.size} is no multiple of 8"
    if attention.value.size != attention.query.size:
        return "values differ from keys in size"
    queries, keys = edit.shape(attention.query.whole), edit.shape(attention.value.whole)
    if queries is None or keys is None or not edit.same_dim(queries[2], keys[2]):
        return "queries and keys may differ in length"
    return _against_contrib(problem, edit) or _against_bias(problem, edit, "gqa")


def _against_standard(problem: _Problem, edit: Editor) -> str | None:
    root = edit.root
    if root is None or edit.opset(root) < _STANDARD_OPSET:
        return f"it needs opset {_STANDARD_OPSET}"
    if edit.dtype(problem.attention.query.whole) not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "ONNX Runtime computes it in float32 and float16"
    if not _needs_bias(problem, "standard"):
        return None
    zero = problem.attention.guarded and problem.may_hide_rows
    if not problem.attention.mask.shows_itself and not zero:
        return "it gives 0 for rows that are hidden as a whole"
    return _against_bias(problem, edit, "standard")


def _needs_bias(problem: _Problem, form: Form) -> bool:
    """Tell whether a form needs the mask as numbers to add."""
    if problem.unmasked:
        return False
    mask = problem.attention.mask
    if form == "gqa":
        return not problem.by_flags
    if form == "standard":
        return not (problem.by_flags and mask.window is None)
    return not problem.by_padding


def _against_bias(problem: _Problem, edit: Editor, form: Form) -> str | None:
    if not _needs_bias(problem, form):
        return None
    for bias in problem.attention.biases:
        rank = edit.rank(bias)
        if rank is None or rank > 4:
            return "the rank of what is added to the scores is not known"
        if edit.dtype(bias) != edit.dtype(problem.attention.query.whole):
            return "what is added to the scores has another type"
    return None


_OBJECTIONS: dict[Form, Callable[[_Problem, Editor], str | None]] = {
    "mha": _against_mha,
    "gqa": _against_gqa,
    "standard": _against_standard,
}


# Writing


def write(attention: Attention, form: Form, edit: Editor, *, granted: bool = False) -> ir.Value:
    """Write attention in a form that `choose_form` gave; return `[batch, heads, queries, size]`."""
    problem = _Problem(attention, granted)
    result = _WRITERS[form](problem, edit)
    apart = edit.constant(
        np.array([0, 0, attention.heads, attention.value.size], np.int64), "heads_shape"
    )
    result = edit.op("Transpose", [edit.op("Reshape", [result, apart])], {"perm": [0, 2, 1, 3]})
    if attention.guarded and problem.may_hide_rows and _needs_bias(problem, form):
        if form == "standard":
            return result
        zero = edit.constant(np.zeros((), attention_dtype(attention, edit)), "zero")
        result = edit.op("Where", [edit.op("IsNaN", [result]), zero, result])
    return result


def attention_dtype(attention: Attention, edit: Editor) -> Any:
    """Return the numpy type attention is computed in."""
    dtype = edit.dtype(attention.query.whole)
    assert dtype is not None
    return dtype.numpy()


def _flat(heads: Heads, edit: Editor, *, repeated: bool = False) -> ir.Value:
    """Return heads as `[batch, length, heads · size]`."""
    value, layout, count = heads.value, heads.layout, heads.heads
    if repeated and heads.repeats > 1:
        shape = edit.shape(heads.whole)
        assert shape is not None
        turned = shape[2] == heads.size and heads.layout == "turned"
        value, layout, count = heads.whole, "turned" if turned else "apart", count * heads.repeats
    if layout == "flat":
        return value
    perm = [0, 2, 1, 3] if layout == "apart" else [0, 3, 1, 2]
    width = edit.constant(np.array([0, 0, count * heads.size], np.int64), "width")
    return edit.op("Reshape", [edit.op("Transpose", [value], {"perm": perm}), width])


def _extents(value: ir.Value, edit: Editor) -> tuple[ir.Value, ir.Value]:
    """Return batch and length of `[batch, length, …]`, each `[1]`."""
    shape = edit.op("Shape", [value])
    places = (edit.constant(np.array([axis], np.int64), "axis") for axis in (0, 1))
    batch, length = (edit.op("Gather", [shape, place], {"axis": 0}) for place in places)
    return batch, length


def _bias(problem: _Problem, query: ir.Value, key: ir.Value, edit: Editor) -> ir.Value:
    """Return what is added to the scores, `[1 or batch, 1 or heads, queries, keys]`."""
    attention = problem.attention
    dtype = attention_dtype(attention, edit)
    terms = list(attention.biases)
    for condition, number, shown in attention.hidings:
        zero = edit.constant(np.zeros((), dtype), "zero")
        low = edit.constant(np.array(number, dtype), "hidden")
        terms.append(edit.op("Where", [condition, *((zero, low) if shown else (low, zero))]))
    total = terms[0]
    for term in terms[1:]:
        total = edit.op("Add", [total, term])
    rank = edit.rank(total) or 0
    if rank < 4:
        axes = edit.constant(np.arange(4 - rank, dtype=np.int64), "axes")
        total = edit.op("Unsqueeze", [total, axes])
    shape = edit.shape(total)
    whole = _extents(query, edit)[1], _extents(key, edit)[1]
    wanted = edit.shape(query), edit.shape(key)
    if shape is None or any(
        of is None or not edit.same_dim(dim, of[1]) or (dim == 1 and of[1] != 1)
        for dim, of in zip(shape[2:], wanted, strict=True)
    ):
        one = edit.constant(np.array([1, 1], np.int64), "ones")
        target = edit.op("Concat", [one, *whole], {"axis": 0})
        total = edit.op("Expand", [total, target])
    return total


def _mha(problem: _Problem, edit: Editor) -> ir.Value:
    attention = problem.attention
    query = _flat(attention.query, edit)
    key, value = (_flat(each, edit, repeated=True) for each in (attention.key, attention.value))
    inputs: list[ir.Value | None] = [query, key, value]
    attributes: dict[str, Any] = {"num_heads": attention.heads, "scale": attention.scale}
    if problem.by_padding:
        (padding,) = attention.mask.padding
        seen = edit.op("Cast", [padding], {"to": int(ir.DataType.BOOL)})
        inputs += [None, edit.op("Cast", [seen], {"to": int(ir.DataType.INT32)})]
        attributes["mask_filter_value"] = attention.mask.hidden
    elif _needs_bias(problem, "mha"):
        inputs += [None, None, _bias(problem, query, key, edit)]
    return edit.op("MultiHeadAttention", inputs, attributes, domain=_MS)


def _gqa(problem: _Problem, edit: Editor) -> ir.Value:
    attention = problem.attention
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
    if _needs_bias(problem, "gqa"):
        inputs += [None, None, None, _bias(problem, query, key, edit)]
    # ONNX Runtime holds no matrix of scores where it makes the present keys and values.
    made = edit.node("GroupQueryAttention", inputs, attributes, domain=_MS, outputs=3)
    return made.outputs[0]


def _standard(problem: _Problem, edit: Editor) -> ir.Value:
    attention = problem.attention
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
    if _needs_bias(problem, "standard"):
        inputs.append(_bias(problem, query, key, edit))
    elif attention.mask.causal:
        attributes["is_causal"] = 1
    return edit.op("Attention", inputs, attributes)


_WRITERS: dict[Form, Callable[[_Problem, Editor], ir.Value]] = {
    "mha": _mha,
    "gqa": _gqa,
    "standard": _standard,
}
