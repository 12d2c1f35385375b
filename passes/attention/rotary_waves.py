"""Numbers that depend on a position alone, such as the cosines of rotary embeddings.

A wave is the formula of one column of a table: `cos(position · 0.01) · 1.2`, say. It is read from
the graph element by element and evaluated with the roundings of the graph, so that a table of it
holds what the graph would have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim
from lwc.core.walk import constant_tensor
from lwc.passes.attention.elements import Element, Elements, Index, Number, Read
from lwc.rewrite import Editor, attribute

__all__ = [
    "Call",
    "Constant",
    "Known",
    "Lookup",
    "Position",
    "Wave",
    "WaveReader",
    "evaluate",
    "leaves",
]

Array: TypeAlias = np.ndarray[Any, Any]
Indices: TypeAlias = tuple[Dim, ...]

_DEEPEST = 24


@dataclass(frozen=True)
class Constant:
    """A number that depends on nothing."""

    value: float


@dataclass(frozen=True)
class Position:
    """The position: an element of an integer tensor, or what its index says.

    Attributes:
        element: Which element of what. Two positions are equal where these are.
        value: A value that has it at `index`.
        index: See `value`.
    """

    element: Index | Read
    value: ir.Value = field(compare=False)
    index: Indices = field(compare=False)


@dataclass(frozen=True)
class Lookup:
    """An element of a constant table in the row that a position says.

    Attributes:
        table: The constant.
        axis: The axis of `table` along which positions count.
        place: The index of the element, anything at `axis`.
        row: The position.
    """

    table: ir.Value
    axis: int
    place: tuple[int, ...]
    row: Position


@dataclass(frozen=True)
class Call:
    """An operator on waves, with the type it computes in."""

    op: str
    operands: tuple[Wave, ...]
    dtype: ir.DataType


Wave: TypeAlias = Constant | Position | Lookup | Call
Known: TypeAlias = dict[tuple[ir.Value, Indices], Wave]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Cos": np.cos,
    "Sin": np.sin,
    "Cast": np.positive,
    "Identity": np.positive,
}
_TRANSCENDENT = ("Cos", "Sin", "Exp", "Pow", "Sqrt")


class _Arithmetic:
    """What elements are not read through: some values, and all arithmetic of floats.

    Elements would evaluate it without the roundings of the graph, or take a product of an index
    with 1 for an index.
    """

    def __init__(self, edit: Editor, stops: frozenset[ir.Value]) -> None:
        self._edit = edit
        self._stops = stops

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, ir.Value):
            return False
        if value in self._stops:
            return True
        node = value.producer()
        if node is None or node.op_type not in _FUNCTIONS or node.op_type == "Identity":
            return False
        dtype = self._edit.dtype(value)
        return dtype is not None and dtype.is_floating_point()


class WaveReader:
    """Reads elements of values as waves.

    Args:
        edit: Knows shapes and constants.
        stops: Values that are no waves.
        known: Waves read before in the same graph, by value and index; it grows.

    Attributes:
        trouble: Why something below a sine or cosine was no wave.
    """

    def __init__(self, edit: Editor, stops: frozenset[ir.Value], known: Known) -> None:
        self._edit = edit
        self._stops = stops
        self._known = known
        self.elements = Elements(edit, _Arithmetic(edit, stops))
        self.trouble: str | None = None

    def at(self, value: ir.Value, index: Indices, depth: int = 0) -> Wave | None:
        """Return the wave that the element of `value` at `index` is; None where it is none."""
        if value in self._stops or depth > _DEEPEST:
            return None
        found = self._known.get((value, index))
        if found is None:
            element = self.elements.at(value, index)
            found = self._of(element, value, index, depth)
            if found is not None:
                self._known[value, index] = found
        return found

    def _of(
        self, element: Element | None, value: ir.Value, index: Indices, depth: int
    ) -> Wave | None:
        if isinstance(element, Number):
            return Constant(float(element.value))
        if isinstance(element, Index):
            return Position(element, value, index)
        if not isinstance(element, Read) or element.nonzero or element.value in self._stops:
            return None
        if self._edit.is_constant(element.value):
            return self._lookup(element)
        dtype = self._edit.dtype(element.value)
        if dtype is not None and dtype.is_integer():
            return Position(element, element.value, element.index)
        return self._call(element, dtype, depth)

    def _lookup(self, element: Read) -> Wave | None:
        """Read a constant at an index that moves along one axis."""
        moving = [axis for axis, each in enumerate(element.index) if not isinstance(each, int)]
        if len(moving) != 1:
            return None
        (axis,) = moving
        place = tuple(0 if n == axis else int(each) for n, each in enumerate(element.index))
        row = Position(Index(element.index[axis]), element.value, element.index)
        return self._looked_up(element.value, axis, place, row)

    def _looked_up(
        self, table: ir.Value, axis: int, place: tuple[int, ...], row: Position
    ) -> Lookup:
        """Return a lookup; of equal columns it takes the first, so that equal lookups are equal."""
        tensor, last = self._edit.tensor(table), len(place) - 1
        if tensor is None or axis == last:
            return Lookup(table, axis, place, row)
        columns = tensor.numpy()[
            tuple(slice(None) if n in (axis, last) else at for n, at in enumerate(place))
        ]
        first = next(
            n for n in range(place[last] + 1) if _same(columns[:, n], columns[:, place[last]])
        )
        return Lookup(table, axis, (*place[:last], first), row)

    def _call(self, element: Read, dtype: ir.DataType | None, depth: int) -> Wave | None:
        node = element.value.producer()
        if node is None or node.domain or dtype is None or not dtype.is_floating_point():
            return None
        if any(each.is_ref() for each in node.attributes.values()):
            return None
        if node.op_type == "Gather":
            return self._gathered(node, element.index)
        operands = self._operands(node, element.index, depth)
        if operands is None:
            if node.op_type in ("Cos", "Sin"):
                self.trouble = "its angles are not made of a position and constants alone"
            return None
        return Call(
            "Mul" if node.op_type in ("MatMul", "Einsum") else node.op_type, operands, dtype
        )

    def _operands(self, node: ir.Node, index: Indices, depth: int) -> tuple[Wave, ...] | None:
        if node.op_type == "MatMul":
            places = self._outer(node, index)
        elif node.op_type == "Einsum":
            places = self._einsum(node, index)
        elif node.op_type in _FUNCTIONS:
            places = self.broadcast(node, index)
        else:
            return None
        if places is None:
            return None
        waves: list[Wave] = []
        for value, at in places:
            wave = self.at(value, at, depth + 1)
            if wave is None:
                return None
            waves.append(wave)
        return tuple(waves)

    def broadcast(self, node: ir.Node, index: Indices) -> list[tuple[ir.Value, Indices]] | None:
        """Return each operand with the index of its element that meets the result's at `index`."""
        places: list[tuple[ir.Value, Indices]] = []
        for value in node.inputs:
            shape, whole = self._edit.shape(value), self._edit.shape(node.outputs[0])
            if value is None or shape is None or whole is None or len(whole) != len(index):
                return None
            lead = len(whole) - len(shape)
            own: list[Dim] = []
            for dim, of, at in zip(shape, whole[lead:], index[lead:], strict=True):
                if not self._edit.same_dim(dim, of) and dim != 1:
                    return None
                own.append(0 if isinstance(dim, int) and dim == 1 else at)
            places.append((value, tuple(own)))
        return places

    def _outer(self, node: ir.Node, index: Indices) -> list[tuple[ir.Value, Indices]] | None:
        """Read a product of matrices that sums over one term."""
        shapes = [self._edit.shape(value) for value in node.inputs]
        first, second = node.inputs
        a, b = shapes
        if first is None or second is None or a is None or b is None or min(len(a), len(b)) < 2:
            return None
        if a[-1] != 1 or b[-2] != 1:
            return None
        places: list[tuple[ir.Value, Indices]] = []
        for value, shape, last in ((first, a, (index[-2], 0)), (second, b, (0, index[-1]))):
            lead = index[len(index) - len(shape) : len(index) - 2]
            own = [
                0 if isinstance(dim, int) and dim == 1 else at
                for dim, at in zip(shape, (*lead, *last), strict=True)
            ]
            places.append((value, tuple(own)))
        return places

    def _einsum(self, node: ir.Node, index: Indices) -> list[tuple[ir.Value, Indices]] | None:
        """Read an Einsum that sums over nothing, such as `i,j->ij`."""
        terms, arrow, result = attribute(node, "equation", "").replace(" ", "").partition("->")
        names = terms.split(",")
        if not arrow or "." in terms or len(names) != 2 or set("".join(names)) != set(result):
            return None
        if len(set(result)) != len(result) or any(len(set(each)) != len(each) for each in names):
            return None
        at = dict(zip(result, index, strict=True))
        return [
            (value, tuple(at[name] for name in each))
            for value, each in zip(node.inputs, names, strict=True)
            if value is not None
        ]

    def _gathered(self, node: ir.Node, index: Indices) -> Wave | None:
        """Read a row of a constant table that an integer tensor says."""
        table, where = node.inputs
        rank, width = self._edit.rank(table), self._edit.rank(where)
        if table is None or where is None or rank is None or width is None:
            return None
        axis = attribute(node, "axis", 0) % rank
        rest = (*index[:axis], *index[axis + width :])
        if not self._edit.is_constant(table) or not all(isinstance(each, int) for each in rest):
            return None
        row = self.at(where, index[axis : axis + width])
        if not isinstance(row, Position):
            return None
        place = (*map(int, index[:axis]), 0, *map(int, index[axis + width :]))
        return self._looked_up(table, axis, place, row)


