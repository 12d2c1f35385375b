"""Whether a lowered module is called with what its graph declares.

The generated code asks nothing of its arguments: it would cut ids that are floats to integers, and
fail far inside on a mask that is too short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lwc.calibration.inputs import shown_shape
from lwc.core.dims import Expr, evaluate, is_anonymous, parse_dim
from lwc.core.errors import LwcError
from lwc.core.torch_types import held_as

__all__ = ["Declared", "check_call", "declared", "suspect"]


@dataclass(frozen=True)
class Declared:
    """A graph input that takes a tensor.

    Attributes:
        name: Its name in the ONNX graph.
        dtype: What holds its elements.
        dims: What each extent is to be: a number, a named one, an expression of several, or None
            for any. None if the rank is not known.
        optional: It has a default value.
        wanted: Type and shape, for people.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str | Expr | None, ...] | None
    optional: bool
    wanted: str


def declared(value: ir.Value) -> Declared | None:
    """Return what a graph input is to be, or None where that is no tensor of a known type."""
    kind = value.type
    untold = (ir.DataType.STRING, ir.DataType.UNDEFINED)
    if not isinstance(kind, ir.TensorType) or kind.dtype in untold:
        return None
    dtype = held_as(kind.dtype)
    dims = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
    text = f"{_name(dtype)}{shown_shape(value)}"
    return Declared(value.name or "", dtype, dims, value.const_value is not None, text)


def _dim(dim: int | ir.SymbolicDim) -> int | str | Expr | None:
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    if is_anonymous(dim.value):
        return None
    expression = parse_dim(dim.value or "")
    if expression.is_Symbol:
        return str(expression.name)
    # Exporters write `past + 1` for any number of tokens behind a past.
    return expression if len(expression.free_symbols) > 1 else None


def check_call(
    module: torch.nn.Module,
    inputs: Mapping[str, Declared | None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Check what a lowered module is called with; what is being traced is let through.

    Args:
        module: The module.
        inputs: Its inputs, by the names of the parameters of its `forward`, in order.
        args: Positional arguments; that they are too many or too few is told by Python.
        kwargs: Keyword arguments.

    Raises:
        LwcError: An argument is no tensor, holds integers or truths in place of floats or the other
            way round, or has another rank or another extent than its input declares in numbers.
    """
    for want, tensor in _given(inputs, args, kwargs):
        if isinstance(tensor, torch.fx.Proxy):
            return
        if not isinstance(tensor, torch.Tensor):
            raise _no_tensor(module, want, tensor)
        if tensor.dtype != want.dtype and not _both_floats(want, tensor):
            raise _misfit(module, want, f"of type {_name(tensor.dtype)}")
        if want.dims is None:
            continue
        fits = len(tensor.shape) == len(want.dims) and not any(
            isinstance(dim, int) and isinstance(extent, int) and dim != extent
            for dim, extent in zip(want.dims, tensor.shape, strict=True)
        )
        if not fits:
            raise _misfit(module, want, f"of shape {list(tensor.shape)}")


def suspect(
    inputs: Mapping[str, Declared | None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Return which argument may be why a call failed that `check_call` let through.

    It is one of another floating-point type, which a module takes once it was turned into that
    type, or whose extents disagree with the names of others, which may still broadcast.
    """
    extents: dict[str, tuple[int, str]] = {}
    sums: list[tuple[Declared, int, Expr, int]] = []
    for want, tensor in _given(inputs, args, kwargs):
        if tensor.dtype != want.dtype:
            return _told(want, f"a tensor of type {_name(tensor.dtype)}")
        shape = [int(extent) for extent in tensor.shape]
        for axis, (dim, extent) in enumerate(zip(want.dims or shape, shape, strict=True)):
            if isinstance(dim, str):
                number, first = extents.setdefault(dim, (extent, want.name))
                if number != extent:
                    about = f"a tensor of shape {shape}, where {dim} is {number} in '{first}'"
                    return _told(want, about)
            elif dim is not None and not isinstance(dim, int):
                sums.append((want, axis, dim, extent))
    for want, axis, dim, extent in sums:
        names = {each.name for each in dim.free_symbols}
        if names <= extents.keys():
            number = evaluate(dim, {name: extents[name][0] for name in names})
            if number != extent:
                why = ", ".join(f"{name} is {extents[name][0]}" for name in sorted(names))
                about = f"a tensor with {extent} in axis {axis}, where {dim} is {number}: {why}"
                return _told(want, about)
    return None


def _given(
    inputs: Mapping[str, Declared | None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Declared, Any]]:
    """Yield what each input was fed that is to be a tensor."""
    bound = dict(zip(inputs, args, strict=False)) | dict(kwargs)
    for parameter, tensor in bound.items():
        want = inputs.get(parameter)
        if want is not None and not (tensor is None and want.optional):
            yield want, tensor


def _both_floats(want: Declared, tensor: torch.Tensor) -> bool:
    return bool(want.dtype.is_floating_point and tensor.is_floating_point())


def _no_tensor(module: torch.nn.Module, want: Declared, given: Any) -> LwcError:
    array = isinstance(given, np.ndarray)
    what = "an array of numpy's" if array else f"a {type(given).__name__}"
    remedy = "; torch.from_numpy makes a tensor of it" if array else ""
    return _error(module, f"input '{want.name}' was fed {what}, not a tensor", want, remedy)


def _misfit(module: torch.nn.Module, want: Declared, wrong: str) -> LwcError:
    return _error(module, f"input '{want.name}' was fed a tensor {wrong}", want)


def _told(want: Declared, what: str) -> str:
    return f"input '{want.name}' was fed {what}; it is to be {want.wanted}"


def _error(module: torch.nn.Module, message: str, want: Declared, remedy: str = "") -> LwcError:
    file = module.meta.get("lwc", {}).get("file")
    return LwcError(message, file=file, remedy=f"feed {want.wanted}{remedy}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
