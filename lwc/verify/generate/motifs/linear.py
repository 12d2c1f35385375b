"""Linear layers: products with weights, their biases, and the constants that scale them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import (
    HEAD_SIZE,
    HEADS,
    WIDTH,
    either,
    extent,
    fixed_end,
    hidden,
    row,
    weighted,
)
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS"]


def _width(sketch: Sketch, x: ir.Value) -> int:
    width = sketch.shape(x)[-1]
    assert isinstance(width, int)
    return width


def _weights(sketch: Sketch, rows: int, columns: int) -> ir.Value:
    """Add a matrix `[rows, columns]` as it is, transposed, cast, or scaled before its use."""
    form = sketch.choose("plain", "transpose", "identity", "cast", "scaled")
    if form == "transpose":
        return sketch.emit("Transpose", sketch.weight(columns, rows), perm=[1, 0])
    if form == "cast":
        small = sketch.weight(rows, columns, dtype=ir.DataType.FLOAT16)
        return sketch.cast(small, ir.DataType.FLOAT)
    matrix = sketch.weight(rows, columns)
    if form == "identity":
        return sketch.emit("Identity", matrix)
    return either(sketch, "Mul", matrix, row(sketch, columns)) if form == "scaled" else matrix


def _bias(sketch: Sketch, count: int) -> ir.Value:
    extents = sketch.choose((count,), (1, count), (), (1,), (1, 1, count))
    rng = np.random.default_rng(sketch.integer(0, 7))
    return sketch.constant(rng.standard_normal(extents).astype(np.float32), name="bias")


def linear(sketch: Sketch) -> ir.Value:
    """A MatMul with weights, and a bias on either side or none."""
    x = sketch.pick(least=1, where=fixed_end)
    count = sketch.choose(WIDTH, 4, 1)
    y = sketch.emit("MatMul", x, _weights(sketch, _width(sketch, x), count))
    if sketch.choose(True, False):
        y = either(sketch, "Add", y, _bias(sketch, count))
    return y


def _matrix(sketch: Sketch) -> ir.Value:
    """Draw a matrix with a known last extent: a value, or one that is flattened to it."""
    if sketch.flip():
        return sketch.pick(2, where=fixed_end)
    x = hidden(sketch)
    if sketch.flip():
        return sketch.emit("Flatten", x, axis=sketch.choose(2, -1))
    return sketch.reshape(x, -1, WIDTH)


def gemm(sketch: Sketch) -> ir.Value:
    """A Gemm: either factor transposed, scaled, with every shape of bias; shaped back or not."""
    x = _matrix(sketch)
    rows, width = sketch.shape(x)
    assert isinstance(width, int)
    count = sketch.choose(WIDTH, 4)
    turned = sketch.flip()
    weights = sketch.weight(count, width) if turned else sketch.weight(width, count)
    attributes: dict[str, Any] = {"transB": 1 if turned else sketch.choose(None, 0)}
    a = x
    if sketch.rarely():
        a = sketch.emit("Transpose", x, perm=[1, 0])
        attributes["transA"] = 1
    attributes["alpha"] = sketch.choose(None, 1.0, 0.5, -2.0)
    attributes["beta"] = sketch.choose(None, 1.0, 0.5, 0.0)
    forms: list[tuple[int, ...]] = [(count,), (), (1,), (1, count), (1, 1)]
    if isinstance(rows, int):
        forms += [(rows, count), (rows, 1)]
    form = sketch.choose(*forms, None)
    inputs = [a, weights]
    if form is not None:
        rng = np.random.default_rng(sketch.integer(0, 7))
        inputs.append(sketch.constant(rng.standard_normal(form).astype(np.float32), name="bias"))
    elif width == count and sketch.flip():
        inputs.append(x)
    return sketch.emit("Gemm", *inputs, **attributes)


def flattened(sketch: Sketch) -> ir.Value:
    """A Gemm on flattened hidden states, shaped back by extents that the graph computes."""
    x = hidden(sketch)
    flat = sketch.reshape(x, -1, WIDTH)
    count = sketch.choose(WIDTH, 4)
    y = sketch.emit(
        "Gemm", flat, sketch.weight(count, WIDTH), sketch.weight(count, name="bias"), transB=1
    )
    target = sketch.emit(
        "Concat", extent(sketch, x, 0), extent(sketch, x, 1), sketch.ints(count), axis=0
    )
    return sketch.emit("Reshape", y, target)


def batched(sketch: Sketch) -> ir.Value:
    """A MatMul with a matrix of weights for each head, or one with a leading axis of 1."""
    if sketch.flip():
        x = hidden(sketch)
        return sketch.emit("MatMul", x, sketch.weight(1, WIDTH, sketch.choose(4, WIDTH)))
    x = sketch.reshape(hidden(sketch), 0, 0, HEADS, HEAD_SIZE)
    x = sketch.emit("Transpose", x, perm=[0, 2, 1, 3])
    lead = (1, HEADS) if sketch.flip() else (HEADS,)
    y = sketch.emit("MatMul", x, sketch.weight(*lead, HEAD_SIZE, HEAD_SIZE))
    if sketch.flip():
        y = either(sketch, "Add", y, sketch.weight(HEADS, 1, HEAD_SIZE, name="bias"))
    return y


def weights_first(sketch: Sketch) -> ir.Value:
    """A product with the weights on the left."""
    x = sketch.emit("Transpose", hidden(sketch), perm=[0, 2, 1])
    y = sketch.emit("MatMul", sketch.weight(sketch.choose(4, WIDTH), WIDTH), x)
    rows = sketch.shape(y)[-2]
    assert isinstance(rows, int)
    y = either(sketch, "Add", y, sketch.weight(rows, 1, name="bias")) if sketch.flip() else y
    return sketch.emit("Transpose", y, perm=[0, 2, 1]) if sketch.flip() else y


def _scale(sketch: Sketch, x: ir.Value, extents: tuple[int, ...]) -> ir.Value:
    """Add one constant arithmetic step; `extents` is the constant's shape."""
    op = sketch.choose("Mul", "Add", "Div", "Sub")
    rng = np.random.default_rng(sketch.integer(0, 7))
    number = sketch.constant((rng.random(extents) + 0.5).astype(np.float32), name="scale")
    if op in ("Mul", "Add"):
        return either(sketch, op, x, number)
    if op == "Sub" and sketch.flip():
        return sketch.emit("Sub", number, x)
    return sketch.emit(op, x, number)