def _same(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a, b))


def leaves(wave: Wave) -> frozenset[Position | Lookup]:
    """Return the positions and tables that a wave is made of."""
    if isinstance(wave, Call):
        return frozenset().union(*map(leaves, wave.operands))
    return frozenset() if isinstance(wave, Constant) else frozenset((wave,))


def evaluate(wave: Wave, positions: Array, known: dict[Wave, Array]) -> Array:
    """Return the numbers of a wave at positions, rounded at every step as the graph rounds them.

    Args:
        wave: The wave.
        positions: int64 `[count]`.
        known: What was evaluated before at the same positions; it grows.
    """
    found = known.get(wave)
    if found is None:
        with np.errstate(all="ignore"):
            found = _evaluated(wave, positions, known)
        known[wave] = found
    return found


def _evaluated(wave: Wave, positions: Array, known: dict[Wave, Array]) -> Array:
    if isinstance(wave, Constant):
        return np.full(positions.shape, wave.value)
    if isinstance(wave, Position):
        return positions
    if isinstance(wave, Lookup):
        tensor = constant_tensor(wave.table)
        assert tensor is not None
        place = tuple(positions if axis == wave.axis else at for axis, at in enumerate(wave.place))
        return np.asarray(tensor.numpy()[place])
    dtype = wave.dtype.numpy()
    operands = [evaluate(each, positions, known).astype(dtype) for each in wave.operands]
    if wave.op in _TRANSCENDENT:
        operands = [each.astype(np.float64) for each in operands]
    return np.asarray(_FUNCTIONS[wave.op](*operands)).astype(dtype)
