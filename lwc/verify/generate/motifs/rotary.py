"""Rotary positions in every spelling: halves and pairs, partial, computed and looked up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import HEADS, batch_and_length, either, extent, weighted
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS"]

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
SIZE, ROWS, LAST = 8, 24, 2**63 - 1


def _named(sketch: Sketch, name: str) -> ir.Value:
    for value in sketch.module.graph.inputs:
        if value.name == name:
            return value
    return sketch.input(["N", "S"], INT64, name=name)


def _positions(sketch: Sketch, x: ir.Value) -> ir.Value:
    """Return integer positions `[1, S]` or `[N, S]`, none below 0."""
    form = sketch.choose("range", "shifted", "input", "mask")
    if form == "input":
        return _named(sketch, "position_ids")
    if form == "mask":
        mask = _named(sketch, "attention_mask")
        count = sketch.emit("CumSum", mask, sketch.constant(1))
        places = sketch.emit("Sub", count, sketch.constant(1))
        hidden = sketch.emit("Equal", mask, sketch.constant(0))
        return sketch.emit("Where", hidden, sketch.constant(1), places)
    begin, step = sketch.constant(0), sketch.constant(1)
    places = sketch.emit("Range", begin, extent(sketch, x, 1, vector=False), step)
    if form == "shifted":
        places = either(sketch, "Add", places, sketch.constant(sketch.choose(1, 3)))
    return sketch.emit("Unsqueeze", places, sketch.ints(0))


def _angles(sketch: Sketch, places: ir.Value, count: int) -> ir.Value:
    """Return positions times frequencies, `[1 or N, S, count]`."""
    frequencies = (10.0 ** -np.arange(count)).astype(np.float32)
    if sketch.flip():
        wide = sketch.cast(sketch.emit("Unsqueeze", places, sketch.ints(2)), FLOAT)
        return either(sketch, "Mul", wide, sketch.constant(frequencies, name="frequencies"))
    column = sketch.constant(frequencies.reshape(1, count, 1), name="frequencies")
    wide = sketch.cast(sketch.emit("Unsqueeze", places, sketch.ints(1)), FLOAT)
    return sketch.emit("Transpose", sketch.emit("MatMul", column, wide), perm=[0, 2, 1])


def _waves(sketch: Sketch, x: ir.Value, count: int) -> list[ir.Value]:
    """Return cosines and sines, `[1 or N, S, count]`."""
    places = _positions(sketch, x)
    if sketch.rarely():
        rows = np.arange(ROWS)[:, None] * 10.0 ** -np.arange(count)
        tables = [sketch.constant(f(rows), name="table") for f in (np.cos, np.sin)]
        return [sketch.emit("Gather", table, places, axis=0) for table in tables]
    angles = _angles(sketch, places, count)
    waves = [sketch.emit(op, angles) for op in ("Cos", "Sin")]
    if sketch.rarely():
        waves = [sketch.emit("Mul", each, sketch.constant(np.float32(1.25))) for each in waves]
    if sketch.rarely():
        waves.reverse()
    return waves


def _parts(sketch: Sketch, x: ir.Value, first: int, second: int) -> list[ir.Value]:
    """Cut the last axis in two."""
    if sketch.flip():
        return sketch.emit_all("Split", x, sketch.ints(first, second), outputs=2, axis=-1)
    axes = sketch.ints(sketch.choose(3, -1))
    middle = sketch.ints(first)
    return [
        sketch.emit("Slice", x, sketch.ints(0), middle, axes),
        sketch.emit("Slice", x, middle, sketch.ints(LAST), axes),
    ]


def _pairs(sketch: Sketch, x: ir.Value, size: int) -> list[ir.Value]:
    """Return the even and the odd elements of the last axis."""
    if sketch.flip():
        shaped = sketch.reshape(x, 0, 0, 0, size // 2, 2)
        return [sketch.emit("Gather", shaped, sketch.constant(n), axis=-1) for n in (0, 1)]
    axis, step = sketch.ints(-1), sketch.ints(2)
    return [sketch.emit("Slice", x, sketch.ints(n), sketch.ints(LAST), axis, step) for n in (0, 1)]


def _woven(sketch: Sketch, parts: Sequence[ir.Value], size: int) -> ir.Value:
    """Let the elements of two parts follow each other in turn."""
    axis = sketch.ints(-1)
    joined = sketch.emit("Concat", *(sketch.emit("Unsqueeze", p, axis) for p in parts), axis=-1)
    return sketch.reshape(joined, 0, 0, 0, size)


def _joined(sketch: Sketch, parts: Sequence[ir.Value], size: int, *, pairs: bool) -> ir.Value:
    return _woven(sketch, parts, size) if pairs else sketch.emit("Concat", *parts, axis=-1)


def _twice(sketch: Sketch, wave: ir.Value, size: int, *, pairs: bool) -> ir.Value:
    """Repeat what holds for a pair for both of its elements, `[…, 1, size]`."""
    if not pairs:
        return sketch.emit("Concat", wave, wave, axis=-1)
    wide = sketch.emit("Unsqueeze", wave, sketch.ints(-1))
    if sketch.flip():
        wide = sketch.emit("Tile", wide, sketch.ints(1, 1, 1, 1, 2))
    else:
        wide = sketch.emit("Concat", wide, wide, axis=-1)
    return sketch.reshape(wide, 0, 0, 0, size)


def _turned(sketch: Sketch, x: ir.Value, waves: Sequence[ir.Value], size: int) -> ir.Value:
    pairs = sketch.flip()
    low, high = _pairs(sketch, x, size) if pairs else _parts(sketch, x, size // 2, size // 2)
    if sketch.rarely():
        low, high = high, low
    if sketch.flip():
        cos, sin = (_twice(sketch, wave, size, pairs=pairs) for wave in waves)
        other = _joined(sketch, (sketch.emit("Neg", high), low), size, pairs=pairs)
        left, right = either(sketch, "Mul", x, cos), either(sketch, "Mul", other, sin)
        return either(sketch, "Add", left, right)
    cos, sin = waves
    first = sketch.emit("Sub", either(sketch, "Mul", low, cos), either(sketch, "Mul", high, sin))
    second = either(
        sketch, "Add", either(sketch, "Mul", low, sin), either(sketch, "Mul", high, cos)
    )
    return _joined(sketch, (first, second), size, pairs=pairs)


def spelled(sketch: Sketch) -> ir.Value:
    """Turn the heads of a linear layer; `[N, H, S, size]` or `[N, S, H, size]`."""
    x = batch_and_length(sketch)
    heads = sketch.reshape(weighted(sketch, x, HEADS * SIZE), 0, 0, HEADS, SIZE)
    apart = sketch.choose(True, False)
    if apart:
        heads = sketch.emit("Transpose", heads, perm=[0, 2, 1, 3])
    size = SIZE // 2 if sketch.flip() else SIZE
    axis = sketch.ints(1 if apart else 2)
    waves = [sketch.emit("Unsqueeze", wave, axis) for wave in _waves(sketch, x, size // 2)]
    if size == SIZE:
        return _turned(sketch, heads, waves, size)
    turned, rest = _parts(sketch, heads, size, SIZE - size)
    return sketch.emit("Concat", _turned(sketch, turned, waves, size), rest, axis=-1)


MOTIFS = (Motif("rotary-spellings", spelled),)
