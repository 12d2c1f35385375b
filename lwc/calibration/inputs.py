"""What a graph input means: token ids, a mask, positions, a choice, an image, plain numbers.

What an integer may be is read from the dataflow: an input that indexes a table is an id below the
table's rows; one that is compared with constants takes their values. Where the dataflow says
nothing, two guesses are made by name (`position`, `mask`), and a third for audio (`sr`,
`sample_rate`, `sampling_rate` is 16000).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lwc.core.walk import attribute_graphs, constant_tensor, op_name
from lwc.core.weights import reading

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = [
    "InputRole",
    "RoleKind",
    "embedded_ids",
    "fed_inputs",
    "input_role",
    "misfit",
    "shown_shape",
    "wanted",
]


class RoleKind(Enum):
    """What the elements of an input stand for."""

    IDS = "ids"
    """Integers in `[low, high]`."""
    POSITIONS = "positions"
    """0, 1, 2, … along the last axis, at most `high`."""
    MASK = "mask"
    """Ones (true)."""
    FLAG = "flag"
    """A single boolean; false."""
    IMAGE = "image"
    """Numbers in `[0, 1]`, `[batch, channels, height, width]`."""
    NUMBERS = "numbers"
    """Normally distributed numbers."""
    TEXT = "text"
    """Strings."""


@dataclass(frozen=True)
class InputRole:
    """The meaning of one input and the bounds of its integers."""

    kind: RoleKind
    low: int = 0
    high: int = 0


_TRANSPARENT = {
    "Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip
"""Operators whose first input's elements come out unchanged, if only some of them."""

_WHOLE = _TRANSPARENT - {"Slice"}

_RESHAPING = _TRANSPARENT - {"Cast", "Identity"}

_TABLES = {
    ("Gather", 1): (0, "axis"),
    ("com.microsoft::GatherBlockQuantized", 1): (0, "gather_axis"),
    ("com.microsoft::EmbedLayerNormalization", 0): (2, None),
    ("com.microsoft::EmbedLayerNormalization", 1): (4, None),
    ("com.microsoft::EmbedLayerNormalization", 7): (3, None),
}
"""(operator, input that holds indices) -> (input that holds the table, attribute of its axis)."""

_COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}

_SAMPLE_RATES = {"sr", "sample_rate", "sampling_rate"}
_SAMPLE_RATE = 16000


def fed_inputs(module: Module) -> list[ir.Value]:
    """Return the graph inputs a feed must have: those without a default value."""
    return [value for value in module.graph.inputs if value.const_value is None]


def misfit(value: ir.Value, array: object) -> str | None:
    """Say what type or shape that a graph input does not take is fed to it, or return None."""
    if value.dtype is None or not isinstance(array, np.ndarray):
        return None  # sequences, maps and optionals go to the backend as they are
    if array.dtype.kind in "OUS":
        if value.dtype != ir.DataType.STRING:
            return "of strings"
    elif array.dtype != value.dtype.numpy():
        return f"of type {array.dtype}"
    if value.shape is None:
        return None
    fits = array.ndim == len(value.shape) and all(
        not isinstance(want, int) or want < 0 or want == have
        for want, have in zip(value.shape, array.shape, strict=True)
    )
    return None if fits else f"of shape {list(array.shape)}"


def wanted(value: ir.Value) -> str:
    """Return the type and shape of a graph input, for people."""
    kind = "an array" if value.dtype is None else f"{value.dtype.name.lower()}"
    return f"{kind}{shown_shape(value)}"


def shown_shape(value: ir.Value) -> str:
    """Return the shape of a graph input, for people, behind a space; nothing if it has none."""
    if value.shape is None:
        return ""
    dims = ", ".join(str(d) if isinstance(d, int) else str(d.value or "?") for d in value.shape)
    return f" [{dims}]"


