"""What an element of a value can be: a number, an index, a condition, an element of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim, subtract

if TYPE_CHECKING:
    from lwc.passes.attention.elements import Elements

__all__ = [
    "CONDITIONS",
    "AtMost",
    "Both",
    "Element",
    "Index",
    "Indices",
    "Look",
    "Never",
    "Number",
    "Read",
    "Select",
    "as_index",
    "hides",
    "opposite",
    "rounded",
    "truth",
]

Indices: TypeAlias = tuple[Dim, ...]

_HIDES = {ir.DataType.FLOAT16: -3e4}
"""Numbers up to this one hide a key: the exponential of anything so far below a score is 0."""


def hides(number: float, dtype: ir.DataType | None) -> bool:
    """Tell whether a number in place of a score, or added to it, hides a key."""
    return dtype is not None and number <= _HIDES.get(dtype, -1e8)


@dataclass(frozen=True)
class Number:
    """A constant number or truth value."""

    value: float | int | bool


@dataclass(frozen=True)
class Index:
    """An integer computed from indices and extents alone."""

    value: Dim


@dataclass(frozen=True)
class Read:
    """An element of a value of which no more is known; `nonzero` where it is tested for that."""

    value: ir.Value
    index: Indices
    nonzero: bool = False


@dataclass(frozen=True)
class AtMost:
    """The condition `value <= 0`."""

    value: Dim


@dataclass(frozen=True)
class Both:
    """A conjunction."""

    terms: tuple[Element, ...]


@dataclass(frozen=True)
class Never:
    """The opposite of a condition."""

    term: Element


@dataclass(frozen=True)
class Select:
    """One number where a condition holds, and another where it does not.

    Where maps that hide were added, `no` is what it is where both hide: the least there is.
    """

    condition: Element
    yes: float
    no: float


Element: TypeAlias = Number | Index | Read | AtMost | Both | Never | Select
CONDITIONS = (AtMost, Both, Never)

Look: TypeAlias = Callable[["Elements", ir.Node, Indices], "Element | None"]
"""Gives the element of an operator's first output at an index; None where it is not known."""


def as_index(element: Element | None) -> Dim | None:
    """Return the integer that an element is, if it is one."""
    if isinstance(element, Index):
        return element.value
    if isinstance(element, Number) and float(element.value).is_integer():
        return int(element.value)
    return None


def truth(element: Element | None) -> Element | None:
    """Return an element as a condition; None where it is none."""
    if isinstance(element, Read):
        return Read(element.value, element.index, nonzero=True)
    if isinstance(element, Number):
        return Number(bool(element.value))
    if isinstance(element, Select):
        if bool(element.yes) == bool(element.no):
            return Number(bool(element.yes))
        return element.condition if element.yes else opposite(element.condition)
    return element if isinstance(element, CONDITIONS) else None


def opposite(condition: Element | None) -> Element | None:
    """Return the negation of a condition."""
    if isinstance(condition, AtMost):
        return AtMost(subtract(1, condition.value))
    if isinstance(condition, Number):
        return Number(not condition.value)
    if isinstance(condition, Never):
        return condition.term
    if isinstance(condition, Both) or (isinstance(condition, Read) and condition.nonzero):
        return Never(condition)
    return None


def rounded(value: float, dtype: ir.DataType | None) -> float | int | bool:
    """Return a number as a value of that type holds it."""
    if dtype is None or not dtype.is_floating_point():
        return value
    with np.errstate(over="ignore"):
        return float(np.asarray(value).astype(dtype.numpy()))
