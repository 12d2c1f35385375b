"""Rotary embeddings as exporters spell them, read into one description.

Whatever the spelling, element j of the result is `x[j] · cos ± x[k] · sin` with the partner k of
j, or `x[j]` where the head is not turned. That is read element by element.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import onnx_ir as ir

from lwc.core.dims import Dim, integer, subtract
from lwc.passes.attention.elements import Index, Read
from lwc.passes.attention.rotary_waves import (
    Call,
    Constant,
    Known,
    Lookup,
    Position,
    Wave,
    WaveReader,
    leaves,
)
from lwc.rewrite import Editor, Miss, producer_of

__all__ = ["AXES", "Rotation", "read_rotation"]

AXES = tuple(integer(f"index {n} of a head") for n in range(3))
"""Index variables of the axes before the last of what is turned."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_LARGEST_HEAD = 1024
_STEPS = (
    "Add", "Sub", "Mul", "Neg", "Concat", "Slice", "Split", "Reshape", "Unsqueeze", "Squeeze",
    "Transpose", "Gather", "Identity", "Flatten", "Cast",
)  # fmt: skip
_FARTHEST = 64
"""Values looked at on the way back to what is turned."""

Layout: TypeAlias = Literal["apart", "mixed"]


@dataclass(frozen=True)
class Rotation:
    """Heads whose elements are turned in pairs.

    Attributes:
        source: What is turned.
        layout: `apart` is `[batch, heads, length, size]`, `mixed` `[batch, length, heads, size]`
            or `[batch, length, size]`.
        interleaved: Whether pairs are neighbours; else the second half follows the first.
        turned: How many elements of a head are turned; the others are behind them.
        cos: The wave of each pair.
        sin: The wave of each pair.
        position: The position they depend on.
    """

    source: ir.Value
    layout: Layout
    interleaved: bool
    turned: int
    cos: tuple[Wave, ...]
    sin: tuple[Wave, ...]
    position: Position

    @property
    def length_axis(self) -> int:
        """The axis of `source` along which tokens follow each other."""
        return 2 if self.layout == "apart" else 1

    @property
    def offset(self) -> int | None:
        """The first position where positions count up by one from a number."""
        element = self.position.element
        if not isinstance(element, Index):
            return None
        first = subtract(element.value, AXES[self.length_axis])
        return first if isinstance(first, int) else None


class _Term(NamedTuple):
    """`± x[place] · wave`; a wave of None is 1."""

    negative: bool
    place: int
    wave: Wave | None


def read_rotation(root: ir.Node, edit: Editor, known: Known) -> Rotation | Miss | None:
    """Read the last operator of a rotary embedding; None where it is nothing like it.

    Args:
        root: The operator.
        edit: Knows shapes and constants.
        known: Waves read before with this editor; it grows.
    """
    result = root.outputs[0]
    shape = edit.shape(result)
    if shape is None or len(shape) not in (3, 4) or edit.dtype(result) not in _FLOATS:
        return None
    size = shape[-1]
    if not isinstance(size, int) or not 2 <= size <= _LARGEST_HEAD or not _may_end(root, edit):
        return None
    near: Miss | None = None
    for source in _sources(root, edit):
        found = _from(source, result, size, edit, known)
        if isinstance(found, Rotation):
            return found
        near = near or found
    return near


def _may_end(root: ir.Node, edit: Editor) -> bool:
    """Tell quickly whether a node may end a rotary embedding."""
    if root.op_type in ("Add", "Sub"):
        return all(producer_of(value, "Mul", "Neg") is not None for value in root.inputs)
    if root.op_type == "Reshape":
        return producer_of(root.inputs[0], "Concat") is not None
    axis = root.attributes.get_int("axis", 0)
    rank = edit.rank(root.outputs[0])
    made = [producer_of(value, *_STEPS) for value in root.inputs]
    return rank is not None and axis in (-1, rank - 1) and None not in made


