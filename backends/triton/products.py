"""Products as functions: torch tensors and packed weights in, torch tensors out."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from lwc.backends.triton.availability import require_runnable, require_triton
from lwc.core.errors import UsageError

if TYPE_CHECKING:
    from lwc.backends.triton.operation import Operation
    from lwc.backends.triton.weights import SparseWeights, W4Weights, W8Weights

__all__ = ["quantize_rows", "sparse_matmul", "w4a16_matmul", "w8a8_matmul"]


def quantize_rows(x: Any) -> tuple[Any, Any]:
    """Round activations to int8, each row by its largest magnitude.

    Args:
        x: [..., depth]; float16, bfloat16 or float32.

    Returns:
        int8 codes, shaped as `x`, and float32 scales [...]: `max|x| / 127`. Codes are rounded half
        to even. The scale of a row with NaN or infinities is NaN.

    Raises:
        UsageError: The type is another one.
        LwcError: No kernel runs where the tensor is.
    """
    require_triton()
    from lwc.backends.triton.kernels.quantize_rows import quantize_rows_operation
    from lwc.backends.triton.run import computable, run

    flat = _flat(x)
    require_runnable(x)
    codes, scales = run(quantize_rows_operation(computable(flat)))
    return codes.view(x.shape), scales.view(x.shape[:-1])


def w8a8_matmul(
    x: Any, weights: W8Weights, bias: Any | None = None, *, activation: str = "none"
) -> Any:
    """Return activation(q(x) wᵀ + bias), q rounding each row to int8; products are summed exactly.

    Args:
        x: [..., depth]; float16, bfloat16 or float32.
        weights: What it is multiplied with.
        bias: [columns] or None.
        activation: "none", "relu", "silu", "gelu" or "gelu-tanh".

    Returns:
        [..., columns], of the type of `x`. A row with NaN or infinities gives NaN.

    Raises:
        UsageError: Shapes or types do not fit.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    from lwc.backends.triton.kernels.quantize_rows import quantize_rows_operation
    from lwc.backends.triton.kernels.w8a8_matmul import w8a8_operation
    from lwc.backends.triton.run import architecture_of, computable, run

    _check(x, weights, bias, activation)
    require_runnable(x, weights.codes, weights.scales, bias)
    if prod(x.shape) == 0:
        return _nothing(x, weights, bias, activation)
    rounding = quantize_rows_operation(computable(_flat(x)), weights.codes.shape[1])
    codes, scales = run(rounding)
    operation = w8a8_operation(
        codes, scales, weights.codes, weights.scales, _vector(bias), architecture_of(x),
        dtype=computable(x[:0]).dtype, function=activation,
    )  # fmt: skip
    return _result(operation, x, weights)


def w4a16_matmul(
    x: Any, weights: W4Weights, bias: Any | None = None, *, activation: str = "none"
) -> Any:
    """Return activation(x wᵀ + bias); weights become numbers of the type of `x`, rounded once.

    Arguments, results and errors are those of `w8a8_matmul`.
    """
    require_triton()
    from lwc.backends.triton.kernels.w4a16_matmul import w4a16_operation
    from lwc.backends.triton.run import architecture_of, computable
    from lwc.backends.triton.weights import GROUP_SIZES

    if weights.group_size not in GROUP_SIZES:
        raise UsageError(f"groups of {weights.group_size} inputs are not among {GROUP_SIZES}")
    _check(x, weights, bias, activation)
    require_runnable(x, weights.codes, weights.scales, weights.zeros, bias)
    if prod(x.shape) == 0:
        return _nothing(x, weights, bias, activation)
    operation = w4a16_operation(
        computable(_flat(x)), weights.codes, weights.scales, weights.zeros, _vector(bias),
        architecture_of(x), columns=weights.columns, group_size=weights.group_size,
        function=activation,
    )  # fmt: skip
    return _result(operation, x, weights)


def sparse_matmul(
    x: Any, weights: SparseWeights, bias: Any | None = None, *, activation: str = "none"
) -> Any:
    """Return activation(x wᵀ + bias) with sparse weights.

    Arguments, results and errors are those of `w8a8_matmul`; bfloat16 activations are refused, as
    weights are float16. Zeros take part: an infinite activation gives NaN in all columns.
    """
    require_triton()
    import torch

    from lwc.backends.triton.kernels.tiled_bitmap_matmul import tiled_bitmap_operation
    from lwc.backends.triton.run import architecture_of

    _check(x, weights, bias, activation)
    if x.dtype == torch.bfloat16:
        raise UsageError("sparse weights are float16 and activations bfloat16: convert them")
    require_runnable(x, weights.bits, weights.pairs, weights.offsets, bias)
    if prod(x.shape) == 0:
        return _nothing(x, weights, bias, activation)
    operation = tiled_bitmap_operation(
        _flat(x), weights.bits, weights.pairs, weights.offsets, _vector(bias), architecture_of(x),
        columns=weights.columns, fullest=weights.fullest, function=activation,
    )  # fmt: skip
    return _result(operation, x, weights)


def _result(operation: Operation, x: Any, weights: Any) -> Any:
    from lwc.backends.triton.run import run

    (result,) = run(operation)
    return result.view(*x.shape[:-1], weights.columns).to(x.dtype)


def _nothing(x: Any, weights: Any, bias: Any | None, activation: str) -> Any:
    """Return the product where there is nothing to sum or no row."""
    import torch

    result = x.new_zeros((*x.shape[:-1], weights.columns))
    if bias is not None:
        result = result + bias
    functions: dict[str, Any] = {
        "none": lambda value: value,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu-tanh": lambda value: torch.nn.functional.gelu(value, approximate="tanh"),
    }
    return functions[activation](result).to(x.dtype)


def _flat(x: Any) -> Any:
    """Return [rows, depth] with the depth side by side; a view where the layout allows."""
    import torch

    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UsageError(f"type {x.dtype} is not float16, bfloat16 or float32")
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _vector(bias: Any | None) -> Any | None:
    from lwc.backends.triton.run import computable

    return None if bias is None else computable(bias).contiguous()


def _check(x: Any, weights: Any, bias: Any | None, activation: str) -> None:
    from lwc.backends.triton.kernels.activation import ACTIVATIONS

    if not x.ndim or x.shape[-1] != weights.depth:
        raise UsageError(f"x has shape {list(x.shape)}, not [..., {weights.depth}]")
    for name, (shape, dtype) in weights.layout.items():
        tensor = getattr(weights, name)
        if tensor is None and name == "zeros":
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise UsageError(
                f"{name} of the weights are {tensor.dtype} {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}, not {dtype} {list(shape)} without gaps"
            )
    if bias is not None and tuple(bias.shape) != (weights.columns,):
        raise UsageError(f"bias has shape {list(bias.shape)}, not {[weights.columns]}")
    if activation not in ("none", *ACTIVATIONS):
        raise UsageError(
            f"there is no activation '{activation}'",
            remedy=f"known: none, {', '.join(ACTIVATIONS)}",
        )
