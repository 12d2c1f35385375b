"""Normalization in the spellings of exporters."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import WIDTH, either, hidden, row, solid
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS", "any_norm"]

DOUBLE, FLOAT, HALF = ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16


def _number(sketch: Sketch, number: float, dtype: ir.DataType = FLOAT) -> ir.Value:
    """Add a constant as a scalar or as a vector of one."""
    extents = sketch.choose((), (1,))
    return sketch.constant(np.full(extents, number), dtype, name="constant")


def _epsilon(sketch: Sketch, x: ir.Value, dtype: ir.DataType = FLOAT) -> ir.Value:
    return either(sketch, "Add", x, _number(sketch, sketch.choose(1e-5, 1e-6, 1e-12, 1e-3), dtype))


def _square(sketch: Sketch, x: ir.Value, dtype: ir.DataType = FLOAT) -> ir.Value:
    if sketch.flip():
        return sketch.emit("Mul", x, x)
    kind = sketch.choose(dtype, ir.DataType.INT64)
    return sketch.emit("Pow", x, _number(sketch, 2, kind))


def _mean(sketch: Sketch, x: ir.Value, dtype: ir.DataType = FLOAT) -> ir.Value:
    axis = sketch.choose(-1, sketch.rank(x) - 1)
    if not sketch.rarely():
        return sketch.reduce("ReduceMean", x, [axis])
    total = sketch.reduce("ReduceSum", x, [axis])
    return sketch.emit("Div", total, _number(sketch, WIDTH, dtype))


def _over_root(sketch: Sketch, x: ir.Value, mean: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Divide by the root of the mean square, epsilon inside or outside the root."""
    form = sketch.choose("div", "reciprocal", "one-over", "power")
    if form == "power":
        exponent = _number(sketch, -0.5, dtype)
        return either(sketch, "Mul", x, sketch.emit("Pow", _epsilon(sketch, mean, dtype), exponent))
    if sketch.rarely():
        root = _epsilon(sketch, sketch.emit("Sqrt", mean), dtype)
    else:
        root = sketch.emit("Sqrt", _epsilon(sketch, mean, dtype))
    if form == "div":
        return sketch.emit("Div", x, root)
    if form == "reciprocal":
        return either(sketch, "Mul", x, sketch.emit("Reciprocal", root))
    return either(sketch, "Mul", x, sketch.emit("Div", _number(sketch, 1, dtype), root))


def rms_norm(sketch: Sketch) -> ir.Value:
    """RMSNorm of decoders."""
    x = hidden(sketch, None)
    if sketch.opset >= 23 and sketch.rarely():
        weight = row(sketch, WIDTH, "weight")
        return sketch.emit("RMSNormalization", x, weight, axis=-1, epsilon=1e-5)
    casts = sketch.choose("none", "same", "double", "half")
    dtype = DOUBLE if casts == "double" else FLOAT
    if casts == "half":
        x = sketch.cast(x, HALF)
    inner = x if casts == "none" else sketch.cast(x, dtype)
    mean = _mean(sketch, _square(sketch, inner, dtype), dtype)
    y = _over_root(sketch, inner, mean, dtype)
    weight_first = sketch.flip()
    if casts in ("double", "half") and not weight_first:
        y = sketch.cast(y, HALF if casts == "half" else FLOAT)
        dtype = HALF if casts == "half" else FLOAT
    form = sketch.choose("weight", "none", "one-plus")
    if form != "none":
        weight = sketch.constant(
            np.random.default_rng(sketch.integer(0, 7)).random(WIDTH) + 0.5, dtype, name="weight"
        )
        if form == "one-plus":
            weight = either(sketch, "Add", weight, _number(sketch, 1, dtype))
        y = either(sketch, "Mul", y, weight)
    return y if sketch.dtype(y) == FLOAT else sketch.cast(y, FLOAT)


def layer_norm(sketch: Sketch) -> ir.Value:
    """LayerNorm: the operator where there is one, or its parts; one Sub or two."""
    x = hidden(sketch, None)
    weight, bias = row(sketch, WIDTH, "weight"), sketch.weight(WIDTH, name="bias")
    if sketch.opset >= 17 and sketch.choose(True, False):
        inputs = [x, weight, bias][: sketch.choose(3, 2)]
        axis, epsilon = sketch.choose(None, -1), sketch.choose(1e-5, None, 1e-12)
        return sketch.emit("LayerNormalization", *inputs, axis=axis, epsilon=epsilon)
    double = sketch.rarely()
    dtype = DOUBLE if double else FLOAT
    inner = sketch.cast(x, DOUBLE) if double else x
    mean = _mean(sketch, inner, dtype)
    centred = sketch.emit("Sub", inner, mean)
    again = sketch.emit("Sub", inner, mean) if sketch.rarely() else centred
    variance = _mean(sketch, _square(sketch, again, dtype), dtype)
    y = _over_root(sketch, centred, variance, dtype)
    y = sketch.cast(y, FLOAT) if double else y
    form = sketch.choose("both", "weight", "none")
    if form != "none":
        y = either(sketch, "Mul", y, weight)
    return either(sketch, "Add", y, bias) if form == "both" else y


def any_norm(sketch: Sketch) -> ir.Value:
    """One of the norms of transformers."""
    return sketch.choose(rms_norm, layer_norm)(sketch)


def l2_norm(sketch: Sketch) -> ir.Value:
    """Vectors of length one, the divisor kept from zero."""
    x = hidden(sketch, None)
    form = sketch.choose("reduce", "sum", "operator")
    if form == "operator":
        shifted = sketch.emit("Abs", x)
        shifted = sketch.emit("Add", shifted, _number(sketch, 0.5))
        return sketch.emit("LpNormalization", shifted, axis=-1, p=2)
    if form == "reduce":
        norm = sketch.reduce("ReduceL2", x, [-1])
    else:
        norm = sketch.emit("Sqrt", sketch.reduce("ReduceSum", _square(sketch, x), [-1]))
    if sketch.flip():
        norm = sketch.emit("Max", norm, _number(sketch, 1e-6))
    else:
        norm = sketch.emit("Clip", norm, sketch.constant(np.float32(1e-6)))
    if sketch.flip():
        norm = sketch.emit("Expand", norm, sketch.extents(x))
    return sketch.emit("Div", x, norm)


def group_norm(sketch: Sketch) -> ir.Value:
    """GroupNorm: the operator, or InstanceNormalization between two reshapes."""
    x = sketch.pick(
        4, where=lambda s: s[1] == 4 and solid(sketch)(s), otherwise=["N", 4, "S", WIDTH]
    )
    if sketch.opset >= 21 and sketch.flip():
        scale, bias = row(sketch, 4), sketch.weight(4, name="bias")
        return sketch.emit("GroupNormalization", x, scale, bias, num_groups=2)
    shape = sketch.extents(x)
    flat = sketch.reshape(x, 0, 2, -1)
    ones = sketch.constant(np.ones(2, np.float32), name="scale")
    zeros = sketch.constant(np.zeros(2, np.float32), name="bias")
    y = sketch.emit("Reshape", sketch.emit("InstanceNormalization", flat, ones, zeros), shape)
    if sketch.flip():
        scale = sketch.constant(np.linspace(0.5, 1.5, 4, dtype=np.float32).reshape(4, 1, 1))
        y = either(sketch, "Mul", y, scale)
    return y


MOTIFS = (
    Motif("rms-norm", rms_norm),
    Motif("layer-norm", layer_norm),
    Motif("l2-norm", l2_norm),
    Motif("group-norm", group_norm),
)
