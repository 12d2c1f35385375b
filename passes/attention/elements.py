"""What one element of a value is, as an expression of its index.

Exporters compute masks with dozens of operators: ranges, comparisons, gathers, broadcasts. Read
element by element all of that is short: the mask of a causal decoder at query `i` and key `j` is
`j - i <= 0 and padding[b, j]`, whatever produced it. Indices are sympy expressions in index
variables and the extents of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
import sympy

from lwc.core.dims import Dim, add, modulo, multiply, product, subtract
from lwc.rewrite import attribute

if TYPE_CHECKING:
    from lwc.rewrite import Editor

__all__ = ["AtMost", "Both", "Element", "Elements", "Index", "Never", "Number", "Read", "Select"]

Indices: TypeAlias = tuple[Dim, ...]

_BUDGET = 2000
"""Elements looked at per question."""

_TABLE_BYTES = 64 << 20


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
    """One number where a condition holds, and another where it does not."""

    condition: Element
    yes: float
    no: float


Element: TypeAlias = Number | Index | Read | AtMost | Both | Never | Select
_CONDITIONS = (AtMost, Both, Never)


class Elements:
    """Answers what an element of a value is.

    Args:
        edit: Knows shapes and constants.
        stops: Values whose elements are read as such, whatever they are made of.
    """

    def __init__(self, edit: Editor, stops: frozenset[ir.Value] = frozenset()) -> None:
        self._edit = edit
        self._stops = stops
        self._known: dict[tuple[ir.Value, Indices], Element] = {}
        self._left = _BUDGET

    def at(self, value: ir.Value, index: Indices) -> Element:
        """Return the element of `value` at `index`, one expression per axis."""
        key = (value, index)
        found = self._known.get(key)
        if found is None:
            self._left -= 1
            found = self._look(value, index) if self._left > 0 else None
            found = Read(value, index) if found is None else found
            self._known[key] = found
        return found

    def _look(self, value: ir.Value, index: Indices) -> Element | None:
        if value in self._stops:
            return None
        if self._edit.is_constant(value):
            return self._constant(value, index)
        content = self._edit.symbolic(value)
        if content is not None and len(content) == 1:
            return Index(content[0])
        node = value.producer()
        if node is None or node.domain:
            return None
        if any(each.is_ref() for each in node.attributes.values()):
            return None
        if node.op_type == "Split":
            return _split(self, node, node.outputs.index(value), index)
        if value is not node.outputs[0]:
            return None
        look = _OPERATORS.get(node.op_type)
        return None if look is None else look(self, node, index)

    def _constant(self, value: ir.Value, index: Indices) -> Element | None:
        number = self._edit.scalar(value)
        if number is not None:
            return Number(number)
        tensor = self._edit.tensor(value)
        if tensor is None or tensor.nbytes > _TABLE_BYTES or tensor.dtype == ir.DataType.STRING:
            return None
        if all(isinstance(each, int) for each in index):
            array = tensor.numpy()
            inside = all(-n <= int(i) < n for i, n in zip(index, array.shape, strict=True))
            return Number(array[tuple(map(int, index))].item()) if inside else None
        return _band(tensor, index)

    # Facts and operands

    def shape(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """Return the shape of a value where its rank is known."""
        shape = self._edit.shape(value)
        return None if shape is None else tuple(shape)

    def constants(self, value: ir.Value | None) -> list[int] | None:
        """Return the content of a vector of known integers."""
        return self._edit.ints(value)

    def operand(self, node: ir.Node, place: int, index: Indices) -> Element | None:
        """Return the element of an operand that broadcasts into the element at `index`."""
        value = node.inputs[place] if place < len(node.inputs) else None
        shape, whole = self.shape(value), self.shape(node.outputs[0])
        if value is None or shape is None or whole is None or len(whole) != len(index):
            return None
        own: list[Dim] = []
        for dim, of, at in zip(
            shape, whole[len(whole) - len(shape) :], index[len(index) - len(shape) :], strict=True
        ):
            if isinstance(dim, int) and dim == 1:
                own.append(0)
            elif self._edit.same_dim(dim, of):
                own.append(at)
            else:
                return None
        return self.at(value, tuple(own))

    def scalar(self, value: ir.Value | None) -> Element | None:
        """Return the only element of a value of at most one."""
        shape = self.shape(value)
        if value is None or shape is None or any(dim != 1 for dim in shape):
            return None
        content = self._edit.symbolic(value)
        if content is not None and len(content) == 1:
            return Index(content[0])
        return self.at(value, (0,) * len(shape))

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the rank of a value where it is known."""
        return self._edit.rank(value)

    def opposite(self, condition: Element | None) -> Element | None:
        """Return the negation of a condition."""
        if isinstance(condition, AtMost):
            return AtMost(subtract(1, condition.value))
        if isinstance(condition, Number):
            return Number(not condition.value)
        if isinstance(condition, Never):
            return condition.term
        if isinstance(condition, Select):
            return Select(condition.condition, float(not condition.yes), float(not condition.no))
        return None if condition is None else Never(condition)


