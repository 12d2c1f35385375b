"""Convolutions and pooling in one and two dimensions, with what surrounds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.verify.generate.motifs.common import WIDTH, either, hidden, row, solid
from lwc.verify.generate.motifs.linear import batch_normalized
from lwc.verify.generate.sketch import Motif, Sketch

__all__ = ["MOTIFS"]

CHANNELS = 4


def _image(sketch: Sketch, axes: int) -> ir.Value:
    """Draw `[N, 4, spatial…]` with no axis that can be empty."""
    shape: list[int | str | None] = ["N", CHANNELS, "S", WIDTH]
    return sketch.pick(
        2 + axes,
        where=lambda s: s[1] == CHANNELS and solid(sketch)(s),
        otherwise=shape[: 2 + axes],
    )


def _window(sketch: Sketch, axes: int, kernel: int) -> dict[str, Any]:
    """Draw pads, strides and dilations under which the window fits even one place."""
    dilation = sketch.choose(1, 2) if kernel > 1 else 1
    strides = sketch.choose(None, [1] * axes, [2] * axes)
    reach = dilation * (kernel - 1)
    attributes: dict[str, Any] = {"strides": strides}
    if dilation > 1 or sketch.rarely():
        attributes["dilations"] = [dilation] * axes
    if sketch.rarely():
        attributes["auto_pad"] = sketch.choose("SAME_UPPER", "SAME_LOWER")
        attributes.pop("dilations", None)
    elif reach:
        before = sketch.choose((reach + 1) // 2, reach, 0)
        attributes["pads"] = [before] * axes + [reach - before + (before == reach)] * axes
    elif sketch.rarely():
        attributes["auto_pad"] = sketch.choose("VALID", "NOTSET")
    return attributes


def _convolved(sketch: Sketch, x: ir.Value, axes: int, op: str = "Conv") -> ir.Value:
    groups = sketch.choose(1, CHANNELS, 2)
    kernel = sketch.choose(1, 3, 2)
    attributes = _window(sketch, axes, kernel)
    if op == "ConvTranspose":
        attributes = {"strides": attributes["strides"]}
        if kernel == 3 and sketch.flip() and attributes["strides"] == [2] * axes:
            attributes["output_padding"] = [1] * axes
    extents = (CHANNELS, CHANNELS // groups, *[kernel] * axes)
    weights = sketch.weight(*extents)
    if sketch.rarely() and op == "Conv":
        factor = sketch.constant(np.full((CHANNELS, 1, *[1] * axes), 0.5, np.float32))
        weights = sketch.emit("Mul", weights, factor)
    inputs = [x, weights]
    if sketch.flip():
        inputs.append(sketch.weight(CHANNELS, name="bias"))
    return sketch.emit(
        op,
        *inputs,
        group=groups if groups > 1 or sketch.rarely() else None,
        kernel_shape=[kernel] * axes if sketch.flip() else None,
        **attributes,
    )


def convolution(sketch: Sketch) -> ir.Value:
    """A convolution, then BatchNormalization, a scale of channels, or an activation, or neither."""
    axes = sketch.choose(1, 2)
    y = _convolved(sketch, _image(sketch, axes), axes)
    form = sketch.choose("plain", "batch-norm", "scale", "shift")
    channels = (CHANNELS, *[1] * axes)
    if form == "batch-norm":
        y = batch_normalized(sketch, y, CHANNELS)
    elif form != "plain":
        extents = sketch.choose(channels, (1, *channels), ())
        rng = np.random.default_rng(sketch.integer(0, 7))
        number = sketch.constant((rng.random(extents) + 0.5).astype(np.float32), name="scale")
        y = either(sketch, "Mul" if form == "scale" else "Add", y, number)
    return sketch.emit(sketch.choose("Relu", "Sigmoid"), y) if sketch.flip() else y


def padded(sketch: Sketch) -> ir.Value:
    """A Pad before a convolution or a pooling, of zeros or not, on the spatial axes or not."""
    axes = sketch.choose(1, 2)
    x = _image(sketch, axes)
    pads = [0, 0, *[1] * axes, 0, 0, *[sketch.choose(1, 2)] * axes]
    if sketch.rarely():
        pads[0] = 1
    mode = sketch.choose(None, "constant", "edge")
    inputs = [x, sketch.ints(*pads)]
    if mode != "edge" and sketch.flip():
        inputs.append(sketch.constant(np.float32(sketch.choose(0.0, 1.0, -1.0))))
    y = sketch.emit("Pad", *inputs, mode=mode)
    op = sketch.choose("Conv", "AveragePool", "MaxPool")
    if op == "Conv":
        return _convolved(sketch, y, axes)
    return _pooled(sketch, y, axes, op)


def shifted(sketch: Sketch) -> ir.Value:
    """A constant added, subtracted or multiplied right before a convolution, padded or not."""
    axes = sketch.choose(1, 2)
    x = _image(sketch, axes)
    channels = (CHANNELS, *[1] * axes)
    rng = np.random.default_rng(sketch.integer(0, 7))
    form = sketch.choose(channels, (), (1,))
    constant = sketch.constant((rng.random(form) + 0.5).astype(np.float32))
    op = sketch.choose("Add", "Sub", "Mul", "Div")
    x = sketch.emit(op, x, constant)
    return _convolved(sketch, x, axes, sketch.choose("Conv", "Conv", "ConvTranspose"))


def _pooled(sketch: Sketch, x: ir.Value, axes: int, op: str) -> ir.Value:
    kernel = sketch.choose(1, 2, 3)
    pads = None if kernel == 1 else [1] * axes + [1] * axes
    counted = sketch.choose(None, 1, 0) if op == "AveragePool" else None
    return sketch.emit(
        op,
        x,
        kernel_shape=[kernel] * axes,
        pads=pads,
        strides=sketch.choose(None, [2] * axes),
        count_include_pad=counted,
        ceil_mode=1 if sketch.rarely() else None,
    )


def pooled(sketch: Sketch) -> ir.Value:
    """A pooling by windows, or over all places at once."""
    axes = sketch.choose(2, 1)
    x = _image(sketch, axes)
    op = sketch.choose("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
    if op == "GlobalAveragePool":
        y = sketch.emit(op, x)
        return sketch.emit("Flatten", y) if sketch.flip() else y
    if op == "ReduceMean":
        return sketch.reduce(op, x, list(range(2, 2 + axes)), keepdims=sketch.choose(1, 0))
    return _pooled(sketch, x, axes, op)


def transposed(sketch: Sketch) -> ir.Value:
    """A transposed convolution, with groups, then BatchNormalization or not."""
    axes = sketch.choose(1, 2)
    y = _convolved(sketch, _image(sketch, axes), axes, "ConvTranspose")
    return batch_normalized(sketch, y, CHANNELS) if sketch.flip() else y


def separable(sketch: Sketch) -> ir.Value:
    """A depthwise convolution, then a pointwise one, added to what came in."""
    x = _image(sketch, 2)
    y = sketch.emit("Conv", x, sketch.weight(CHANNELS, 1, 3, 3), group=CHANNELS, pads=[1] * 4)
    y = sketch.emit("Relu", batch_normalized(sketch, y, CHANNELS))
    y = sketch.emit("Conv", y, sketch.weight(CHANNELS, CHANNELS, 1, 1))
    return either(sketch, "Add", x, y)


def over_states(sketch: Sketch) -> ir.Value:
    """A convolution along the length of hidden states, between two Transposes."""
    x = hidden(sketch)
    y = sketch.emit("Transpose", x, perm=[0, 2, 1])
    y = sketch.emit("Conv", y, sketch.weight(WIDTH, WIDTH, 1), row(sketch, WIDTH, "bias"))
    return sketch.emit("Transpose", y, perm=[0, 2, 1])


def patches(sketch: Sketch) -> ir.Value:
    """An image cut into patches and laid out as hidden states."""
    last = 4 if sketch.flip() else "S"
    x = sketch.input(["N", 3, 4, last], name="pixels")
    wide = sketch.shape(x)[-1] == 4
    kernel = [2, 2] if wide else [2, 1]
    y = sketch.emit("Conv", x, sketch.weight(WIDTH, 3, *kernel), strides=kernel)
    y = sketch.reshape(y, 0, WIDTH, -1)
    return sketch.emit("Transpose", y, perm=[0, 2, 1])


MOTIFS = (
    Motif("convolution", convolution),
    Motif("pad-window", padded),
    Motif("shifted-convolution", shifted),
    Motif("pooling", pooled),
    Motif("transposed-convolution", transposed),
    Motif("separable-convolution", separable),
    Motif("convolved-states", over_states),
    Motif("patches", patches),
)
