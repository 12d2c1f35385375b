"""Element types: how PyTorch holds what ONNX names.

Types that PyTorch cannot compute with lie unpacked in the next larger one: 4-bit and 2-bit integers
in 8 bits, `float4e2m1` in float32. Tensors of strings are numpy arrays of objects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lwc.core.errors import LwcError

__all__ = [
    "WIDENED",
    "array_of",
    "held_as",
    "integer_range",
    "is_floating",
    "tensor_of_array",
    "type_literal",
]

_SAME: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
}

_OWN: dict[torch.dtype, ir.DataType] = {kind: dtype for dtype, kind in _SAME.items()}

_UNPACKED: dict[ir.DataType, torch.dtype] = {
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.FLOAT4E2M1: torch.float32,
}

_BEYOND_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.BFLOAT16: np.int16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
    ir.DataType.FLOAT8E8M0: np.uint8,
}
"""Types that pass between numpy (as those of ml_dtypes) and PyTorch as plain bits."""

WIDENED = frozenset({ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64})
"""Types that PyTorch holds but hardly computes with: int64 does it for them."""


def held_as(dtype: ir.DataType) -> torch.dtype:
    """Return the PyTorch type that holds elements of an ONNX type.

    Raises:
        LwcError: There is none.
    """
    found = _SAME.get(dtype) or _UNPACKED.get(dtype)
    if found is None:
        raise LwcError(
            f"PyTorch has no tensors of type {dtype.name}",
            remedy="run the module on ONNX Runtime",
        )
    return found


def type_literal(dtype: ir.DataType) -> torch.dtype | str:
    """Return what generated code writes for a type: PyTorch's, or a name where it has none.

    Raises:
        LwcError: PyTorch cannot hold it either.
    """
    held_as(dtype)
    return _SAME.get(dtype) or dtype.name.lower()


def is_floating(dtype: ir.DataType) -> bool:
    """Tell whether a tensor of this type can be trained."""
    return dtype in (
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
    )


def integer_range(dtype: ir.DataType) -> tuple[int, int] | None:
    """Return the least and greatest integer of a type of quantized values, None for floats."""
    name = dtype.name
    if not name.startswith(("INT", "UINT")):
        return None
    if name.startswith("U"):
        return 0, (1 << dtype.bitwidth) - 1
    return -(1 << (dtype.bitwidth - 1)), (1 << (dtype.bitwidth - 1)) - 1


def tensor_of_array(array: np.ndarray[Any, Any], dtype: ir.DataType) -> Any:
    """Return a copy of an array as a tensor; strings stay an array."""
    if dtype == ir.DataType.STRING:
        return np.array(array, dtype=object)
    kind = held_as(dtype)
    if dtype in _UNPACKED:
        plain = np.float32 if kind == torch.float32 else np.uint8 if not kind.is_signed else np.int8
        return torch.from_numpy(np.array(array).astype(plain))
    copy = np.array(array, order="C")
    if dtype in _BEYOND_NUMPY:
        return torch.from_numpy(copy.view(_BEYOND_NUMPY[dtype])).view(kind)
    return torch.from_numpy(copy)


def array_of(value: Any, dtype: ir.DataType | None) -> Any:
    """Return a tensor as an array of an ONNX type; lists element by element, None as it is."""
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, list | tuple):
        return [array_of(item, dtype) for item in value]
    tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    dtype = _OWN.get(tensor.dtype) if dtype is None else dtype
    if dtype is None or dtype not in (*_SAME, *_UNPACKED):
        return tensor.numpy()
    if dtype in _UNPACKED:
        return tensor.numpy().astype(dtype.numpy())
    if tensor.dtype != held_as(dtype):
        tensor = tensor.to(held_as(dtype))
    if dtype in _BEYOND_NUMPY:
        bits = torch.int16 if dtype == ir.DataType.BFLOAT16 else torch.uint8
        return tensor.view(bits).numpy().view(dtype.numpy())
    return tensor.numpy()
