"""Rotary embeddings as one operator: tables, positions, and the two forms."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim
from lwc.passes.attention.elements import Read
from lwc.passes.attention.rotary_turns import AXES, Rotation
from lwc.passes.attention.rotary_waves import Known, Wave, evaluate
from lwc.rewrite import Editor, Miss

__all__ = ["Form", "Tables", "against", "write_rotation"]

Form: TypeAlias = Literal["auto", "standard", "contrib"]
Array: TypeAlias = np.ndarray[Any, Any]

STANDARD_OPSET = 23
_MS = "com.microsoft"


@dataclass
class Tables:
    """Tables of cosines and sines, one initializer for each content.

    Attributes:
        edit: The editor they are made with.
        waves: Waves read with it.
    """

    edit: Editor
    waves: Known = field(default_factory=dict)
    _made: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)
    _read: dict[tuple[Any, ...], tuple[Array, Array]] = field(default_factory=dict)

    def compute(self, rotation: Rotation, count: int) -> tuple[Array, Array] | Miss:
        """Return cosines and sines `[count, turned / 2]` of positions from 0 on."""
        key = (rotation.cos, rotation.sin, count)
        found = self._read.get(key)
        if found is None:
            positions = np.arange(count, dtype=np.int64)
            known: dict[Wave, Array] = {}
            columns: list[Array] = []
            for waves in (rotation.cos, rotation.sin):
                columns.append(_columns(waves, positions, known))
            found = self._read[key] = columns[0], columns[1]
        cos, sin = found
        if not (np.all(cos[0] > 0) and np.all(sin[0] == 0)):
            return Miss("at position 0 it turns: tables of cosines and sines do not begin so")
        if not (np.isfinite(cos).all() and np.isfinite(sin).all()):
            return Miss("its tables hold infinities")
        return found

    def value(self, table: Array, dtype: ir.DataType, name: str) -> ir.Value:
        """Return an initializer that holds a table."""
        content = np.ascontiguousarray(table.astype(dtype.numpy()))
        key = (dtype, content.shape, hashlib.sha256(content.tobytes()).digest())
        found = self._made.get(key)
        if found is None or found.graph is not self.edit.module.graph:
            found = self.edit.constant(self.edit.module.spilled(ir.Tensor(content)), name)
            self._made[key] = found
        return found


def _columns(waves: tuple[Wave, ...], positions: Array, known: dict[Wave, Array]) -> Array:
    return np.stack([np.asarray(evaluate(wave, positions, known)) for wave in waves], axis=1)


def against(rotation: Rotation, form: Form, edit: Editor) -> str | None:
    """Tell why a form cannot express a rotation; None where it can."""
    root, shape = edit.root, edit.shape(rotation.source)
    assert root is not None
    assert shape is not None
    if form == "standard" and edit.opset(root) < STANDARD_OPSET:
        return f"the standard form needs opset {STANDARD_OPSET}"
    partial = rotation.turned < int(shape[-1])
    if not isinstance(_heads(rotation, shape), int) and (partial or rotation.layout == "mixed"):
        return "the number of heads is not known"
    if rotation.offset is not None:
        return None
    value, index = _place(rotation)
    if edit.is_constant(value):
        return "its positions begin where it is not known"
    extents, axis = edit.shape(value), rotation.length_axis
    if extents is None or any(at == 0 and dim != 1 for at, dim in zip(index, extents, strict=True)):
        return "its positions are not all of a tensor"
    batch, length = AXES[0], AXES[axis]
    if [at for at in index if at != 0] not in ([], [batch, length], [batch], [length]):
        return "its positions are no tensor of batch and length"
    return None


def _heads(rotation: Rotation, shape: tuple[Dim, ...]) -> Dim:
    return shape[1 if rotation.layout == "apart" else 2] if len(shape) == 4 else 1


def _place(rotation: Rotation) -> tuple[ir.Value, tuple[Dim, ...]]:
    """Return the tensor that holds the positions, and the index of a token's."""
    position = rotation.position
    if isinstance(position.element, Read):
        return position.element.value, position.element.index
    return position.value, position.index


def write_rotation(
    rotation: Rotation, tables: tuple[ir.Value, ir.Value], form: Form, edit: Editor
) -> ir.Value:
    """Write a rotation that nothing is `against`; return a value of its source's shape.

    Args:
        rotation: What was read.
        tables: Cosines and sines `[positions, turned / 2]`, of the source's type.
        form: `contrib` or `standard`; `auto` takes the standard one from opset 23 on.
        edit: Writes before its root.
    """
    root, shape = edit.root, edit.shape(rotation.source)
    assert root is not None
    assert shape is not None
    standard = edit.opset(root) >= STANDARD_OPSET if form == "auto" else form == "standard"
    heads, size = _heads(rotation, shape), int(shape[-1])
    x, flat = rotation.source, rotation.layout == "mixed" and len(shape) == 4
    if flat:
        width = edit.constant(np.array([0, 0, heads * size], np.int64), "width")
        x = edit.op("Reshape", [x, width])
    attributes: dict[str, Any] = {"interleaved": int(rotation.interleaved)}
    if rotation.turned < size:
        attributes["rotary_embedding_dim"] = rotation.turned
    if rotation.turned < size or rotation.layout == "mixed":
        attributes["num_heads"] = heads
    offset = rotation.offset
    if standard:
        positions = _positions(rotation, shape, edit)
        y = edit.op("RotaryEmbedding", [x, *tables, positions], attributes)
    else:
        first = None if offset is None else edit.constant([offset], "first_position")
        positions = first or _positions(rotation, shape, edit)
        y = edit.op("RotaryEmbedding", [x, positions, *tables], attributes, domain=_MS)
    if flat:
        apart = edit.constant(np.array([0, 0, heads, size], np.int64), "heads_shape")
        y = edit.op("Reshape", [y, apart])
    return y


def _positions(rotation: Rotation, shape: tuple[Dim, ...], edit: Editor) -> ir.Value:
    """Return positions, int64 `[batch, length]`."""
    axis, offset = rotation.length_axis, rotation.offset
    wanted = AXES[0], AXES[axis]
    if offset is None:
        value, index = _place(rotation)
    else:
        value, index = _counted(rotation, axis, offset, edit), (AXES[axis],)
    dtype = edit.dtype(value)
    away = [n for n, at in enumerate(index) if at == 0]
    if away:
        value = edit.op("Squeeze", [value, edit.constant(away, "axes")])
    if dtype != ir.DataType.INT64:
        value = edit.op("Cast", [value], {"to": int(ir.DataType.INT64)})
    new = [n for n, each in enumerate(wanted) if each not in index]
    if new:
        value = edit.op("Unsqueeze", [value, edit.constant(new, "axes")])
    own = edit.shape(value)
    batch, length = shape[0], shape[axis]
    if own is not None and edit.same_dim(own[0], batch) and edit.same_dim(own[1], length):
        return value
    extents = edit.op("Shape", [rotation.source])
    which = edit.constant([0, axis], "axes")
    return edit.op("Expand", [value, edit.op("Gather", [extents, which], {"axis": 0})])


def _counted(rotation: Rotation, axis: int, offset: int, edit: Editor) -> ir.Value:
    """Return positions `[length]`, counted up from a number."""
    first, one = (edit.constant(np.array(n, np.int64), "number") for n in (offset, 1))
    place = edit.constant(np.array(axis, np.int64), "axis")
    last = edit.op("Gather", [edit.op("Shape", [rotation.source]), place], {"axis": 0})
    if offset:
        last = edit.op("Add", [last, first])
    return edit.op("Range", [first, last, one])
