"""Quantized weights and activations, and detours through smaller types."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import WIDTH, either, hidden, weighted
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS"]

FLOAT, HALF, DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE


def _codes(sketch: Sketch, signed: bool, *extents: int, bits: int = 8) -> ir.Value:
    rng = np.random.default_rng(sketch.integer(0, 7))
    low = -(1 << bits - 1) if signed else 0
    high = low + (1 << bits)
    kind = np.int8 if signed else np.uint8
    return sketch.constant(rng.integers(low, high, extents).astype(kind), name="codes")


def dequantized(sketch: Sketch) -> ir.Value:
    """A linear layer with 8-bit weights: a scale for all, for each column, or for each block."""
    x = hidden(sketch, None)
    signed = sketch.flip()
    codes = _codes(sketch, signed, WIDTH, WIDTH)
    zero_type = ir.DataType.INT8 if signed else ir.DataType.UINT8
    forms = ["tensor", "column", "row"] + (["block"] if sketch.opset >= 21 else [])
    form = sketch.choose(*forms)
    extents = {"tensor": (), "block": (2, WIDTH)}.get(form, (WIDTH,))
    rng = np.random.default_rng(sketch.integer(0, 7))
    scale = sketch.constant(((rng.random(extents) + 0.5) / 128).astype(np.float32), name="scale")
    inputs = [codes, scale]
    if not signed or sketch.flip():
        number = 0 if signed else 128
        inputs.append(sketch.constant(np.full(extents, number), zero_type, name="zero_point"))
    axis = {"column": 1, "row": 0, "block": 0}.get(form)
    block = WIDTH // 2 if form == "block" else None
    weights = sketch.emit("DequantizeLinear", *inputs, axis=axis, block_size=block)
    if sketch.rarely():
        weights = sketch.emit("Transpose", weights, perm=[1, 0])
    y = sketch.emit("MatMul", x, weights)
    return either(sketch, "Add", y, sketch.weight(WIDTH, name="bias")) if sketch.flip() else y


def rounded(sketch: Sketch) -> ir.Value:
    """A value quantized and dequantized again, as quantization-aware training leaves it."""
    x = sketch.emit("Tanh", hidden(sketch, None))
    scale = sketch.constant(np.float32(1 / 64), name="scale")
    zero = sketch.constant(np.array(sketch.choose(128, 100), np.uint8), name="zero_point")
    y = sketch.emit("DequantizeLinear", sketch.emit("QuantizeLinear", x, scale, zero), scale, zero)
    return weighted(sketch, y) if sketch.flip() else y


def dynamic(sketch: Sketch) -> ir.Value:
    """A linear layer in integers, its input quantized as it comes."""
    x = hidden(sketch, None)
    codes, scale, zero = sketch.emit_all("DynamicQuantizeLinear", x, outputs=3)
    # Of 8 bits, sums of two products saturate in ONNX Runtime where a processor has no VNNI.
    weights = _codes(sketch, True, WIDTH, WIDTH, bits=7)
    product = sketch.cast(sketch.emit("MatMulInteger", codes, weights, zero), FLOAT)
    weight_scale = sketch.constant(np.float32(1 / 256), name="scale")
    y = sketch.emit("Mul", product, sketch.emit("Mul", scale, weight_scale))
    return either(sketch, "Add", y, sketch.weight(WIDTH, name="bias")) if sketch.flip() else y


def table(sketch: Sketch) -> ir.Value:
    """Token vectors looked up in an 8-bit table, dequantized before or after."""
    ids = sketch.input(["N", "S"], ir.DataType.INT64, name="token_ids")
    codes = _codes(sketch, True, 11, WIDTH)
    scale = sketch.constant(np.float32(1 / 64), name="scale")
    zero = sketch.constant(np.int8(0), name="zero_point")
    if sketch.flip():
        return sketch.emit("Gather", sketch.emit("DequantizeLinear", codes, scale, zero), ids)
    return sketch.emit("DequantizeLinear", sketch.emit("Gather", codes, ids), scale, zero)


def half(sketch: Sketch) -> ir.Value:
    """A stretch of the graph in float16, or one that only passes through it."""
    x = hidden(sketch, None)
    y = sketch.cast(x, HALF)
    form = sketch.choose("linear", "none", "arithmetic")
    if form == "linear":
        y = sketch.emit("MatMul", y, sketch.weight(WIDTH, WIDTH, dtype=HALF))
        y = sketch.emit("Add", y, sketch.weight(WIDTH, dtype=HALF, name="bias"))
    elif form == "arithmetic":
        y = sketch.emit("Mul", y, sketch.constant(np.float16(0.5)))
    return sketch.cast(y, FLOAT)


def double(sketch: Sketch) -> ir.Value:
    """A stretch in float64, as numpy constants bring it about; or a cast to the same type."""
    x = sketch.pick()
    if sketch.flip():
        return sketch.cast(x, FLOAT)
    y = sketch.cast(x, DOUBLE)
    if sketch.flip():
        y = either(sketch, "Mul", y, sketch.constant(np.array(0.5), DOUBLE))
        return sketch.cast(y, FLOAT)
    # ONNX Runtime removes the two casts, but not from the branches of an If that read the second.
    return sketch.emit(sketch.choose("Tanh", "Neg"), sketch.cast(y, FLOAT))


MOTIFS = (
    Motif("dequantized-weights", dequantized),
    Motif("rounded-activations", rounded),
    Motif("dynamic-quantization", dynamic),
    Motif("quantized-table", table),
    Motif("half", half),
    Motif("double", double),
)