def input_role(module: Module, value: ir.Value) -> InputRole:
    """Find out what the elements of the graph input `value` stand for."""
    dtype, name = value.dtype, (value.name or "").lower()
    rank = None if value.shape is None else len(value.shape)
    if dtype == ir.DataType.STRING:
        return InputRole(RoleKind.TEXT)
    if dtype == ir.DataType.BOOL:
        return InputRole(RoleKind.MASK if rank else RoleKind.FLAG)
    if dtype is None or dtype.is_floating_point():
        if "mask" in name:
            return InputRole(RoleKind.MASK)
        return InputRole(RoleKind.IMAGE if rank == 4 else RoleKind.NUMBERS)
    bounds = list(_integer_bounds(module, value))
    low = max((low for low, _ in bounds), default=0)
    high = min((high for _, high in bounds), default=np.iinfo(np.int32).max)
    if "position" in name:
        return InputRole(RoleKind.POSITIONS, high=high)
    if bounds:
        return InputRole(RoleKind.IDS, low, max(low, high))
    if name in _SAMPLE_RATES:
        return InputRole(RoleKind.IDS, _SAMPLE_RATE, _SAMPLE_RATE)
    return InputRole(RoleKind.MASK)


def embedded_ids(module: Module, value: ir.Value) -> int | None:
    """Return the number of ids if all elements of a graph input look up a constant matrix.

    ONNX has negative indices count from the end, which no id means. What picks rows of an
    activation may do so, and so may positions: the answer is None.
    """
    if value.dtype is None or not value.dtype.is_integer() or "position" in (value.name or ""):
        return None
    tables = [
        _embedding_rows(node, *_TABLES[op, index])
        for node, op, index in _uses(module, value, _WHOLE)
        if (op, index) in _TABLES
    ]
    return min((rows for rows in tables if rows), default=None)


def _integer_bounds(module: Module, value: ir.Value) -> Iterator[tuple[int, int]]:
    """Yield what each use says about the integers in `value`, as inclusive bounds."""
    for node, op, index in _uses(module, value, _TRANSPARENT | {"Gather"}):
        if (op, index) in _TABLES:
            rows = _table_rows(node, *_TABLES[op, index])
            if rows:
                yield 0, rows - 1
        elif op in _COMPARISONS:
            yield from _compared(node.inputs[1 - index])


def _uses(
    module: Module, value: ir.Value, through: Container[str]
) -> Iterator[tuple[ir.Node, str, int]]:
    """Yield what reads a value, also behind some operators: node, operator, place of the input."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for use in current.uses():
            node, index = use.node, use.idx
            op = op_name(node)
            function = module.model.functions.get(node.op_identifier())
            if function is not None:
                stack.append(function.inputs[index])
            elif index == 0 and op in through:
                stack.append(node.outputs[0])
            else:
                yield node, op, index


def _embedding_rows(node: ir.Node, table_index: int, axis_name: str | None) -> int | None:
    """Return the rows of the table, if it is, or is computed from, a constant matrix."""
    axis = 0 if axis_name is None else node.attributes.get_int(axis_name, 0)
    if axis:
        return None
    table = node.inputs[table_index]
    while (tensor := constant_tensor(table)) is None:
        producer = None if table is None else table.producer()
        if producer is None or not producer.inputs or producer.op_type in _RESHAPING:
            return None
        table = producer.inputs[0]
    return tensor.shape.numpy()[0] if len(tensor.shape) > 1 else None


def _table_rows(node: ir.Node, table_index: int, axis_name: str | None) -> int | None:
    axis = 0 if axis_name is None else node.attributes.get_int(axis_name, 0)
    return _rows(node.inputs[table_index], axis)


def _rows(table: ir.Value | None, axis: int) -> int | None:
    while table is not None:
        constant = constant_tensor(table)
        shape = table.shape if constant is None else constant.shape
        if shape is not None and -len(shape) <= axis < len(shape):
            rows = shape[axis]
            if isinstance(rows, int):
                return rows
        producer = table.producer()
        if producer is None or not producer.inputs or producer.op_type in _RESHAPING:
            return None
        branches = list(attribute_graphs(producer))
        if branches:
            if producer.op_type != "If":
                return None
            place = table.index()
            assert place is not None
            either = [_rows(branch.outputs[place], axis) for branch in branches]
            return min((rows for rows in either if rows is not None), default=None)
        table = producer.inputs[0]  # dequantization and scaling keep the table's rows
    return None


def _compared(other: ir.Value | None) -> Iterator[tuple[int, int]]:
    tensor = constant_tensor(other)
    if tensor is not None and 0 < math.prod(tensor.shape.numpy()) <= 1 << 20:
        with reading(tensor) as array:
            if array.dtype.kind in "iu":
                yield int(array.min()), int(array.max())
