"""Casts between element types."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
import torch

from lwc.backends.fx.registry import Use, op
from lwc.core.torch_types import tensor_of_array, type_literal

__all__ = ["cast"]

Tensor: TypeAlias = torch.Tensor
RoundMode: TypeAlias = Literal["up", "down", "nearest"]

_EIGHT_BITS = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    }
)


@op("Cast", types="to")
def cast(
    x: Tensor, *, to: torch.dtype | str, saturate: int = 1, round_mode: RoundMode = "up"
) -> Tensor:
    """Change the element type; floats are cut toward zero."""
    if isinstance(to, str):
        return _through_numpy(x, ir.DataType[to.upper()])
    if to == torch.float8_e8m0fnu:
        return _to_powers(x.to(torch.float32), saturate, round_mode)
    if to in _EIGHT_BITS and x.is_floating_point():
        return _to_eight_bits(x, to, saturate)
    if x.is_floating_point() and not to.is_floating_point and to not in _TRUTH:
        return x.to(torch.int64).to(to)
    return x.to(to)


_TRUTH = frozenset({torch.bool, torch.complex64, torch.complex128})


def _to_eight_bits(x: Tensor, to: torch.dtype, saturate: int) -> Tensor:
    limit = torch.finfo(to).max
    if saturate:
        return x.clamp(-limit, limit).to(to)
    return _through_numpy(x, _ONNX_TYPES[to])


def _to_powers(x: Tensor, saturate: int, mode: RoundMode) -> Tensor:
    """Cast to float8e8m0, which holds powers of two: `2**(bits - 127)`, or NaN as 255."""
    mantissa, exponent = torch.frexp(x)  # the mantissa is 0.5 or more, and less than 1
    bits = exponent + 126
    if mode == "up":
        bits = torch.where(mantissa > 0.5, bits + 1, bits)
    elif mode == "nearest":
        bits = torch.where(mantissa >= 0.75, bits + 1, bits)
    bits = torch.where(x == 0, torch.zeros_like(bits), bits)
    bits = torch.where(x.isinf(), torch.full_like(bits, 255), bits)
    bits = bits.clamp(0, 254) if saturate else torch.where(bits > 254, 255, bits.clamp(min=0))
    bits = torch.where(x.isnan(), torch.full_like(bits, 255), bits)
    return bits.to(torch.uint8).view(torch.float8_e8m0fnu)


_ONNX_TYPES = {
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e4m3fnuz: ir.DataType.FLOAT8E4M3FNUZ,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
    torch.float8_e5m2fnuz: ir.DataType.FLOAT8E5M2FNUZ,
}


def _through_numpy(x: Tensor, dtype: ir.DataType) -> Tensor:
    array = x.detach().to(torch.float32).numpy() if x.is_floating_point() else x.numpy()
    with np.errstate(all="ignore"):
        return tensor_of_array(array.astype(dtype.numpy()), dtype)


def _target(use: Use) -> dict[str, Any]:
    dtype = use.dtype(1)
    return {} if dtype is None else {"to": type_literal(dtype)}


@op("CastLike", extra=_target)
def cast_like(
    x: Tensor,
    like: Tensor,
    *,
    to: torch.dtype | str | None = None,
    saturate: int = 1,
    round_mode: RoundMode = "up",
) -> Tensor:
    """Change the element type to that of another tensor."""
    wanted = like.dtype if to is None else to
    return cast(x, to=wanted, saturate=saturate, round_mode=round_mode)


@op("BitCast", types="to")
def bit_cast(x: Tensor, *, to: torch.dtype) -> Tensor:
    """Take the bits for those of another type."""
    return x.view(to)