def scaled(sketch: Sketch) -> ir.Value:
    """A linear layer on square matrices, where a scale of rows looks like one of channels."""
    x = (
        hidden(sketch)
        if sketch.flip()
        else sketch.pick(
            3,
            where=lambda s: s[-1] == WIDTH and s[-2] == WIDTH,
            otherwise=["N", WIDTH, WIDTH],
        )
    )
    square = sketch.shape(x)[-2] == WIDTH
    forms: list[tuple[int, ...]] = [(WIDTH,), (), (1,), (1, 1, WIDTH)]
    if square:
        forms += [(WIDTH, 1), (1, WIDTH, 1), (WIDTH, WIDTH)]
    for _ in range(sketch.integer(0, 2)):
        x = _scale(sketch, x, sketch.choose(*forms))
    y = weighted(sketch, x)
    if square and sketch.rarely():
        return batch_normalized(sketch, y, WIDTH)
    for _ in range(sketch.integer(0, 3)):
        y = _scale(sketch, y, sketch.choose(*forms))
    return y


def batch_normalized(sketch: Sketch, x: ir.Value, channels: int) -> ir.Value:
    """Add an inference-mode BatchNormalization over axis 1."""
    scale, bias = row(sketch, channels), sketch.weight(channels, name="bias")
    mean, variance = sketch.weight(channels, name="mean"), row(sketch, channels, "var")
    return sketch.emit(
        "BatchNormalization", x, scale, bias, mean, variance, epsilon=sketch.choose(None, 1e-3)
    )


