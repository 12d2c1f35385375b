"""ONNX Runtime's operators that read quantized tensors and give one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from lwc.backends.fx.ops.pooling import average_pool, global_average_pool
from lwc.backends.fx.ops.quantized import output_like, quantized, real
from lwc.backends.fx.ops.windows import AutoPad
from lwc.backends.fx.registry import op
from lwc.core.errors import LwcError

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor


@op("com.microsoft::QLinearAdd", extra=output_like(0))
def qlinear_add(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Add quantized tensors and quantize the sum."""
    y = real(a, a_scale, a_zero) + real(b, b_scale, b_zero)
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearMul", extra=output_like(0))
def qlinear_mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Multiply quantized tensors and quantize the product."""
    y = real(a, a_scale, a_zero) * real(b, b_scale, b_zero)
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearSigmoid", extra=output_like(0))
def qlinear_sigmoid(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Sigmoid of a quantized tensor, quantized."""
    y = torch.sigmoid(real(x, x_scale, x_zero))
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearLeakyRelu", extra=output_like(0))
def qlinear_leaky_relu(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 0.01,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """LeakyRelu of a quantized tensor, quantized."""
    y = torch.nn.functional.leaky_relu(real(x, x_scale, x_zero), alpha)
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearSoftmax", extra=output_like(0))
def qlinear_softmax(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    axis: int = -1,
    opset: int = 13,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Softmax of a quantized tensor, quantized."""
    wide = real(x, x_scale, x_zero)
    if opset < 13:
        first = axis % x.dim()
        y = torch.softmax(wide.flatten(first), -1).reshape(x.shape)
    else:
        y = torch.softmax(wide, axis)
    # ONNX Runtime counts the whole steps to 1 in float32: 254 of 1 / 255.
    steps = torch.floor(1 / y_scale.to(torch.float32))
    return quantized(y * steps, torch.ones_like(steps), y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearConcat", extra=output_like(1))
def qlinear_concat(
    y_scale: Tensor,
    y_zero: Tensor,
    *parts: Tensor,
    axis: int,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Join quantized tensors: each of `parts` is followed by its scale and its zero point."""
    each = [real(*parts[at : at + 3]) for at in range(0, len(parts), 3)]
    y = torch.cat(each, axis)
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearWhere", extra=output_like(1))
def qlinear_where(
    condition: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    y: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    z_scale: Tensor,
    z_zero: Tensor,
    *,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Choose between quantized tensors."""
    z = torch.where(condition, real(x, x_scale, x_zero), real(y, y_scale, y_zero))
    return quantized(z, z_scale, z_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearAveragePool", extra=output_like(0), zero="channels_last")
def qlinear_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Average windows of a quantized tensor and quantize the averages.

    Raises:
        LwcError: Windows end beyond the padding and count it, which ONNX Runtime computes in a way
            of its own.
    """
    if ceil_mode and count_include_pad:
        raise LwcError("ceil_mode and count_include_pad together have no lowering")
    y = average_pool(
        real(x, x_scale, x_zero),
        kernel_shape=kernel_shape,
        strides=strides,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
    )
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::QLinearGlobalAveragePool", extra=output_like(0), zero="channels_last")
def qlinear_global_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    *,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Average channels of a quantized tensor and quantize the averages."""
    y = global_average_pool(real(x, x_scale, x_zero))
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)