def _band(tensor: ir.TensorProtocol, index: Indices) -> Element | None:
    """Read a constant that has one number in a band along the diagonal and another outside."""
    free = [axis for axis, each in enumerate(index) if not isinstance(each, int)]
    if len(free) != 2:
        return None
    array = tensor.numpy()[tuple(i if isinstance(i, int) else slice(None) for i in index)]
    rows, columns = array.shape
    first = array[0, 0]
    if array.size == 0 or array.dtype.kind not in "bfiu":
        return None
    ahead = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    inside = array == first
    low, high = int(ahead[inside].min()), int(ahead[inside].max())
    if not np.array_equal(inside, (ahead >= low) & (ahead <= high)):
        return None
    others = np.unique(array[~inside])
    if others.size > 1:
        return None
    distance = subtract(index[free[1]], index[free[0]])
    terms: list[Element] = []
    if high < columns - 1:
        terms.append(AtMost(subtract(distance, high)))
    if low > 1 - rows:
        terms.append(AtMost(subtract(low, distance)))
    if not terms or not others.size:
        return Number(first.item())
    band = terms[0] if len(terms) == 1 else Both(tuple(terms))
    return Select(band, float(first), float(others[0]))


# Operators, by name: each gives the element of its first output at an index.

Look: TypeAlias = Callable[[Elements, ir.Node, Indices], "Element | None"]
_OPERATORS: dict[str, Look] = {}


def _looks(*ops: str) -> Callable[[Look], Look]:
    def wrap(function: Look) -> Look:
        _OPERATORS.update(dict.fromkeys(ops, function))
        return function

    return wrap


