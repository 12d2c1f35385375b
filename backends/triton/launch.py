"""The kernels as functions: torch tensors in, torch tensors out."""

from __future__ import annotations

from typing import Any

from lwc.backends.triton.availability import require_runnable, require_triton
from lwc.core.errors import UsageError

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(x: Any, weight: Any | None, *, residual: Any | None = None, eps: float = 1e-6) -> Any:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis, rounded once.

    Args:
        x: Any shape, [..., columns]; float16, bfloat16 or float32.
        weight: Factors, [columns], or None.
        residual: Shaped as `x`: added first.
        eps: Added to the mean square.

    Returns:
        The norm; with a residual, the norm and the sum.

    Raises:
        UsageError: Shapes or types do not fit.
        LwcError: No kernel runs where the tensors are.
    """
    return _norm(x, weight, None, residual, eps=eps, centred=False)


def layer_norm(
    x: Any,
    weight: Any | None,
    bias: Any | None = None,
    *,
    residual: Any | None = None,
    eps: float = 1e-5,
) -> Any:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last axis, rounded once.

    Arguments, results and errors are those of `rms_norm`; `bias` is as `weight`.
    """
    return _norm(x, weight, bias, residual, eps=eps, centred=True)


def _norm(
    x: Any, weight: Any | None, bias: Any | None, residual: Any | None, *, eps: float, centred: bool
) -> Any:
    require_triton()
    from lwc.backends.triton.kernels import norm
    from lwc.backends.triton.run import architecture_of, computable, run

    columns = x.shape[-1]
    _check_float(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_shape(name, tensor, (columns,))
    _check_shape("residual", residual, tuple(x.shape))
    if columns > norm.LONGEST:
        raise UsageError(f"rows of {columns} elements are longer than {norm.LONGEST}")
    require_runnable(x, weight, bias, residual)
    rows, residual_rows = (None if t is None else _rows(computable(t)) for t in (x, residual))
    factors, shifts = (None if t is None else computable(t).contiguous() for t in (weight, bias))
    operation = norm.norm_operation(
        rows, factors, shifts, residual_rows, architecture_of(x), eps=eps, centred=centred
    )
    results = tuple(result.view(x.shape).to(x.dtype) for result in run(operation))
    return results[0] if residual is None else results


def _rows(tensor: Any) -> Any:
    """Return [rows, columns] with columns side by side; a view where the layout allows."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _check_shape(name: str, tensor: Any | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise UsageError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")


def _check_float(*tensors: Any) -> None:
    import torch

    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UsageError(f"type {tensor.dtype} is not float16, bfloat16 or float32")
