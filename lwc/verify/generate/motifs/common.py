"""What motifs share: the sizes of the tiny model, operands in either order, head layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim, DimShape, lower_bound, symbol
from lwc.verify.generate.sketch import Sketch

__all__ = [
    "HEADS",
    "HEAD_SIZE",
    "WIDTH",
    "batch_and_length",
    "either",
    "ends_in",
    "extent",
    "fixed_end",
    "hidden",
    "positive",
    "row",
    "solid",
    "weighted",
]

WIDTH, HEADS, HEAD_SIZE = 8, 2, 4
"""The width of hidden states, and how attention divides it."""

ShapeTest = Callable[[DimShape], bool]


def ends_in(width: int) -> ShapeTest:
    """Return a test for shapes whose last extent is `width`."""
    return lambda shape: bool(shape) and isinstance(shape[-1], int) and shape[-1] == width


def fixed_end(shape: DimShape) -> bool:
    """Tell whether the last extent is a small number above zero."""
    return bool(shape) and isinstance(shape[-1], int) and 0 < shape[-1] <= 4 * WIDTH


def hidden(sketch: Sketch, rank: int | None = 3, least: int = 2) -> ir.Value:
    """Draw a float value whose last axis has the width of hidden states."""
    return sketch.pick(rank, least=least, where=ends_in(WIDTH))


def batch_and_length(sketch: Sketch) -> ir.Value:
    """Draw hidden states `[N, S, WIDTH]` with exactly the names of batch and length."""
    batch, length = symbol("N"), symbol("S")
    return sketch.pick(3, where=lambda s: s[0] == batch and s[1] == length and ends_in(WIDTH)(s))


def positive(sketch: Sketch, dim: Dim) -> bool:
    """Tell whether an extent is at least 1 where those of the inputs are."""
    if isinstance(dim, int):
        return dim >= 1
    if sketch.shapes.mentions_fresh(dim):
        return False
    bound = lower_bound(dim.subs({s: s + 1 for s in dim.free_symbols}))
    return bound is not None and bound >= 1


def solid(sketch: Sketch) -> ShapeTest:
    """Return a test for shapes with no axis that can be empty."""
    return lambda shape: all(positive(sketch, dim) for dim in shape)


def either(sketch: Sketch, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """Add a commutative node, its operands in either order."""
    return sketch.emit(op, b, a) if sketch.flip() else sketch.emit(op, a, b)


def row(sketch: Sketch, count: int, name: str = "scale", low: float = 0.5) -> ir.Value:
    """Add a positive row of constants, `[count]`, from `low` to `low + 1`."""
    rng = np.random.default_rng(sketch.integer(0, 7))
    return sketch.constant((rng.random(count) + low).astype(np.float32), name=name)


def weighted(sketch: Sketch, x: ir.Value, out: int | None = None) -> ir.Value:
    """Add a plain linear layer, with a bias or without."""
    width = sketch.shape(x)[-1]
    assert isinstance(width, int)
    count = out or width
    y = sketch.emit("MatMul", x, sketch.weight(width, count))
    return either(sketch, "Add", y, sketch.weight(count, name="bias")) if sketch.flip() else y


def extent(sketch: Sketch, x: ir.Value, axis: int, *, vector: bool = True) -> ir.Value:
    """Add the computation of one extent, `[1]` or a scalar, as exporters spell it."""
    form = sketch.choose("gather", "slice", "start")
    if form == "start":
        if axis < 0:
            axis += sketch.rank(x)
        one: Any = sketch.emit("Shape", x, start=axis, end=axis + 1) if sketch.opset >= 15 else None
        if one is not None:
            return one if vector else sketch.emit("Squeeze", one, sketch.ints(0))
        form = "gather"
    shape = sketch.extents(x)
    if form == "slice":
        end = 2**63 - 1 if axis == -1 else axis + 1
        one = sketch.emit("Slice", shape, sketch.ints(axis), sketch.ints(end), sketch.ints(0))
        return one if vector else sketch.emit("Squeeze", one, sketch.ints(0))
    scalar = sketch.emit("Gather", shape, sketch.constant(axis, name="indices"), axis=0)
    return sketch.emit("Unsqueeze", scalar, sketch.ints(0)) if vector else scalar
