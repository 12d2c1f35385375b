"""What stands before the first layer: token ids, positions, masks, tables."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import WIDTH, either, extent, hidden, solid, weighted
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS", "additive_mask", "mask_input"]

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
LOWEST = float(np.finfo(np.float32).min)
ROWS = 11
"""Tokens in the vocabulary."""


def _input(sketch: Sketch, name: str, dtype: ir.DataType = INT64) -> ir.Value:
    """Return the graph input `[N, S]` of a name, made once."""
    for value in sketch.module.graph.inputs:
        if value.name == name:
            return value
    return sketch.input(["N", "S"], dtype, name=name)


def _tokens(sketch: Sketch) -> ir.Value:
    ids = _input(sketch, "input_ids")
    return sketch.cast(ids, ir.DataType.INT32) if sketch.rarely() else ids


def mask_input(sketch: Sketch) -> ir.Value:
    """Return the padding mask `[N, S]`: integers 0 and 1, or booleans."""
    if sketch.rarely():
        return _input(sketch, "padding_mask", ir.DataType.BOOL)
    return _input(sketch, "attention_mask")


def additive_mask(sketch: Sketch, mask: ir.Value) -> ir.Value:
    """Turn a padding mask into what is added to scores: `[N, 1, 1, S]`."""
    if sketch.flip():
        wide = sketch.emit("Unsqueeze", mask, sketch.ints(1, 2))
    else:
        first = sketch.emit("Unsqueeze", mask, sketch.ints(1))
        wide = sketch.emit("Unsqueeze", first, sketch.ints(2))
    low = sketch.constant(np.float32(sketch.choose(-10000.0, LOWEST, -1e9)))
    zero = sketch.constant(np.float32(0))
    if sketch.rarely():
        return sketch.emit("Where", sketch.cast(wide, ir.DataType.BOOL), zero, low)
    inverted = sketch.emit("Sub", sketch.constant(np.float32(1)), sketch.cast(wide, FLOAT))
    if sketch.flip():
        return either(sketch, "Mul", inverted, low)
    hides = sketch.cast(inverted, ir.DataType.BOOL)
    return sketch.emit("Where", hides, low, inverted)


def tokens(sketch: Sketch) -> ir.Value:
    """Token ids looked up in a table, scaled or not."""
    table = sketch.weight(ROWS, WIDTH, name="table")
    y = sketch.emit("Gather", table, _tokens(sketch), axis=sketch.choose(None, 0))
    return either(sketch, "Mul", y, sketch.constant(np.float32(2))) if sketch.rarely() else y


def positions(sketch: Sketch) -> ir.Value:
    """Positions added to hidden states: counted by Range, fed, or worked out of the mask."""
    x = hidden(sketch)
    form = sketch.choose("range", "cumsum", "fed")
    if form == "range":
        begin, step = sketch.constant(0), sketch.constant(1)
        last = extent(sketch, x, 1, vector=False)
        places = sketch.emit("Range", begin, last, step)
        if sketch.flip():
            places = sketch.emit("Unsqueeze", places, sketch.ints(0))
    elif form == "fed":
        places = _input(sketch, "position_ids")
    else:
        mask = _input(sketch, "attention_mask")
        counted = sketch.emit("CumSum", mask, sketch.constant(1))
        places = sketch.emit("Sub", counted, sketch.constant(1))
    angles = sketch.emit("Unsqueeze", sketch.cast(places, FLOAT), sketch.ints(-1))
    angles = either(sketch, "Mul", angles, sketch.weight(WIDTH))
    waves = sketch.emit(sketch.choose("Sin", "Cos"), angles)
    return either(sketch, "Add", x, waves) if form == "range" else waves


def token_types(sketch: Sketch) -> ir.Value:
    """Token types looked up, fed or all zero."""
    ids = _input(sketch, "input_ids")
    table = sketch.weight(2, WIDTH, name="types")
    if sketch.flip():
        zero = ir.Tensor(np.zeros(1, np.int64))
        types = sketch.emit("ConstantOfShape", sketch.extents(ids), value=zero)
    else:
        types = _input(sketch, "token_type_ids")
    return sketch.emit("Gather", table, types)


def tied(sketch: Sketch) -> ir.Value:
    """A table that ids are looked up in and whose transpose gives the scores of tokens."""
    table = sketch.weight(ROWS, WIDTH, name="table")
    y = sketch.emit("Gather", table, _tokens(sketch))
    y = weighted(sketch, y)
    if sketch.flip():
        flat = sketch.reshape(y, -1, WIDTH)
        return sketch.emit("Gemm", flat, table, transB=1)
    return sketch.emit("MatMul", y, sketch.emit("Transpose", table, perm=[1, 0]))


def masked(sketch: Sketch) -> ir.Value:
    """A padding mask made additive."""
    return additive_mask(sketch, mask_input(sketch))


def pooled(sketch: Sketch) -> ir.Value:
    """The mean of the token vectors that the mask keeps."""
    table = sketch.weight(ROWS, WIDTH, name="table")
    x = sketch.emit("Gather", table, _tokens(sketch))
    mask = sketch.emit("Unsqueeze", mask_input(sketch), sketch.ints(-1))
    mask = sketch.cast(mask, FLOAT)
    if sketch.flip():
        mask = sketch.emit("Expand", mask, sketch.extents(x))
    kept = sketch.reduce("ReduceSum", either(sketch, "Mul", x, mask), [1], keepdims=0)
    count = sketch.reduce("ReduceSum", mask, [1], keepdims=0)
    return sketch.emit("Div", kept, sketch.emit("Clip", count, sketch.constant(np.float32(1e-9))))


def first_token(sketch: Sketch) -> ir.Value:
    """The first or last position, cut out as a classifier does."""
    x = sketch.pick(3, where=solid(sketch))
    index = sketch.choose(0, -1)
    y = sketch.emit("Gather", x, sketch.constant(index, name="indices"), axis=1)
    return sketch.emit("Tanh", y) if sketch.flip() else y


MOTIFS = (
    Motif("tokens", tokens),
    Motif("positions", positions),
    Motif("token-types", token_types),
    Motif("tied-embeddings", tied),
    Motif("additive-mask", masked),
    Motif("masked-mean", pooled),
    Motif("first-token", first_token),
)
