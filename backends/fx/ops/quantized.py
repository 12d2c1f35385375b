"""Quantization, and products of quantized tensors.

With `straight_through`, quantized values are floating-point tensors of whole numbers, which carry
gradients: rounding passes them on, and what a type cannot hold gets none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch

from lwc.backends.fx.ops.casting import cast
from lwc.backends.fx.ops.convolution import convolve
from lwc.backends.fx.ops.rounding import clamped, rounded
from lwc.backends.fx.ops.windows import AutoPad
from lwc.backends.fx.registry import Use, op
from lwc.core.torch_types import held_as, integer_range, type_literal

__all__ = ["output_like", "quantized", "real", "requantized"]

Tensor: TypeAlias = torch.Tensor


def spread(values: Tensor, x: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """Bring scales or zero points to where they broadcast against x.

    They are one for all, one for each place along `axis`, or one for each block along it.
    """
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if values.numel() == 1 and values.dim() <= 1:
        return values.reshape(())
    if values.dim() != 1:
        return values
    view = [1] * x.dim()
    view[axis] = -1
    return values.reshape(view)


def requantized(
    steps: Tensor, dtype: torch.dtype, low: int, high: int, straight_through: bool = False
) -> Tensor:
    """Turn numbers of steps, zero point included, into quantized values."""
    bounded = clamped(steps, low, high)
    return bounded if straight_through else bounded.to(dtype)


def _kept_in(dtype: ir.DataType) -> dict[str, Any]:
    bounds = integer_range(dtype)
    if bounds is None:
        return {"to": type_literal(dtype)}
    return {"to": held_as(dtype), "low": bounds[0], "high": bounds[1]}


def _quantized_type(use: Use) -> Mapping[str, Any]:
    named = use.attribute("output_dtype", 0)
    dtype = use.dtype(2) or ir.DataType(named or ir.DataType.UINT8)
    return _kept_in(dtype)


@op(
    "QuantizeLinear com.microsoft::QuantizeLinear",
    extra=_quantized_type,
    ignored="output_dtype precision",
)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    saturate: int = 1,
    to: torch.dtype | str,
    low: int | None = None,
    high: int | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Return round(x / scale) + zero_point within the range of the type `to`."""
    steps = x.to(scale.dtype) / spread(scale, x, axis, block_size)
    if low is None or high is None:
        return cast(steps, to=to, saturate=saturate)
    whole = rounded(steps, straight_through)
    if zero_point is not None:
        whole = whole + spread(zero_point, x, axis, block_size).to(whole.dtype)
    assert isinstance(to, torch.dtype)
    return requantized(whole, to, low, high, straight_through)


@op("DequantizeLinear com.microsoft::DequantizeLinear", types="output_dtype")
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (x - zero_point) * scale."""
    wide = x.to(torch.float32) if scale.dtype in _HALVES else x.to(scale.dtype)
    if zero_point is not None:
        wide = wide - spread(zero_point, x, axis, block_size).to(wide.dtype)
    y = wide * spread(scale, x, axis, block_size).to(wide.dtype)
    return y.to(output_dtype or scale.dtype)


_HALVES = frozenset({torch.float16, torch.bfloat16})


@op("DynamicQuantizeLinear", many=True)
def dynamic_quantize_linear(
    x: Tensor, *, straight_through: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to uint8 by the range of x, 0 included; return values, scale and zero point."""
    low = high = x.new_zeros(())
    if not (isinstance(x.numel(), int) and x.numel() == 0):
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = torch.where(high == low, torch.ones_like(low), (high - low) / 255)
    step = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = rounded(clamped(-low / step, 0, 255), straight_through)
    whole = rounded(x / step, straight_through) + zero
    kept = requantized(whole, torch.uint8, 0, 255, straight_through)
    return kept, scale, zero if straight_through else zero.to(torch.uint8)


# Products


def _whole(x: Tensor, zero_point: Tensor | None, axis: int = -1) -> Tensor:
    """Return integers less their zero points, in float64, where their products are exact."""
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    zero = zero_point.to(torch.float64)
    return wide - (spread(zero, x, axis) if zero.dim() <= 1 else zero)


