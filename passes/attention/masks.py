"""Masks of attention, read as conditions on batch, query and key."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from lwc.core.dims import Dim, integer, subtract
from lwc.passes.attention.elements import (
    AtMost,
    Both,
    Element,
    Elements,
    Index,
    Number,
    Read,
    Select,
)
from lwc.rewrite import Editor

__all__ = ["HIDES", "Mask", "read_bias", "read_condition"]

HIDES = -1e8
"""Numbers up to this one hide a key: the exponential of anything so far below is 0."""

_BATCH, _HEAD, _QUERY, _KEY = (integer(f"{name} of a score") for name in ("b", "h", "i", "j"))


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as far as it is known.

    Attributes:
        causal: No key behind the query's own place.
        window: Most keys up to the query's own; None for all.
        padding: Values `[batch, keys]`, or `[keys]` of one batch; a key is seen where it is not 0.
        known: Whether that is all there is to the mask.
        hidden: The least number that is put in place of a hidden score, or added to it.
        shift: Keys before the first query, which causality and window count from.
    """

    causal: bool = False
    window: int | None = None
    padding: tuple[ir.Value, ...] = ()
    known: bool = True
    hidden: float = float("-inf")
    shift: Dim = 0

    def __and__(self, other: Mask) -> Mask:
        """Return the mask that hides what either hides."""
        windows = [each for each in (self.window, other.window) if each is not None]
        return Mask(
            self.causal or other.causal,
            min(windows, default=None),
            tuple(dict.fromkeys((*self.padding, *other.padding))),
            self.known and other.known and self.shift == other.shift,
            max(self.hidden, other.hidden),
            self.shift,
        )

    @property
    def shows_itself(self) -> bool:
        """Tell whether every query sees a key: there is no row without one."""
        return self.known and not self.padding and self.shift == 0


@dataclass
class _Terms:
    causal: bool = False
    window: int | None = None
    padding: list[ir.Value] = field(default_factory=list)
    known: bool = True

    def take(self, term: Element) -> None:
        if isinstance(term, Both):
            for each in term.terms:
                self.take(each)
        elif isinstance(term, AtMost):
            self._take_distance(term.value)
        elif isinstance(term, Read) and _is_padding(term):
            self.padding.append(term.value)
        elif not (isinstance(term, Number) and term.value):
            self.known = False

    def _take_distance(self, value: Dim) -> None:
        """Causal is `j - i <= 0`; a window of w keys is `i - j - (w - 1) <= 0`."""
        behind = subtract(subtract(_QUERY, _KEY), value)
        if subtract(value, subtract(_KEY, _QUERY)) == 0:
            self.causal = True
        elif isinstance(behind, int) and behind >= 0:
            self.window = behind + 1 if self.window is None else min(self.window, behind + 1)
        else:
            self.known = False


def _is_padding(term: Read) -> bool:
    index = term.index
    if not term.nonzero and term.value.dtype != ir.DataType.BOOL:
        return False
    return len(index) == 2 and index[1] == _KEY and index[0] in (_BATCH, 0)


def read_bias(value: ir.Value, edit: Editor) -> Mask:
    """Read what is added to scores `[batch, heads, queries, keys]`."""
    element = _score(value, edit)
    if isinstance(element, Number) and element.value == 0:
        return Mask()
    if not isinstance(element, Select) or element.yes != 0 or element.no > HIDES:
        return Mask(known=False)
    return _of(element.condition, element.no)


def read_condition(value: ir.Value, hidden: float, edit: Editor, *, shown: bool = True) -> Mask:
    """Read the condition on which scores are kept (`shown`), or replaced by `hidden`."""
    element = _score(value, edit)
    if not shown:
        element = Elements(edit).opposite(element)
    if isinstance(element, Select) and (element.yes, element.no) == (1, 0):
        element = element.condition
    if element is None or isinstance(element, Index | Select) or hidden > HIDES:
        return Mask(known=False)
    return _of(element, hidden)


def _of(condition: Element, hidden: float) -> Mask:
    terms = _Terms()
    terms.take(condition)
    return Mask(terms.causal, terms.window, tuple(terms.padding), terms.known, hidden)


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