def _sources(root: ir.Node, edit: Editor) -> Iterator[ir.Value]:
    """Yield values of the result's shape that it is made of, nearest first."""
    result = root.outputs[0]
    queue = deque(value for value in root.inputs if value is not None)
    seen = set(queue)
    while queue and len(seen) < _FARTHEST:
        value = queue.popleft()
        if edit.dtype(value) == edit.dtype(result) and edit.same_shape(value, result):
            yield value
        node = producer_of(value, *_STEPS)
        if node is None:
            continue
        operands = (
            node.inputs if node.op_type in ("Add", "Sub", "Mul", "Concat") else node.inputs[:1]
        )
        for each in operands:
            if each is not None and each not in seen:
                seen.add(each)
                queue.append(each)


def _from(
    source: ir.Value, result: ir.Value, size: int, edit: Editor, known: Known
) -> Rotation | Miss | None:
    """Read a result as a rotation of `source`."""
    index = AXES[: (edit.rank(result) or 0) - 1]
    rows: list[tuple[_Term, ...]] = []
    for place in range(size):
        reader = _Reader(source, index, edit, known)
        terms = reader.terms(result, (*index, place))
        if terms is None or not (place or _is_turn(terms, place)):
            near = place > 0 or reader.waves.trouble is not None
            reason = reader.waves.trouble or f"element {place} of a head is no pair turned"
            return Miss(reason) if near else None
        rows.append(terms)
    turned = next((n for n, terms in enumerate(rows) if terms == (_Term(False, n, None),)), size)
    if any(terms != (_Term(False, n, None),) for n, terms in enumerate(rows) if n >= turned):
        return Miss("elements behind the turned ones are changed")
    return _paired(source, rows[:turned], index, edit)


def _is_turn(terms: Sequence[_Term], place: int) -> bool:
    return len(terms) == 2 and any(term.place == place and term.wave is not None for term in terms)