@_looks("Identity")
def _same(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    return of.operand(node, 0, index)


@_looks("Cast")
def _cast(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    element = of.operand(node, 0, index)
    to = ir.DataType(attribute(node, "to"))
    if to == ir.DataType.BOOL:
        return _truth(element)
    if isinstance(element, Read):
        return None
    if isinstance(element, Number):
        return _rounded(int(element.value) if to.is_integer() else element.value, to)
    return element


def _rounded(value: float, dtype: ir.DataType | None) -> Number:
    """Return a number as a value of that type holds it."""
    if dtype is None or not dtype.is_floating_point():
        return Number(value)
    with np.errstate(over="ignore"):
        return Number(float(np.asarray(value).astype(dtype.numpy())))


def _truth(element: Element | None) -> Element | None:
    if isinstance(element, Read):
        return Read(element.value, element.index, nonzero=True)
    if isinstance(element, Number):
        return Number(bool(element.value))
    return element if isinstance(element, (*_CONDITIONS, Select)) else None


@_looks("Unsqueeze")
def _unsqueeze(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    axes = of.constants(node.inputs[1])
    if axes is None or node.inputs[0] is None:
        return None
    new = {axis % len(index) for axis in axes}
    return of.at(node.inputs[0], tuple(i for n, i in enumerate(index) if n not in new))


@_looks("Squeeze")
def _squeeze(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    shape = of.shape(node.inputs[0])
    if shape is None or node.inputs[0] is None:
        return None
    if len(node.inputs) > 1:
        axes = of.constants(node.inputs[1])
        if axes is None:
            return None
        gone = {axis % len(shape) for axis in axes}
    else:
        gone = {axis for axis, dim in enumerate(shape) if dim == 1}
        if len(shape) - len(gone) != len(index):
            return None
    rest = iter(index)
    return of.at(node.inputs[0], tuple(0 if n in gone else next(rest) for n in range(len(shape))))


@_looks("Transpose")
def _transpose(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    perm = attribute(node, "perm", list(reversed(range(len(index)))))
    own: list[Dim] = [0] * len(index)
    for place, axis in enumerate(perm):
        own[axis] = index[place]
    return None if node.inputs[0] is None else of.at(node.inputs[0], tuple(own))


@_looks("Expand")
def _expand(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    return of.operand(node, 0, index)


@_looks("Reshape", "Flatten")
def _reshape(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    """The place in memory order, taken apart by the extents before."""
    source, shape, whole = node.inputs[0], of.shape(node.inputs[0]), of.shape(node.outputs[0])
    if source is None or shape is None or whole is None:
        return None
    place: Dim = 0
    for at, dim in zip(index, whole, strict=True):
        place = add(multiply(place, dim), at)
    return _taken_apart(of, source, shape, place)


def _taken_apart(
    of: Elements, source: ir.Value, shape: Sequence[Dim], place: Dim
) -> Element | None:
    own: list[Dim] = []
    rest = sympy.expand(place)
    for axis in range(len(shape)):
        stride = sympy.sympify(product(shape[axis + 1 :]))
        if shape[axis] == 1:
            own.append(0)
            continue
        outer = sympy.Integer(0)
        for term in sympy.Add.make_args(rest):
            if term.is_Integer and stride.is_Integer:
                outer += term // stride
                continue
            ratio = sympy.cancel(term / stride)
            if ratio.as_numer_denom()[1] == 1:
                outer += ratio
        rest = sympy.expand(rest - outer * stride)
        own.append(int(outer) if outer.is_Integer else outer)
    # Each index stays below its extent: else a term that is a multiple by chance was misplaced.
    if rest != 0 or not _within(own, shape):
        return None
    return of.at(source, tuple(own))


def _within(index: Sequence[Dim], shape: Sequence[Dim]) -> bool:
    """Tell whether indices are single variables of axes of their own, or numbers in range."""
    for at, dim in zip(index, shape, strict=True):
        if isinstance(at, int):
            if not isinstance(dim, int) and at != 0:
                return False
            if isinstance(dim, int) and not 0 <= at < dim:
                return False
        elif not getattr(at, "is_Symbol", False):
            return False
    return True


@_looks("Slice")
def _slice(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, shape = node.inputs[0], of.shape(node.inputs[0])
    if source is None or shape is None:
        return None
    begins = of._edit.symbolic(node.inputs[1])
    given = [each for each in node.inputs[3:5] if each is not None]
    axes = of.constants(node.inputs[3]) if given else list(range(len(begins or ())))
    steps: list[int] | None = [1] * len(axes or ())
    if len(node.inputs) > 4 and node.inputs[4]:
        steps = of.constants(node.inputs[4])
    if begins is None or axes is None or steps is None or any(step < 1 for step in steps):
        return None
    own = list(index)
    for begin, axis, step in zip(begins, axes, steps, strict=True):
        behind = isinstance(begin, int) and begin < 0
        first = add(shape[axis], begin) if behind and begin > -(2**31) else 0 if behind else begin
        own[axis] = add(multiply(own[axis], step), first)
    return of.at(source, tuple(own))


def _split(of: Elements, node: ir.Node, part: int, index: Indices) -> Element | None:
    source, axis = node.inputs[0], attribute(node, "axis", 0) % len(index)
    if source is None:
        return None
    begin: Dim = 0
    for value in node.outputs[:part]:
        shape = of.shape(value)
        if shape is None:
            return None
        begin = add(begin, shape[axis])
    return of.at(source, (*index[:axis], add(index[axis], begin), *index[axis + 1 :]))


@_looks("Tile")
def _tile(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, shape, times = node.inputs[0], of.shape(node.inputs[0]), of.constants(node.inputs[1])
    if source is None or shape is None or times is None:
        return None
    own: list[Dim] = []
    for at, dim, count in zip(index, shape, times, strict=True):
        if count != 1 and dim != 1 and not (isinstance(at, int) and isinstance(dim, int)):
            return None
        own.append(at if count == 1 else modulo(at, dim))
    return of.at(source, tuple(own))


@_looks("Gather")
def _gather(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, where = node.inputs[0], node.inputs[1]
    rank, width = of.rank(source), of.rank(where)
    if source is None or where is None or rank is None or width is None:
        return None
    axis = attribute(node, "axis", 0) % rank
    place = _as_index(of.at(where, index[axis : axis + width]))
    if place is None:
        return None
    return of.at(source, (*index[:axis], place, *index[axis + width :]))


@_looks("GatherND")
def _gather_nd(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    source, where = node.inputs[0], node.inputs[1]
    shape = of.shape(where)
    if attribute(node, "batch_dims", 0) or source is None or where is None or shape is None:
        return None
    count, lead = shape[-1], len(shape) - 1
    if not isinstance(count, int):
        return None
    places = [_as_index(of.at(where, (*index[:lead], n))) for n in range(count)]
    known = [place for place in places if place is not None]
    return of.at(source, (*known, *index[lead:])) if len(known) == count else None


@_looks("Concat")
def _concat(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    """Only where the place along the axis is a number."""
    axis = attribute(node, "axis") % len(index)
    at = index[axis]
    for value in node.inputs:
        shape = of.shape(value)
        if value is None or shape is None or not isinstance(at, int):
            return None
        dim = shape[axis]
        if not isinstance(dim, int):
            return None
        if at < dim:
            return of.at(value, (*index[:axis], at, *index[axis + 1 :]))
        at -= dim
    return None


@_looks("Range")
def _range(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    start, step = (_as_index(of.scalar(node.inputs[place])) for place in (0, 2))
    if start is None or step is None:
        return None
    return Index(add(start, multiply(step, index[0])))


@_looks("ConstantOfShape")
def _filled(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    fill = attribute(node, "value")
    return Number(0.0 if fill is None else fill.numpy().reshape(-1)[0].item())


@_looks("Trilu")
def _trilu(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    element = None if node.inputs[0] is None else of.at(node.inputs[0], index)
    shift: Dim | None = 0
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        shift = _as_index(of.scalar(node.inputs[1]))
    if not isinstance(element, Number) or shift is None:
        return None
    ahead = subtract(subtract(index[-1], index[-2]), shift)
    kept = AtMost(subtract(0, ahead)) if attribute(node, "upper", 1) else AtMost(ahead)
    return Select(kept, float(element.value), 0.0)


def _as_index(element: Element | None) -> Dim | None:
    if isinstance(element, Index):
        return element.value
    if isinstance(element, Number) and float(element.value).is_integer():
        return int(element.value)
    return None


@_looks("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
def _compare(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    first, second = (of.operand(node, place, index) for place in (0, 1))
    a, b = _as_index(first), _as_index(second)
    if a is None or b is None or (isinstance(first, Number) and isinstance(second, Number)):
        return None
    if "Greater" in node.op_type:
        a, b = b, a
    difference = subtract(a, b)
    return AtMost(difference if "Equal" in node.op_type else add(difference, 1))


@_looks("Equal")
def _equal(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    """Equal to 0: the opposite of not zero."""
    operands = [of.operand(node, place, index) for place in (0, 1)]
    for element, other in (operands, operands[::-1]):
        if isinstance(other, Number) and other.value == 0 and isinstance(element, Read):
            return Never(Read(element.value, element.index, nonzero=True))
    return None


@_looks("Not")
def _not(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    return of.opposite(_truth(of.operand(node, 0, index)))


@_looks("And")
def _and(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    terms: list[Element] = []
    for place in (0, 1):
        element = _truth(of.operand(node, place, index))
        if element is None:
            return None
        if isinstance(element, Number):
            if not element.value:
                return element
            continue
        terms += element.terms if isinstance(element, Both) else [element]
    unique = tuple(dict.fromkeys(terms))
    return Number(True) if not unique else unique[0] if len(unique) == 1 else Both(unique)


@_looks("Or")
def _or(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    operands = [of.operand(node, place, index) for place in (0, 1)]
    for element, other in (operands, operands[::-1]):
        if isinstance(element, Number):
            return element if element.value else other
    return None


@_looks("Where")
def _where(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    condition, yes, no = (of.operand(node, place, index) for place in (0, 1, 2))
    condition = _truth(condition)
    if isinstance(condition, Number):
        return yes if condition.value else no
    if condition is None or not isinstance(yes, Number) or not isinstance(no, Number):
        return None
    if isinstance(condition, Select):
        chosen = [float((yes if each else no).value) for each in (condition.yes, condition.no)]
        return Select(condition.condition, *chosen)
    return Select(condition, float(yes.value), float(no.value))


@_looks("Add", "Sub", "Mul", "Max", "Min")
def _arithmetic(of: Elements, node: ir.Node, index: Indices) -> Element | None:
    if len(node.inputs) != 2:
        return None
    a, b = (of.operand(node, place, index) for place in (0, 1))
    if a is None or b is None:
        return None
    if isinstance(a, Number) and isinstance(b, Number):
        dtype = of._edit.dtype(node.outputs[0])
        return _rounded(_FLOATS[node.op_type](a.value, b.value), dtype)
    first, second = _as_index(a), _as_index(b)
    if first is not None and second is not None and node.op_type in _DIMS:
        return Index(_DIMS[node.op_type](first, second))
    for one, other, swapped in ((a, b, False), (b, a, True)):
        if isinstance(one, (*_CONDITIONS, Select)) and isinstance(other, Number):
            chosen = one if isinstance(one, Select) else Select(one, 1.0, 0.0)
            apply = _FLOATS[node.op_type]
            made = [
                float(apply(other.value, x) if swapped else apply(x, other.value))
                for x in (chosen.yes, chosen.no)
            ]
            return Select(chosen.condition, *made)
    return _joined(a, b) if node.op_type in ("Add", "Min") else None


def _joined(a: Element, b: Element) -> Element | None:
    """Two maps that hide by the same number: what either hides is hidden."""
    if not isinstance(a, Select) or not isinstance(b, Select):
        return None
    if (a.yes, b.yes) != (0.0, 0.0) or a.no >= 0 or a.no != b.no:
        return None
    terms: list[Element] = []
    for each in (a.condition, b.condition):
        terms += each.terms if isinstance(each, Both) else [each]
    return Select(Both(tuple(dict.fromkeys(terms))), 0.0, a.no)


_FLOATS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Max": max,
    "Min": min,
}
_DIMS: dict[str, Callable[[Dim, Dim], Dim]] = {"Add": add, "Sub": subtract, "Mul": multiply}
