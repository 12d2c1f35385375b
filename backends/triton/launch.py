"""The kernels as functions: torch tensors in, torch tensors out."""

from __future__ import annotations

from typing import Any

from lwc.backends.triton.availability import require_runnable, require_triton
from lwc.core.errors import UsageError

__all__ = ["gated_activation", "layer_norm", "rms_norm", "rotary"]


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


def rotary(
    x: Any, cos: Any, sin: Any, positions: Any | None = None, *, interleaved: bool = False
) -> Any:
    """Return `x` with its heads turned by the angles of their positions, as ONNX's RotaryEmbedding.

    Args:
        x: [batch, length, heads, size]. Views of a packed product are read in place.
        cos: Cosines by row and pair, [rows, half] with half at most size / 2: further elements of
            a head are copied. Without `positions`, row i is token i; or [batch, length, half].
        sin: As `cos`.
        positions: Rows of `cos`, [batch, length]; they are not checked against its length.
        interleaved: Pairs are neighbours; otherwise element i belongs to i + half.

    Raises:
        UsageError: Shapes or types do not fit.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    from lwc.backends.triton.kernels.rotary import rotary_operation
    from lwc.backends.triton.run import architecture_of, computable, run

    _check_float(x, cos, sin)
    batch, length, _, size = _shape_of("x", x, 4)
    half = cos.shape[-1]
    if cos.ndim == 3:
        _check_shape("cos", cos, (batch, length, half))
    elif positions is None and cos.shape[0] < length:
        raise UsageError(f"cos has {cos.shape[0]} rows for {length} tokens")
    if cos.ndim not in {2, 3} or (cos.ndim == 3 and positions is not None) or 2 * half > size:
        raise UsageError(f"cos has shape {list(cos.shape)}, which does not fit {list(x.shape)}")
    _check_shape("sin", sin, tuple(cos.shape))
    _check_shape("positions", positions, (batch, length))
    require_runnable(x, cos, sin, positions)
    heads = computable(x)
    operation = rotary_operation(
        heads if heads.stride(-1) == 1 else heads.contiguous(),
        computable(cos).contiguous(),
        computable(sin).contiguous(),
        None if positions is None else positions.contiguous(),
        architecture_of(x),
        interleaved=interleaved,
    )
    return run(operation)[0].to(x.dtype)


def gated_activation(gate: Any, up: Any, function: str = "silu") -> Any:
    """Return activation(gate) * up, rounded once.

    Args:
        gate: [..., columns].
        up: As `gate`; both may be halves of one packed product.
        function: `silu`, `gelu`, `gelu-tanh` or `relu`.

    Raises:
        UsageError: Shapes or types do not fit, or there is no such function.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    from lwc.backends.triton.kernels.activation import ACTIVATIONS, activation_operation
    from lwc.backends.triton.run import computable, run

    if function not in ACTIVATIONS:
        raise UsageError(f"no activation is called '{function}': {', '.join(ACTIVATIONS)}")
    _check_float(gate, up)
    _check_shape("up", up, tuple(gate.shape))
    require_runnable(gate, up)
    operation = activation_operation(_rows(computable(gate)), _rows(computable(up)), function)
    return run(operation)[0].view(gate.shape).to(gate.dtype)


def _shape_of(name: str, tensor: Any, rank: int) -> tuple[int, ...]:
    if tensor.ndim != rank:
        raise UsageError(f"{name} has {tensor.ndim} dimensions, not {rank}")
    return tuple(tensor.shape)


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