def _paired(
    source: ir.Value, rows: Sequence[Sequence[_Term]], index: tuple[Dim, ...], edit: Editor
) -> Rotation | Miss:
    """Sort turned elements into pairs."""
    turned = len(rows)
    partner = next((term.place for term in rows[0] if term.place), None)
    if turned % 2 or partner not in (1, turned // 2):
        return Miss("its elements are turned in other pairs than halves or neighbours make")
    interleaved = partner == 1 and turned > 2
    cos, sin = [], []
    for pair in range(turned // 2):
        low, high = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + turned // 2)
        waves = _pair(rows[low], rows[high], low, high)
        if isinstance(waves, Miss):
            return waves
        cos.append(waves[0])
        sin.append(waves[1])
    position = _position((*cos, *sin))
    if isinstance(position, Miss):
        return position
    objection = _against(cos, sin)
    if objection is not None:
        return Miss(objection)
    layout = _layout(position, index, edit.shape(source) or ())
    if layout is None:
        return Miss("its positions do not run along one axis before the last")
    return Rotation(source, layout, interleaved, turned, tuple(cos), tuple(sin), position)


def _pair(
    first: Sequence[_Term], second: Sequence[_Term], low: int, high: int
) -> tuple[Wave, Wave] | Miss:
    """Read `x[low] cos - x[high] sin` and `x[high] cos + x[low] sin`."""
    a, b = ({term.place: term for term in terms} for terms in (first, second))
    if set(a) != {low, high} or set(b) != {low, high} or len(first) != 2 or len(second) != 2:
        return Miss(f"elements {low} and {high} of a head are not turned with each other")
    signs = a[low].negative, a[high].negative, b[high].negative, b[low].negative
    if signs != (False, True, False, False):
        return Miss(f"elements {low} and {high} of a head are turned with other signs")
    cos, sin = a[low].wave, a[high].wave
    if cos is None or sin is None or cos != b[high].wave or sin != b[low].wave:
        return Miss(f"elements {low} and {high} of a head are turned by different angles")
    return cos, sin


def _position(waves: Sequence[Wave]) -> Position | Miss:
    found: dict[Position, None] = {}
    for wave in waves:
        for leaf in leaves(wave):
            found[leaf.row if isinstance(leaf, Lookup) else leaf] = None
    if len(found) > 1:
        return Miss("cosines and sines are of different positions")
    return next(iter(found)) if found else Miss("its angles depend on no position")


def _against(cos: Sequence[Wave], sin: Sequence[Wave]) -> str | None:
    """Tell why these are not the cosines and sines of the same angles; tables tell by numbers."""
    for a, b in zip(cos, sin, strict=True):
        of_cos, of_sin = _angles(a), _angles(b)
        if len(of_cos) > 1 or len(of_sin) > 1 or len(of_cos) != len(of_sin):
            return "what it multiplies by is not one cosine and one sine"
        if of_cos and (of_cos[0].op, of_sin[0].op) != ("Cos", "Sin"):
            return "its sines and cosines stand in each other's place"
        if of_cos and of_cos[0].operands != of_sin[0].operands:
            return "its cosines and sines are of different angles"
    return None


def _angles(wave: Wave) -> list[Call]:
    if not isinstance(wave, Call):
        return []
    if wave.op in ("Cos", "Sin"):
        return [wave]
    return [each for operand in wave.operands for each in _angles(operand)]


def _layout(position: Position, index: tuple[Dim, ...], shape: Sequence[Dim]) -> Layout | None:
    """Say along which axis positions run."""
    element = position.element
    entries = element.index if isinstance(element, Read) else (element.value,)
    used = set().union(*(getattr(each, "free_symbols", ()) for each in entries))
    running = [n for n, each in enumerate(index) if each in used and n > 0]
    if len(index) == 2:
        return "mixed" if running in ([], [1]) else None
    if len(running) == 1:
        return "apart" if running == [2] else "mixed"
    return "apart" if not running and shape[2] == 1 else None


class _Reader:
    """Reads one element of a result as terms in elements of the source."""

    def __init__(
        self, source: ir.Value, index: tuple[Dim, ...], edit: Editor, known: Known
    ) -> None:
        self._source = source
        self._index = index
        self._edit = edit
        self.waves = WaveReader(edit, frozenset((source,)), known)

    def terms(self, value: ir.Value, index: tuple[Dim, ...]) -> tuple[_Term, ...] | None:
        """Return the sum that an element is; None where it is none of elements of the source."""
        element = self.waves.elements.at(value, index)
        if not isinstance(element, Read):
            return None
        if element.value is self._source:
            place = self._place(element)
            return None if place is None else (_Term(False, place, None),)
        node = producer_of(element.value, "Add", "Sub", "Neg", "Mul")
        if node is None:
            return None
        places = self.waves.broadcast(node, element.index)
        if places is None:
            return None
        if node.op_type == "Mul":
            return self._product(places)
        found: list[_Term] = []
        for number, (operand, at) in enumerate(places):
            inner = self.terms(operand, at)
            if inner is None:
                return None
            flips = node.op_type == "Neg" or (node.op_type == "Sub" and number == 1)
            found += [t._replace(negative=t.negative != flips) for t in inner]
        return tuple(found) if len(found) <= 2 else None

    def _product(
        self, places: Sequence[tuple[ir.Value, tuple[Dim, ...]]]
    ) -> tuple[_Term, ...] | None:
        for one, other in (places, places[::-1]):
            inner = self.terms(*one)
            if inner is None or len(inner) != 1:
                continue
            (term,) = inner
            wave = self.waves.at(*other)
            if wave is None:
                return None
            if wave == Constant(-1.0):
                return (term._replace(negative=not term.negative),)
            return (term._replace(wave=wave),) if term.wave is None else None
        return None

    def _place(self, element: Read) -> int | None:
        *lead, last = element.index
        shape = self._edit.shape(self._source) or ()
        same = all(
            at == own or (at == 0 and dim == 1)
            for at, own, dim in zip(lead, self._index, shape, strict=False)
        )
        return last if same and isinstance(last, int) else None