def _as_integer(total: Tensor, *values: Tensor) -> Tensor:
    """Return a sum of products as int32, unless gradients made floats of the factors."""
    if any(value.is_floating_point() for value in values):
        return total.to(torch.float32)
    return total.to(torch.int32)


@op("MatMulInteger")
def matmul_integer(
    a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """Multiply matrices of integers, exactly."""
    rows = _whole(a, a_zero, -2 if a.dim() > 1 else 0)
    return _as_integer(torch.matmul(rows, _whole(b, b_zero)), a, b)


@op("ConvInteger", ignored="kernel_shape")
def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    group: int = 1,
) -> Tensor:
    """Convolve integers, exactly."""
    total = convolve(
        _whole(x, x_zero),
        _whole(weight, w_zero, 0),
        None,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        group=group,
    )
    return _as_integer(total, x, weight)


def output_like(index: int) -> Any:
    """Return what tells an operator that its output is of the type of an input."""

    def extra(use: Use) -> Mapping[str, Any]:
        return _kept_in(use.dtype(index) or ir.DataType.UINT8)

    return extra


def quantized(
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    to: torch.dtype,
    low: int,
    high: int,
    straight_through: bool,
) -> Tensor:
    """Return round(y / scale) + zero_point within the bounds of a type."""
    whole = rounded((y / scale.to(y.dtype)).to(torch.float32), straight_through)
    if zero_point is not None:
        whole = whole + zero_point.to(whole.dtype)
    return requantized(whole, to, low, high, straight_through)


def real(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int = -1) -> Tensor:
    """Return what quantized values stand for, in float64."""
    return _whole(x, zero_point, axis) * spread(scale.to(torch.float64), x, axis)


@op("QLinearMatMul", extra=output_like(7))
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    *,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Multiply quantized matrices and quantize the product."""
    y = torch.matmul(real(a, a_scale, a_zero, -2), real(b, b_scale, b_zero))
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("QLinearConv", ignored="kernel_shape", extra=output_like(7))
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    group: int = 1,
    to: torch.dtype,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Convolve quantized tensors and quantize the result."""
    y = convolve(
        real(x, x_scale, x_zero),
        real(weight, w_scale, w_zero, 0),
        None if bias is None else bias * x_scale.to(torch.float64) * w_scale.to(torch.float64),
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        group=group,
    )
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


def _gemm_type(use: Use) -> Mapping[str, Any]:
    named = use.dtype(8)
    return {} if named is None else _kept_in(named)


@op("com.microsoft::QGemm", extra=_gemm_type)
def qgemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 1,
    transA: int = 0,
    transB: int = 0,
    to: torch.dtype | None = None,
    low: int = 0,
    high: int = 255,
    straight_through: bool = False,
) -> Tensor:
    """Gemm of quantized matrices; the product is quantized where a scale for it is given."""
    rows = real(a, a_scale, a_zero)
    columns = real(b, b_scale, b_zero, 0 if transB else 1)
    y = alpha * torch.matmul(rows.T if transA else rows, columns.T if transB else columns)
    if c is not None:
        y = y + c * (alpha * a_scale.to(torch.float64) * b_scale)
    if y_scale is None or to is None:
        return y.to(a_scale.dtype)
    return quantized(y, y_scale, y_zero, to, low, high, straight_through)


@op("com.microsoft::MatMulIntegerToFloat")
def matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply quantized matrices; the product is a float."""
    y = torch.matmul(_whole(a, a_zero), _whole(b, b_zero)).to(a_scale.dtype)
    y = y * a_scale * b_scale
    return y if bias is None else y + bias


@op("com.microsoft::DynamicQuantizeMatMul")
def dynamic_quantize_matmul(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    straight_through: bool = False,
) -> Tensor:
    """Quantize activations by their range and multiply them with quantized weights."""
    kept, scale, zero = dynamic_quantize_linear(a, straight_through=straight_through)
    return matmul_integer_to_float(kept, b, scale, b_scale, zero, b_zero, bias)
