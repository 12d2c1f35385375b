"""Convolution, pooling, resizing."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from lwc.analysis.shape_rules.linear import register_product
from lwc.analysis.shape_rules.registry import Fact, Misfit, Outcome, Site, axis_of, extent, rule
from lwc.core.dims import Dim, DimShape, add, ceil_div, floor_div, minimum, multiply, subtract

__all__: list[str] = []


def _windows(site: Site, source: DimShape, kernel: list[Dim], pool: bool) -> DimShape:
    """Return the number of window positions along each spatial axis of `source`."""
    rank = len(kernel)
    strides = site.attribute("strides") or [1] * rank
    dilations = site.attribute("dilations") or [1] * rank
    pads = site.attribute("pads") or [0] * (2 * rank)
    auto = _text(site.attribute("auto_pad", "NOTSET"))
    up = pool and bool(site.attribute("ceil_mode", 0))
    result: list[Dim] = []
    for axis in range(rank):
        size, stride = source[axis], strides[axis]
        if auto.startswith("SAME"):
            result.append(ceil_div(size, stride))
            continue
        reach = add(multiply(dilations[axis], subtract(kernel[axis], 1)), 1)
        before, after = (0, 0) if auto == "VALID" else (pads[axis], pads[axis + rank])
        span = subtract(add(size, before + after), reach)
        if isinstance(span, int) and span < 0:
            raise Misfit("the window is larger than the padded input")
        result.append(add((ceil_div if up else floor_div)(span, stride), 1))
        if up:
            # No window may start in the end padding: index * stride < size + before.
            last = floor_div(subtract(add(size, before), 1), stride)
            result[-1] = minimum(result[-1], add(last, 1))
    return tuple(result)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _convolved(site: Site, data: DimShape | None, weight: DimShape | None) -> DimShape | None:
    if data is None:
        return None if weight is None else site.fresh_shape(len(weight))
    if weight is None:
        return (data[0], *site.fresh_shape(len(data) - 1))
    if len(data) != len(weight) or len(data) < 3:
        raise Misfit("data and weight differ in rank")
    kernel = list(site.attribute("kernel_shape") or weight[2:])
    return (data[0], weight[0], *_windows(site, data[2:], kernel, pool=False))


register_product("Conv com.microsoft::FusedConv", "ConvInteger", "QLinearConv", _convolved)


@rule("ConvTranspose")
def _conv_transpose(site: Site) -> Outcome:
    data, weight = site.shape(0), site.shape(1)
    if data is None or weight is None:
        known = data or weight
        return Fact(site.dtype(0), None if known is None else site.fresh_shape(len(known)))
    kernel = list(site.attribute("kernel_shape") or weight[2:])
    rank = len(kernel)
    channels = multiply(weight[1], site.attribute("group", 1))
    wanted = site.attribute("output_shape")
    if wanted:
        return Fact(site.dtype(0), (data[0], channels, *wanted[-rank:]))
    strides = site.attribute("strides") or [1] * rank
    dilations = site.attribute("dilations") or [1] * rank
    pads = site.attribute("pads") or [0] * (2 * rank)
    extra = site.attribute("output_padding") or [0] * rank
    auto = _text(site.attribute("auto_pad", "NOTSET"))
    result = []
    for axis in range(rank):
        size = data[2 + axis]
        reach = add(multiply(dilations[axis], subtract(kernel[axis], 1)), 1)
        grown = add(multiply(strides[axis], subtract(size, 1)), add(reach, extra[axis]))
        if auto.startswith("SAME"):
            result.append(minimum(multiply(size, strides[axis]), grown))
            continue
        trim = 0 if auto == "VALID" else pads[axis] + pads[axis + rank]
        result.append(subtract(grown, trim))
    return Fact(site.dtype(0), (data[0], channels, *result))


@rule("MaxPool AveragePool LpPool com.microsoft::QLinearAveragePool")
def _pool(site: Site) -> Outcome:
    data = site.shape(0)
    kernel = list(site.attribute("kernel_shape"))
    if data is None:
        shape: DimShape = site.fresh_shape(len(kernel) + 2)
    else:
        shape = (*data[:2], *_windows(site, data[2:], kernel, pool=True))
    return [Fact(site.dtype(0), shape), Fact(ir.DataType.INT64, shape)]


@rule("GlobalAveragePool GlobalMaxPool GlobalLpPool com.microsoft::QLinearGlobalAveragePool")
def _global_pool(site: Site) -> Outcome:
    data = site.shape(0)
    shape = None if data is None else (*data[:2], *([1] * (len(data) - 2)))
    return Fact(site.dtype(0), shape)


@rule("Resize")
def _resize(site: Site) -> Outcome:
    data, dtype = site.shape(0), site.dtype(0)
    if data is None:
        return Fact(dtype)
    rank = len(data)
    named = site.attribute("axes")
    axes = list(range(rank)) if named is None else [axis_of(axis, rank) for axis in named]
    shape = list(data)
    policy = _text(site.attribute("keep_aspect_ratio_policy", "stretch"))
    sizes = site.known(3) if site.has(3) else None
    if sizes is not None and policy == "stretch":
        for axis, element in zip(axes, sizes.tolist(), strict=True):
            shape[axis] = extent(site, element)
        return Fact(dtype, tuple(shape))
    scales = site.known(2) if not site.has(3) and site.has(2) else None
    if scales is None or scales.size == 0:
        for axis in axes:
            shape[axis] = site.fresh()
        return Fact(dtype, tuple(shape))
    for axis, scale in zip(axes, scales.tolist(), strict=True):
        shape[axis] = _scaled(site, data[axis], scale)
    return Fact(dtype, tuple(shape))


def _scaled(site: Site, size: Dim, scale: Any) -> Dim:
    """Return floor(size * scale)."""
    if not isinstance(scale, float):
        return site.fresh()
    if scale.is_integer():
        return multiply(size, int(scale))
    if isinstance(size, int):
        # The runtime multiplies in float32; a product next to an integer could round either way.
        exact = size * scale
        return math.floor(exact) if abs(exact - round(exact)) > 1e-4 else site.fresh()
    numerator, denominator = scale.as_integer_ratio()
    if denominator > 64:
        return site.fresh()
    return floor_div(multiply(size, numerator), denominator)


@rule("STFT")
def _stft(site: Site) -> Outcome:
    # onnx's own inference forgets that `onesided` is on by default.
    signal, dtype = site.shape(0), site.dtype(0)
    step, length = site.known(1), site.known(3)
    window = site.shape(2) if site.has(2) else None
    size: Dim | None = window[0] if window else None
    if size is None and length is not None:
        size = extent(site, length.flat[0])
    if signal is None or size is None:
        batch = site.fresh() if signal is None else signal[0]
        return Fact(dtype, (batch, site.fresh(), site.fresh(), 2))
    bins = add(floor_div(size, 2), 1) if site.attribute("onesided", 1) else size
    frames: Dim = site.fresh()
    if step is not None and isinstance(step.flat[0], int) and step.flat[0] > 0:
        frames = add(floor_div(subtract(signal[1], size), step.flat[0]), 1)
    return Fact(dtype, (signal[0], frames, bins, 2))
