"""Attention with every choice of an exporter drawn apart: heads, sharing, scales, masks, guards.

What fuses attention must tell those that mean the same from those that nearly do: rows that are
hidden as a whole, numbers that do not hide, axes that broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import either, extent
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["JOINED", "MOTIFS"]

FLOAT, FLOAT16, INT64, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT64,
    ir.DataType.BOOL,
)
Extent = int | str
_BATCHES: tuple[Extent, ...] = ("N", "N", 2, 1)
_LENGTHS: tuple[Extent, ...] = ("S", "S", 3, 1)
_OTHERS: tuple[Extent, ...] = ("T", 2, 1)
Mask = Callable[[Sketch, "_Sizes", ir.Value], ir.Value]


@dataclass(frozen=True)
class _Sizes:
    batch: Extent
    heads: int
    groups: int
    queries: Extent
    keys: Extent
    size: int
    dtype: ir.DataType
    low: float


def _number(sketch: Sketch, sizes: _Sizes, number: float) -> ir.Value:
    with np.errstate(over="ignore"):
        array = np.full(sketch.choose((), (1,)), number, sizes.dtype.numpy())
    return sketch.constant(array, sizes.dtype, name="number")


def _sizes(sketch: Sketch) -> _Sizes:
    heads = sketch.choose(2, 4)
    queries = sketch.choose(*_LENGTHS)
    keys = sketch.choose(*_OTHERS) if sketch.rarely() else queries
    dtype = sketch.choose(FLOAT16, ir.DataType.DOUBLE) if sketch.rarely() else FLOAT
    groups = sketch.choose(heads, heads, 2, 1)
    lowest = float(np.finfo(dtype.numpy()).min)
    low = sketch.choose(lowest, -math.inf, -1e9, -10000.0)
    size = sketch.choose(8, 4)
    return _Sizes(sketch.choose(*_BATCHES), heads, groups, queries, keys, size, dtype, low)


# Heads


def _heads(sketch: Sketch, sizes: _Sizes, count: int, length: Extent) -> ir.Value:
    """Make heads `[batch, count, length, size]`; rarely batch or heads are 1 and broadcast."""
    batch = sizes.batch
    if sketch.rarely():
        batch, count = (1, count) if sketch.flip() else (batch, 1)
    if sketch.flip():
        return sketch.input([batch, count, length, sizes.size], sizes.dtype, name="heads")
    flat = sketch.input([batch, length, count * sizes.size], sizes.dtype, name="states")
    if sketch.flip():
        weight = sketch.weight(count * sizes.size, count * sizes.size, dtype=sizes.dtype)
        flat = sketch.emit("MatMul", flat, weight)
    apart = sketch.reshape(flat, 0, 0, count, sizes.size)
    return sketch.emit("Transpose", apart, perm=[0, 2, 1, 3])


def _packed(sketch: Sketch, sizes: _Sizes) -> list[ir.Value]:
    """Make queries, keys and values of one value, cut by Split."""
    widths = [count * sizes.size for count in (sizes.heads, sizes.groups, sizes.groups)]
    flat = sketch.input([sizes.batch, sizes.queries, sum(widths)], sizes.dtype, name="states")
    parts = sketch.emit_all("Split", flat, sketch.ints(*widths), outputs=3, axis=-1)
    counts = (sizes.heads, sizes.groups, sizes.groups)
    return [
        sketch.emit("Transpose", sketch.reshape(part, 0, 0, count, sizes.size), perm=[0, 2, 1, 3])
        for part, count in zip(parts, counts, strict=True)
    ]


def _repeated(sketch: Sketch, sizes: _Sizes, x: ir.Value) -> ir.Value:
    """Repeat heads, one after the other as in grouped attention, or in turns."""
    shape = sketch.shape(x)
    if sizes.groups == sizes.heads or shape[1] != sizes.groups:
        return x
    times = sizes.heads // sizes.groups
    turns = sketch.rarely()
    wide = sketch.emit("Unsqueeze", x, sketch.ints(1 if turns else 2))
    factor = [1, times, 1, 1, 1] if turns else [1, 1, times, 1, 1]
    wide = sketch.emit("Expand", wide, sketch.ints(*factor))
    parts = [extent(sketch, x, 0), sketch.ints(sizes.heads), extent(sketch, x, 2)]
    return sketch.emit(
        "Reshape", wide, sketch.emit("Concat", *parts, sketch.ints(sizes.size), axis=0)
    )


# Masks


def _places(sketch: Sketch, of: ir.Value, axis: int) -> ir.Value:
    """Count an axis of scores: `[extent]`."""
    begin, step = sketch.constant(0), sketch.constant(1)
    return sketch.emit("Range", begin, extent(sketch, of, axis, vector=False), step)


def _square(sketch: Sketch, scores: ir.Value) -> ir.Value:
    """Make the condition of a causal mask, a window, both, or one that is near."""
    keys = _places(sketch, scores, -1)
    rows = sketch.emit("Unsqueeze", _places(sketch, scores, -2), sketch.ints(1))
    form = sketch.choose("causal", "causal", "window", "both", "band", "shifted")
    if form == "band":
        behind = sketch.emit("Sub", rows, keys)
        return sketch.emit("Less", behind, sketch.constant(2))
    if form == "shifted":
        return sketch.emit("Less", keys, either(sketch, "Add", rows, sketch.constant(2)))
    causal = (
        sketch.emit("LessOrEqual", keys, rows)
        if sketch.flip()
        else sketch.emit("Not", sketch.emit("Greater", keys, rows))
    )
    if form == "causal":
        return causal
    window = sketch.emit("Greater", keys, sketch.emit("Sub", rows, sketch.constant(2)))
    if form == "window":
        return window
    return either(sketch, "And", causal, window)


def _padding(sketch: Sketch, sizes: _Sizes, scores: ir.Value) -> ir.Value:
    """Make the condition of a padding mask, `[batch, 1, 1, keys]`."""
    dtype = sketch.choose(BOOL, INT64, FLOAT)
    batch = 1 if sketch.rarely() else sizes.batch
    mask = sketch.input([batch, sizes.keys], dtype, name="shown")
    if dtype != BOOL:
        mask = (
            sketch.cast(mask, BOOL)
            if sketch.flip()
            else sketch.emit(
                "Not", sketch.emit("Equal", mask, sketch.constant(np.zeros((), dtype.numpy())))
            )
        )
    if sketch.flip():
        return sketch.emit("Unsqueeze", mask, sketch.ints(1, 2))
    if sketch.flip():
        return sketch.reshape(mask, 0, 1, 1, -1)
    rows = sketch.emit("Unsqueeze", _places(sketch, mask, 0), sketch.ints(1, 2, 3))
    columns = sketch.emit("Unsqueeze", _places(sketch, mask, 1), sketch.ints(0, 1, 2))
    zero = sketch.constant(np.zeros((1, 1, 1, 1), np.int64))
    last = sketch.ints(-1)
    pair = [
        sketch.emit("Unsqueeze", sketch.emit("Add", each, zero), last)
        for each in (
            sketch.emit("Add", rows, sketch.emit("Mul", columns, sketch.constant(0))),
            sketch.emit("Add", columns, sketch.emit("Mul", rows, sketch.constant(0))),
        )
    ]
    return sketch.emit("GatherND", mask, sketch.emit("Concat", *pair, axis=-1))


def _is_infinite(sizes: _Sizes) -> bool:
    """Tell whether what hides is minus infinity as a number of its type."""
    with np.errstate(over="ignore"):
        return bool(np.isinf(np.asarray(sizes.low).astype(sizes.dtype.numpy())))


def _by_condition(sketch: Sketch, sizes: _Sizes, scores: ir.Value) -> ir.Value:
    form = sketch.choose("square", "padding", "both")
    conditions = []
    if form != "padding":
        conditions.append(_square(sketch, scores))
    if form != "square":
        conditions.append(_padding(sketch, sizes, scores))
    shown = conditions[0]
    if len(conditions) > 1:
        shown = either(sketch, "And", *conditions)
    low = _number(sketch, sizes, sizes.low)
    place = sketch.choose("added", "replaced", "swapped")
    if place == "replaced":
        return sketch.emit("Where", shown, scores, low)
    if place == "swapped":
        return sketch.emit("Where", sketch.emit("Not", shown), low, scores)
    # What is shown would be minus infinity times 0.
    if _is_infinite(sizes) or sketch.flip():
        zero = _number(sketch, sizes, 0)
        return either(sketch, "Add", scores, sketch.emit("Where", shown, zero, low))
    hidden = sketch.emit("Sub", _number(sketch, sizes, 1), sketch.cast(shown, sizes.dtype))
    return either(sketch, "Add", scores, either(sketch, "Mul", hidden, low))


def _by_bias(sketch: Sketch, sizes: _Sizes, scores: ir.Value) -> ir.Value:
    """Add numbers that are fed, or grow with the distance; any axis may be 1."""
    if sketch.flip():
        axes: list[Extent] = [sizes.batch, sizes.heads, sizes.queries, sizes.keys]
        shape = [1 if sketch.rarely() else axis for axis in axes][sketch.choose(0, 1, 2) :]
        return either(sketch, "Add", scores, sketch.input(shape, sizes.dtype, name="bias"))
    keys = _places(sketch, scores, -1)
    rows = sketch.emit("Unsqueeze", _places(sketch, scores, -2), sketch.ints(1))
    distance = sketch.cast(sketch.emit("Sub", keys, rows), sizes.dtype)
    slopes = sketch.weight(sizes.heads, 1, 1, dtype=sizes.dtype)
    return either(sketch, "Add", scores, sketch.emit("Mul", slopes, distance))


def _by_table(sketch: Sketch, sizes: _Sizes, scores: ir.Value) -> ir.Value:
    """Cut a causal mask out of a table, as GPT-2 does."""
    table = np.tri(8, dtype=bool)[None, None]
    ends = sketch.emit("Concat", extent(sketch, scores, -2), extent(sketch, scores, -1), axis=0)
    cut = sketch.emit("Slice", sketch.constant(table), sketch.ints(0, 0), ends, sketch.ints(2, 3))
    return sketch.emit("Where", cut, scores, _number(sketch, sizes, sizes.low))


# Together


def _scaled(sketch: Sketch, sizes: _Sizes, x: ir.Value) -> ir.Value:
    if sketch.flip():
        return x
    if sketch.flip():
        return sketch.emit("Div", x, _number(sketch, sizes, 1.7))
    return either(sketch, "Mul", x, _number(sketch, sizes, 0.6))


def _softmax(sketch: Sketch, sizes: _Sizes, scores: ir.Value, guarded: bool) -> ir.Value:
    wide = sizes.dtype == FLOAT16 and sketch.flip()
    if wide:
        scores = sketch.cast(scores, FLOAT)
    shares = sketch.emit("Softmax", scores, axis=2 if sketch.rarely() else sketch.choose(-1, 3))
    if guarded or sketch.choose(False, False, True):
        zero = sketch.constant(np.zeros((), (FLOAT if wide else sizes.dtype).numpy()))
        shares = sketch.emit("Where", sketch.emit("IsNaN", shares), zero, shares)
    return sketch.cast(shares, FLOAT16) if wide else shares


def _join(sketch: Sketch, x: ir.Value) -> ir.Value:
    """Make `[batch · heads, n, m]` of `[batch, heads, n, m]`."""
    parts = [sketch.ints(-1), extent(sketch, x, 2), extent(sketch, x, 3)]
    return sketch.emit("Reshape", x, sketch.emit("Concat", *parts, axis=0))


def _part(sketch: Sketch, x: ir.Value, *places: tuple[ir.Value, int]) -> ir.Value:
    """Make `[batch, heads, n, m]` of `[batch · heads, n, m]`; extents are those of other axes."""
    parts = [extent(sketch, *place) for place in places]
    return sketch.emit("Reshape", x, sketch.emit("Concat", *parts, axis=0))


def _joined_attention(sketch: Sketch, sizes: _Sizes) -> list[ir.Value]:
    """Attention that computes its products over batch and heads in one axis."""
    heads = [sizes.batch, sizes.heads]
    q = sketch.input([*heads, sizes.queries, sizes.size], sizes.dtype, name="heads")
    k, v = (
        sketch.input([*heads, sizes.keys, sizes.size], sizes.dtype, name="heads") for _ in range(2)
    )
    turned = sketch.emit("Transpose", _join(sketch, k), perm=[0, 2, 1])
    scores = _scaled(sketch, sizes, sketch.emit("MatMul", _join(sketch, q), turned))
    if sketch.rarely():
        shape: list[Extent] = [1, sketch.choose(1, sizes.queries), sizes.keys]
        scores = either(sketch, "Add", scores, sketch.input(shape, sizes.dtype, name="bias"))
    scores = _part(sketch, scores, (q, 0), (q, 1), (q, 2), (k, 2))
    if sketch.flip():
        scores = sketch.choose(_by_condition, _by_bias)(sketch, sizes, scores)
    if sketch.flip():
        shares = sketch.emit("Softmax", _join(sketch, scores), axis=sketch.choose(-1, -1, 2, 1))
    else:
        shares = _join(sketch, sketch.emit("Softmax", scores, axis=sketch.choose(-1, -1, 3, 2)))
    y = sketch.emit("MatMul", shares, _join(sketch, v))
    return [_part(sketch, y, *((q, axis) for axis in range(4)))]


def joined(sketch: Sketch) -> list[ir.Value]:
    """Attention from heads to heads, as older models spell it.

    What hides absorbs every score: with less, rows that are hidden as a whole depend on the order
    in which a bias and a mask are added.
    """
    sizes = replace(_sizes(sketch), dtype=FLOAT, low=float(np.finfo(np.float32).min))
    return _joined_attention(sketch, sizes)


def spelled(sketch: Sketch) -> list[ir.Value]:
    """Attention from heads to heads, or to hidden states."""
    sizes = _sizes(sketch)
    if sketch.rarely() and sizes.queries == sizes.keys:
        q, k, v = _packed(sketch, sizes)
    else:
        q = _heads(sketch, sizes, sizes.heads, sizes.queries)
        k, v = (_heads(sketch, sizes, sizes.groups, sizes.keys) for _ in range(2))
    k, v = _repeated(sketch, sizes, k), _repeated(sketch, sizes, v)
    q, k = _scaled(sketch, sizes, q), _scaled(sketch, sizes, k)
    k = sketch.emit("Transpose", k, perm=[0, 1, 3, 2])
    scores = _scaled(sketch, sizes, sketch.emit("MatMul", q, k))
    if sketch.rarely():
        cap = _number(sketch, sizes, 2.0)
        scores = sketch.emit("Mul", sketch.emit("Tanh", sketch.emit("Div", scores, cap)), cap)
    masks: tuple[Mask, ...] = (_by_condition, _by_condition, _by_bias, _by_table)
    count = sketch.choose(1, 0, 2)
    # No output may be no number: it could not be compared.
    guarded = count > 1 or (count == 1 and (_is_infinite(sizes) or sizes.dtype == FLOAT16))
    for _ in range(count):
        scores = sketch.choose(*masks)(sketch, sizes, scores)
    if sketch.rarely():
        scores = _scaled(sketch, sizes, scores)
    shares = _softmax(sketch, sizes, scores, guarded)
    y = sketch.emit("MatMul", shares, v)
    if sketch.flip():
        y = sketch.emit("Transpose", y, perm=[0, 2, 1, 3])
        y = sketch.reshape(y, 0, 0, -1)
    return [shares, y] if sketch.rarely() else [y]


MOTIFS = (Motif("spelled-attention", spelled),)

JOINED = (Motif("joined-attention", joined),)
"""Not among the default motifs: of use to what fuses attention only."""
