"""Attention: its head layouts, masks, scales and rotary positions, as exporters spell them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from lwc.core.dims import equal
from lwc.verify.generate.motifs.common import (
    HEAD_SIZE,
    HEADS,
    WIDTH,
    batch_and_length,
    either,
    extent,
    hidden,
    solid,
    weighted,
)
from lwc.verify.generate.motifs.embeddings import additive_mask, mask_input
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS"]

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
LOWEST = float(np.finfo(np.float32).min)


def _number(sketch: Sketch, number: float) -> ir.Value:
    return sketch.constant(np.full(sketch.choose((), (1,)), number, np.float32), name="scale")


def _split(sketch: Sketch, x: ir.Value, heads: int, perm: tuple[int, ...]) -> ir.Value:
    """Lay hidden states `[N, S, heads * size]` out in heads, then transpose."""
    form = sketch.choose("constant", "computed", "inferred")
    if form == "computed":
        parts = [extent(sketch, x, 0), extent(sketch, x, 1), sketch.ints(heads, HEAD_SIZE)]
        y = sketch.emit("Reshape", x, sketch.emit("Concat", *parts, axis=0))
    else:
        y = sketch.reshape(x, 0, -1 if form == "inferred" else 0, heads, HEAD_SIZE)
    return sketch.emit("Transpose", y, perm=list(perm))


def _merge(sketch: Sketch, y: ir.Value, heads: int = HEADS) -> ir.Value:
    """Lay heads `[N, heads, S, size]` out as hidden states again."""
    y = sketch.emit("Transpose", y, perm=[0, 2, 1, 3])
    width = heads * HEAD_SIZE
    form = sketch.choose("constant", "computed", "inferred")
    if form == "computed":
        parts = [extent(sketch, y, 0), extent(sketch, y, 1), sketch.ints(width)]
        return sketch.emit("Reshape", y, sketch.emit("Concat", *parts, axis=0))
    return sketch.reshape(y, 0, 0, width if form == "constant" else -1)


def _scaled(sketch: Sketch, x: ir.Value, number: float) -> ir.Value:
    if sketch.flip():
        return sketch.emit("Div", x, _number(sketch, 1 / number))
    return either(sketch, "Mul", x, _number(sketch, number))


def _size_root(sketch: Sketch, q: ir.Value) -> ir.Value:
    """Compute the root of one over the root of the head size from the shape, as torch does."""
    size = sketch.cast(extent(sketch, q, -1), FLOAT)
    one = sketch.constant(np.ones(1, np.float32))
    return sketch.emit("Sqrt", sketch.emit("Div", one, sketch.emit("Sqrt", size)))


def _causal(sketch: Sketch, scores: ir.Value) -> ir.Value:
    """Hide what comes later: a triangle added, or chosen by Where; `scores` is square."""
    length = extent(sketch, scores, -1)
    square = sketch.emit("Concat", extent(sketch, scores, -2), length, axis=0)
    form = sketch.choose("range", "trilu-added", "trilu-where")
    if form == "range" or sketch.opset < 14:
        last = sketch.emit("Squeeze", length, sketch.ints(0))
        begin, step = sketch.constant(0), sketch.constant(1)
        places = sketch.emit("Range", begin, last, step)
        rows = sketch.emit("Unsqueeze", places, sketch.ints(1))
        if sketch.flip():
            hides = sketch.emit("Greater", places, rows)
            hide = sketch.constant(np.float32(sketch.choose(-1e9, -np.inf, LOWEST)))
            return sketch.emit("Where", hides, hide, scores)
        shows = sketch.emit("LessOrEqual", places, rows)
        return sketch.emit("Where", shows, scores, sketch.constant(np.float32(-1e9)))
    if form == "trilu-added":
        low = ir.Tensor(np.array([sketch.choose(-np.inf, -1e9, LOWEST)], np.float32))
        full = sketch.emit("ConstantOfShape", square, value=low)
        return either(
            sketch, "Add", scores, sketch.emit("Trilu", full, sketch.constant(1), upper=1)
        )
    ones = sketch.emit("ConstantOfShape", square, value=ir.Tensor(np.ones(1, np.int64)))
    lower = sketch.cast(sketch.emit("Trilu", ones, upper=0), ir.DataType.BOOL)
    return sketch.emit("Where", lower, scores, sketch.constant(np.float32(-1e9)))


def _attend(
    sketch: Sketch,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    *,
    turned: bool = False,
    mask: ir.Value | None = None,
    square: bool = True,
) -> ir.Value:
    """Attend with heads `[N, H, S, size]`; `turned` keys are `[N, H, size, S]` already."""
    scale = 1 / math.sqrt(HEAD_SIZE)
    place = sketch.choose("scores", "q", "k", "both", "computed", "none")
    if place == "q":
        q = _scaled(sketch, q, scale)
    elif place == "k":
        k = _scaled(sketch, k, scale)
    elif place == "both":
        q, k = _scaled(sketch, q, math.sqrt(scale)), _scaled(sketch, k, math.sqrt(scale))
    elif place == "computed":
        root = _size_root(sketch, q)
        q, k = sketch.emit("Mul", q, root), sketch.emit("Mul", k, root)
    if not turned:
        k = sketch.emit("Transpose", k, perm=[0, 1, 3, 2])
    scores = sketch.emit("MatMul", q, k)
    if place == "scores":
        scores = _scaled(sketch, scores, scale)
    if mask is not None:
        scores = either(sketch, "Add", scores, mask)
    elif square and sketch.flip():
        scores = _causal(sketch, scores)
    shares = sketch.emit("Softmax", scores, axis=sketch.choose(-1, 3))
    if sketch.rarely():
        zero = sketch.constant(np.float32(0))
        shares = sketch.emit("Where", sketch.emit("IsNaN", shares), zero, shares)
    if sketch.rarely():
        shares = sketch.emit("Dropout", shares)
    return sketch.emit("MatMul", shares, v)


def attention(sketch: Sketch) -> ir.Value:
    """Self-attention from hidden states to hidden states, masked or not."""
    x = batch_and_length(sketch)
    mask = additive_mask(sketch, mask_input(sketch)) if sketch.flip() else None
    turned = sketch.flip()
    q = _split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3))
    k = _split(sketch, weighted(sketch, x), HEADS, (0, 2, 3, 1) if turned else (0, 2, 1, 3))
    v = _split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3))
    y = weighted(sketch, _merge(sketch, _attend(sketch, q, k, v, turned=turned, mask=mask)))
    return either(sketch, "Add", x, y) if sketch.flip() else y


def core(sketch: Sketch) -> ir.Value:
    """The product of attention alone, on heads as they are, of one value or of inputs."""
    template: list[int | str | None] = ["N", HEADS, "S", HEAD_SIZE]
    heads = [
        sketch.pick(
            4,
            where=lambda s: s[1] == HEADS and s[3] == HEAD_SIZE and solid(sketch)(s),
            otherwise=template,
        )
    ]
    shape = sketch.shape(heads[0])
    named = str(shape[0]) == "N" and str(shape[2]) == "S"
    for _ in range(2):
        if named and sketch.choose(True, False):
            heads.append(sketch.input(template))
        else:
            heads.append(sketch.emit("Mul", heads[0], sketch.weight(HEADS, 1, HEAD_SIZE)))
    return _attend(sketch, *heads)


def grouped(sketch: Sketch) -> ir.Value:
    """Attention whose keys and values have one head, repeated for each head of the query."""
    x = batch_and_length(sketch)
    q = _split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3))
    k = _split(sketch, weighted(sketch, x, HEAD_SIZE), 1, (0, 2, 1, 3))
    v = _split(sketch, weighted(sketch, x, HEAD_SIZE), 1, (0, 2, 1, 3))
    form = sketch.choose("expand", "broadcast", "concat")
    if form == "concat":
        k, v = sketch.emit("Concat", k, k, axis=1), sketch.emit("Concat", v, v, axis=1)
    elif form == "expand":
        k, v = _repeated(sketch, k), _repeated(sketch, v)
    if sketch.flip():
        q, k = rotated(sketch, x, q), rotated(sketch, x, k)
    return weighted(sketch, _merge(sketch, _attend(sketch, q, k, v)))


def _repeated(sketch: Sketch, x: ir.Value) -> ir.Value:
    """Repeat heads `[N, 1, S, size]` by Unsqueeze, Expand and Reshape."""
    y = sketch.emit("Unsqueeze", x, sketch.ints(2))
    batch, length = extent(sketch, x, 0), extent(sketch, x, 2)
    size = sketch.ints(HEAD_SIZE)
    wide = sketch.emit("Concat", batch, sketch.ints(1), sketch.ints(HEADS), length, size, axis=0)
    y = sketch.emit("Expand", y, wide)
    if sketch.flip():
        return sketch.reshape(y, 0, HEADS, -1, HEAD_SIZE)
    return sketch.emit(
        "Reshape", y, sketch.emit("Concat", batch, sketch.ints(HEADS), length, size, axis=0)
    )


def rotated(sketch: Sketch, x: ir.Value, heads: ir.Value) -> ir.Value:
    """Turn heads `[N, H, S, size]` by angles that grow along `S`; `x` is `[N, S, …]`."""
    frequencies = sketch.constant(
        np.array([1.0, 0.1], np.float32).reshape(1, 2), name="inverse_frequencies"
    )
    begin, step = sketch.constant(0), sketch.constant(1)
    last = extent(sketch, x, 1, vector=False)
    places = sketch.cast(sketch.emit("Range", begin, last, step), FLOAT)
    angles = sketch.emit("MatMul", sketch.emit("Unsqueeze", places, sketch.ints(1)), frequencies)
    if sketch.choose("halves", "pairs") == "halves":
        angles = sketch.emit("Concat", angles, angles, axis=-1)
        cos, sin = sketch.emit("Cos", angles), sketch.emit("Sin", angles)
        if sketch.flip():
            axes = sketch.ints(0, 1)
            cos = sketch.emit("Unsqueeze", cos, axes)
            sin = sketch.emit("Unsqueeze", sin, axes)
        low, high = _halves(sketch, heads)
        turned = sketch.emit("Concat", sketch.emit("Neg", high), low, axis=-1)
        left, right = either(sketch, "Mul", heads, cos), either(sketch, "Mul", turned, sin)
        return either(sketch, "Add", left, right)
    cos, sin = sketch.emit("Cos", angles), sketch.emit("Sin", angles)
    begin, end, axis, two = (sketch.ints(n) for n in (0, 2**63 - 1, 3, 2))
    even = sketch.emit("Slice", heads, begin, end, axis, two)
    odd = sketch.emit("Slice", heads, sketch.ints(1), end, axis, two)
    first = sketch.emit("Sub", sketch.emit("Mul", even, cos), sketch.emit("Mul", odd, sin))
    second = sketch.emit("Add", sketch.emit("Mul", even, sin), sketch.emit("Mul", odd, cos))
    last_axis = sketch.ints(-1)
    pair = [sketch.emit("Unsqueeze", value, last_axis) for value in (first, second)]
    joined = sketch.emit("Concat", *pair, axis=-1)
    return sketch.emit("Reshape", joined, sketch.extents(heads))


def _halves(sketch: Sketch, heads: ir.Value) -> list[ir.Value]:
    half = HEAD_SIZE // 2
    if sketch.rarely():
        return sketch.emit_all("Split", heads, sketch.ints(half, half), outputs=2, axis=-1)
    axes = sketch.ints(sketch.choose(3, -1))
    end = sketch.ints(2**63 - 1)
    if sketch.flip():
        middle = sketch.ints(half)
    else:
        size = extent(sketch, heads, 3)
        middle = sketch.emit("Div", size, sketch.ints(2))
    return [
        sketch.emit("Slice", heads, sketch.ints(0), middle, axes),
        sketch.emit("Slice", heads, middle, end, axes),
    ]


def rotary(sketch: Sketch) -> ir.Value:
    """Rotary positions on the heads of one linear layer."""
    x = hidden(sketch)
    return rotated(sketch, x, _split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3)))


def packed(sketch: Sketch) -> ir.Value:
    """Attention whose query, key and value come from one layer, cut by Split, Slice or Gather."""
    x = hidden(sketch)
    both = weighted(sketch, x, 3 * WIDTH)
    form = sketch.choose("split", "slice", "gather")
    if form == "gather":
        shaped = sketch.reshape(both, 0, 0, 3, HEADS, HEAD_SIZE)
        shaped = sketch.emit("Transpose", shaped, perm=[2, 0, 3, 1, 4])
        parts = [
            sketch.emit("Gather", shaped, sketch.constant(i, name="indices"), axis=0)
            for i in range(3)
        ]
        return _merge(sketch, _attend(sketch, *parts))
    if form == "split":
        sizes = sketch.ints(WIDTH, WIDTH, WIDTH)
        parts = sketch.emit_all("Split", both, sizes, outputs=3, axis=-1)
    else:
        axes = sketch.ints(2)
        parts = [
            sketch.emit("Slice", both, sketch.ints(i * WIDTH), sketch.ints((i + 1) * WIDTH), axes)
            for i in range(3)
        ]
    q, k, v = (_split(sketch, part, HEADS, (0, 2, 1, 3)) for part in parts)
    return weighted(sketch, _merge(sketch, _attend(sketch, q, k, v)))


def cross(sketch: Sketch) -> ir.Value:
    """Attention from hidden states to states of another length."""
    x = batch_and_length(sketch)
    length = "T" if sketch.flip() else sketch.choose(3, 1)
    other = sketch.input(["N", length, WIDTH], name="memory")
    q = _split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3))
    k = _split(sketch, weighted(sketch, other), HEADS, (0, 2, 1, 3))
    v = _split(sketch, weighted(sketch, other), HEADS, (0, 2, 1, 3))
    return _merge(sketch, _attend(sketch, q, k, v, square=False))


def cached(sketch: Sketch) -> list[ir.Value]:
    """Attention that appends its keys and values to those of earlier steps, and returns them."""
    x = batch_and_length(sketch)
    length = 2 if sketch.flip() else "P"
    shape: list[int | str] = ["N", HEADS, length, HEAD_SIZE]
    past = [sketch.input(shape, name=f"past_{kind}") for kind in ("key", "value")]
    q = _split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3))
    new = [_split(sketch, weighted(sketch, x), HEADS, (0, 2, 1, 3)) for _ in past]
    k, v = (sketch.emit("Concat", a, b, axis=2) for a, b in zip(past, new, strict=True))
    y = _merge(sketch, _attend(sketch, q, k, v, square=False))
    return [k, v, y]


def head_view(sketch: Sketch) -> ir.Value:
    """Heads and back, by extents that the graph computes."""
    x = hidden(sketch)
    y = _split(sketch, x, HEADS, (0, 2, 1, 3))
    if sketch.flip():
        y = sketch.emit("Tanh", y)
    y = _merge(sketch, y)
    same = all(equal(a, b) for a, b in zip(sketch.shape(x), sketch.shape(y), strict=True))
    return either(sketch, "Add", x, y) if same and sketch.flip() else y


MOTIFS = (
    Motif("attention", attention),
    Motif("attention-core", core),
    Motif("grouped-attention", grouped),
    Motif("packed-attention", packed),
    Motif("cross-attention", cross),
    Motif("cached-attention", cached),
    Motif("rotary", rotary),
    Motif("head-view", head_view),
)