def normalized_gemm(sketch: Sketch) -> ir.Value:
    """A product of matrices, then BatchNormalization over its channels, or before it."""
    x = sketch.reshape(hidden(sketch), -1, WIDTH)
    if sketch.rarely():
        x = batch_normalized(sketch, x, WIDTH)
    if sketch.flip():
        y = sketch.emit("Gemm", x, sketch.weight(4, WIDTH), sketch.weight(4), transB=1)
    else:
        y = weighted(sketch, x, 4)
    y = batch_normalized(sketch, y, 4)
    return sketch.emit("Relu", y) if sketch.flip() else y


def scaled_gemm(sketch: Sketch) -> ir.Value:
    """A Gemm over a known number of rows, its bias by row or by column, then a constant."""
    rows, count = 3, sketch.choose(WIDTH, 3)
    x = sketch.input([rows, WIDTH])
    rng = np.random.default_rng(sketch.integer(0, 7))
    form = sketch.choose((count,), (count,), (rows, 1), (rows, count), (1, count), ())
    bias = sketch.constant(rng.standard_normal(form).astype(np.float32), name="bias")
    product = sketch.emit(
        "Gemm",
        x,
        sketch.weight(WIDTH, count),
        bias,
        alpha=sketch.choose(None, 1.0, 0.5),
        beta=sketch.choose(None, 0.5, 1.0),
    )
    operands = [product, sketch.constant_for(product)]
    if sketch.flip():
        operands.reverse()
    return sketch.emit(sketch.choose("Mul", "Add", "Sub"), *operands)


def normalized_states(sketch: Sketch) -> ir.Value:
    """A MatMul, then a batch norm, whose channels are another axis than the features."""
    x = sketch.pick(
        3, where=lambda s: s[1] == WIDTH and s[2] == WIDTH, otherwise=["N", WIDTH, WIDTH]
    )
    return batch_normalized(sketch, sketch.emit("MatMul", x, sketch.weight(WIDTH, WIDTH)), WIDTH)


def scaled_heads(sketch: Sketch) -> ir.Value:
    """A linear layer whose scale comes only after Reshape and Transpose into heads."""
    y = weighted(sketch, hidden(sketch))
    y = sketch.reshape(y, 0, sketch.choose(0, -1), HEADS, HEAD_SIZE)
    moved = sketch.choose(True, False)
    if moved:
        y = sketch.emit("Transpose", y, perm=[0, 2, 1, 3])
    middle = (HEADS, 1, 1) if moved else (HEADS, 1)
    full = (HEADS, 1, HEAD_SIZE) if moved else (HEADS, HEAD_SIZE)
    y = _scale(sketch, y, sketch.choose((), middle, (HEAD_SIZE,), (1, *middle), full))
    if sketch.flip():
        return y
    y = sketch.emit("Transpose", y, perm=[0, 2, 1, 3]) if moved else y
    return sketch.reshape(y, 0, 0, WIDTH)


def chained(sketch: Sketch) -> ir.Value:
    """Two linear layers with nothing, or only a constant, between them."""
    y = weighted(sketch, hidden(sketch, None))
    if sketch.flip():
        y = _scale(sketch, y, sketch.choose((), (WIDTH,)))
    return weighted(sketch, y, sketch.choose(4, WIDTH))


def parallel(sketch: Sketch) -> list[ir.Value]:
    """Several linear layers that read one value; apart, added, or joined."""
    x = hidden(sketch, None)
    made = [weighted(sketch, x, WIDTH) for _ in range(sketch.integer(2, 3))]
    form = sketch.choose("apart", "concat", "add")
    if form == "concat":
        return [sketch.emit("Concat", *made, axis=-1)]
    if form == "add":
        return [sketch.emit("Sum", *made) if sketch.flip() else sketch.emit("Add", *made[:2])]
    return made


MOTIFS = (
    Motif("linear", linear),
    Motif("gemm", gemm),
    Motif("flattened-gemm", flattened),
    Motif("batched-matmul", batched),
    Motif("weights-first", weights_first),
    Motif("scaled-linear", scaled),
    Motif("normalized-gemm", normalized_gemm),
    Motif("scaled-gemm", scaled_gemm),
    Motif("normalized-states", normalized_states),
    Motif("scaled-heads", scaled_heads),
    Motif("chained-linears", chained),
    Motif("parallel-linears", parallel),
)
