"""What one element of a value is, as an expression of its index.

Exporters compute masks with dozens of operators: ranges, comparisons, gathers, broadcasts. Read
element by element all of that is short: the mask of a causal decoder at query `i` and key `j` is
`j - i <= 0 and padding[b, j]`, whatever produced it. Indices are sympy expressions in index
variables and the extents of the model.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import sympy

from lwc.core.dims import Dim, subtract
from lwc.passes.attention.element_kinds import (
    AtMost,
    Both,
    Element,
    Index,
    Indices,
    Never,
    Number,
    Read,
    Select,
)
from lwc.passes.attention.element_logic import COMPUTES
from lwc.passes.attention.element_views import PICKS, split

if TYPE_CHECKING:
    from lwc.rewrite import Editor

__all__ = ["AtMost", "Both", "Element", "Elements", "Index", "Never", "Number", "Read", "Select"]

_BUDGET = 2000
"""Elements looked at per question."""

_TABLE_BYTES = 64 << 20
_OPERATORS = PICKS | COMPUTES


class Elements:
    """Answers what an element of a value is.

    Args:
        edit: Knows shapes and constants.
        stops: Values whose elements are read as such, whatever they are made of.

    Attributes:
        extents: What index variables stay below: the extents of the first axes they count.
    """

    def __init__(self, edit: Editor, stops: Container[ir.Value] = ()) -> None:
        self.edit = edit
        self.extents: dict[Dim, Dim] = {}
        self._stops = stops
        self._known: dict[tuple[ir.Value, Indices], Element] = {}
        self._left = _BUDGET

    def at(self, value: ir.Value, index: Indices) -> Element:
        """Return the element of `value` at `index`, one expression per axis."""
        key = (value, index)
        found = self._known.get(key)
        if found is None:
            self._left -= 1
            for at, dim in zip(index, self.shape(value) or (), strict=False):
                if isinstance(at, sympy.Symbol):
                    self.extents.setdefault(at, dim)
            found = self._look(value, index) if self._left > 0 else None
            found = Read(value, index) if found is None else found
            self._known[key] = found
        return found

    def _look(self, value: ir.Value, index: Indices) -> Element | None:
        if value in self._stops:
            return None
        if self.edit.is_constant(value):
            return self._constant(value, index)
        content = self.edit.symbolic(value)
        if content is not None and len(content) == 1:
            return _known(content[0])
        node = value.producer()
        if node is None or node.domain:
            return None
        if any(each.is_ref() for each in node.attributes.values()):
            return None
        if node.op_type == "Split":
            return split(self, node, node.outputs.index(value), index)
        if value is not node.outputs[0]:
            return None
        look = _OPERATORS.get(node.op_type)
        return None if look is None else look(self, node, index)

    def _constant(self, value: ir.Value, index: Indices) -> Element | None:
        number = self.edit.scalar(value)
        if number is not None:
            return Number(number)
        tensor = self.edit.tensor(value)
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
        shape = self.edit.shape(value)
        return None if shape is None else tuple(shape)

    def constants(self, value: ir.Value | None) -> list[int] | None:
        """Return the content of a vector of known integers."""
        return self.edit.ints(value)

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
            elif self.edit.same_dim(dim, of):
                own.append(at)
            else:
                return None
        return self.at(value, tuple(own))

    def scalar(self, value: ir.Value | None) -> Element | None:
        """Return the only element of a value of at most one."""
        shape = self.shape(value)
        if value is None or shape is None or any(dim != 1 for dim in shape):
            return None
        content = self.edit.symbolic(value)
        if content is not None and len(content) == 1:
            return _known(content[0])
        return self.at(value, (0,) * len(shape))

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the rank of a value where it is known."""
        return self.edit.rank(value)


def _known(content: Dim | float) -> Element:
    """Return the only element of a small tensor, integer or not."""
    return Number(content) if isinstance(content, float) else Index(content)


def _band(tensor: ir.TensorProtocol, index: Indices) -> Element | None:
    """Read a constant that has one number in a band along the diagonal and another outside."""
    free = [axis for axis, each in enumerate(index) if not isinstance(each, int)]
    if len(free) != 2:
        return None
    array = tensor.numpy()[tuple(i if isinstance(i, int) else slice(None) for i in index)]
    rows, columns = array.shape
    if array.size == 0 or array.dtype.kind not in "bfiu" or np.isnan(array[0, 0]):
        return None
    first = array[0, 0]
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
