"""Masks of attention, read as conditions on batch, query and key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from lwc.core.dims import integer, subtract
from lwc.passes.attention.element_kinds import hides, opposite, truth
from lwc.passes.attention.elements import AtMost, Both, Element, Elements, Number, Read, Select
from lwc.rewrite import Editor

__all__ = ["Mask", "hides", "lowest", "read_bias", "read_condition"]

_LOWEST = {
    ir.DataType.FLOAT16: -65504.0,
    ir.DataType.DOUBLE: -1.7976931348623157e308,
}

_BATCH, _HEAD, _QUERY, _KEY = (integer(f"{name} of a score") for name in ("b", "h", "i", "j"))


def lowest(dtype: ir.DataType | None) -> float:
    """Return the lowest finite number of an element type; -inf is below it."""
    return -3.4028234663852886e38 if dtype is None else _LOWEST.get(dtype, -3.4028234663852886e38)


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as far as it is known.

    Attributes:
        causal: No key behind the query's own place.
        window: Most keys up to the query's own; None for all.
        padding: Values `[batch, keys]`, or `[1, keys]`; a key is seen where it is not 0.
        known: Whether that is all there is to the mask.
        numbers: What is put in place of hidden scores, or added to them, by every step.
    """

    causal: bool = False
    window: int | None = None
    padding: tuple[ir.Value, ...] = ()
    known: bool = True
    numbers: tuple[float, ...] = ()

    def __and__(self, other: Mask) -> Mask:
        """Return the mask that hides what either hides."""
        windows = [each for each in (self.window, other.window) if each is not None]
        return Mask(
            self.causal or other.causal,
            min(windows, default=None),
            tuple(dict.fromkeys((*self.padding, *other.padding))),
            self.known and other.known,
            (*self.numbers, *other.numbers),
        )

    @property
    def shows_itself(self) -> bool:
        """Tell whether every query sees a key, where no query is behind the last key."""
        return self.known and not self.padding

    @property
    def infinite(self) -> bool:
        """Tell whether everything hidden is hidden by minus infinity."""
        return self.known and all(number == -math.inf for number in self.numbers)

    def finite(self, dtype: ir.DataType | None) -> bool:
        """Tell whether what is hidden, however often, is hidden by numbers above the lowest."""
        return self.known and sum(self.numbers) > lowest(dtype)


@dataclass
class _Terms:
    edit: Editor
    causal: bool = False
    window: int | None = None
    padding: list[ir.Value] = field(default_factory=list)
    known: bool = True

    def take(self, term: Element) -> None:
        if isinstance(term, Both):
            for each in term.terms:
                self.take(each)
        elif isinstance(term, AtMost):
            self._take_distance(term)
        elif isinstance(term, Read) and _is_padding(term, self.edit):
            self.padding.append(term.value)
        elif not (isinstance(term, Number) and term.value):
            self.known = False

    def _take_distance(self, term: AtMost) -> None:
        """Causal is `j - i <= 0`; a window of w keys is `i - j - (w - 1) <= 0`."""
        behind = subtract(subtract(_QUERY, _KEY), term.value)
        if subtract(term.value, subtract(_KEY, _QUERY)) == 0:
            self.causal = True
        elif isinstance(behind, int) and behind >= 0:
            self.window = behind + 1 if self.window is None else min(self.window, behind + 1)
        else:
            self.known = False


def _is_padding(term: Read, edit: Editor) -> bool:
    """Tell whether each sequence is masked by its own row, or all by the only one."""
    if not term.nonzero or len(term.index) != 2 or term.index[1] != _KEY:
        return False
    row, shape = term.index[0], edit.shape(term.value)
    return row == _BATCH or (row == 0 and shape is not None and shape[0] == 1)


def read_bias(value: ir.Value, edit: Editor) -> Mask:
    """Read what is added to scores `[batch, heads, queries, keys]`."""
    element = _score(value, edit)
    if isinstance(element, Number) and element.value == 0:
        return Mask()
    if isinstance(element, Select) and element.no == 0:
        other = opposite(element.condition)
        element = None if other is None else Select(other, element.no, element.yes)
    if (
        not isinstance(element, Select)
        or element.yes != 0
        or not hides(element.no, edit.dtype(value))
    ):
        return Mask(known=False)
    return _of(element.condition, element.no, edit)


def read_condition(
    value: ir.Value, hidden: float, dtype: ir.DataType | None, edit: Editor, *, shown: bool
) -> Mask:
    """Read the condition on which scores are kept (`shown`), or replaced by `hidden`.

    Args:
        value: The condition.
        hidden: What takes the place of hidden scores.
        dtype: The type of the scores.
        edit: Knows shapes and constants.
        shown: Whether scores are kept where the condition holds.
    """
    element = truth(_score(value, edit))
    if not shown:
        element = opposite(element)
    if element is None or not hides(hidden, dtype):
        return Mask(known=False)
    return _of(element, hidden, edit)


def _of(condition: Element, hidden: float, edit: Editor) -> Mask:
    terms = _Terms(edit)
    terms.take(condition)
    return Mask(terms.causal, terms.window, tuple(terms.padding), terms.known, (hidden,))


def _score(value: ir.Value, edit: Editor) -> Element | None:
    """Return the element that meets the score of head h, query i and key j of batch b."""
    shape = edit.shape(value)
    if shape is None or len(shape) > 4:
        return None
    places = (_BATCH, _HEAD, _QUERY, _KEY)[4 - len(shape) :]
    index = tuple(
        0 if isinstance(dim, int) and dim == 1 else place
        for dim, place in zip(shape, places, strict=True)
    )
    return Elements(edit).at(value, index)
