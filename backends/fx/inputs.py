"""Whether a lowered module is called with what its graph declares.

The generated code asks nothing of its arguments: it would cut ids that are floats to integers, and
fail far inside on a mask that is too short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lwc.calibration.inputs import shown_shape
from lwc.core.dims import Expr, evaluate, is_anonymous, parse_dim
from lwc.core.errors import LwcError
from lwc.core.torch_types import held_as

__all__ = ["Declared", "check_call", "declared", "floats_of"]


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


def floats_of(module: torch.nn.Module) -> frozenset[torch.dtype]:
    """Return the floating-point types of the parameters."""
    return frozenset(each.dtype for each in module.parameters() if each.is_floating_point())


def check_call(
    module: torch.nn.Module,
    inputs: Mapping[str, Declared | None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Check what a lowered module is called with; what is being traced is let through.

    Args:
        module: The module. One whose weights were turned into another floating-point type since
            it was made takes that too.
        inputs: Its inputs, by the names of the parameters of its `forward`, in order.
        args: Positional arguments; that they are too many or too few is told by Python.
        kwargs: Keyword arguments.

    Raises:
        LwcError: An argument has another type or shape than its input, or disagrees with another
            one about an extent.
    """
    extents: dict[str, tuple[int, str]] = {}
    sums: list[tuple[Declared, int, Expr, int]] = []
    given = dict(zip(inputs, args, strict=False)) if not kwargs else _bound(inputs, args, kwargs)
    for parameter, tensor in given.items():
        want = inputs[parameter]
        if want is None or (tensor is None and want.optional):
            continue
        if isinstance(tensor, torch.fx.Proxy):
            return
        if not isinstance(tensor, torch.Tensor):
            raise _no_tensor(module, want, tensor)
        if tensor.dtype != want.dtype and not _was_converted(module, want, tensor):
            raise _misfit(module, want, f"of type {_name(tensor.dtype)}")
        if want.dims is None:
            continue
        shape = tensor.shape
        if len(shape) != len(want.dims):
            raise _misfit(module, want, f"of shape {list(shape)}")
        for axis, (dim, extent) in enumerate(zip(want.dims, shape, strict=True)):
            if dim is None or not isinstance(extent, int):
                continue  # a symbol of torch.export is not asked for its number
            if isinstance(dim, int):
                if dim != extent:
                    raise _misfit(module, want, f"of shape {list(shape)}")
            elif isinstance(dim, str):
                number, first = extents.setdefault(dim, (extent, want.name))
                if number != extent:
                    about = f"of shape {list(shape)}, where {dim} is {number} in '{first}'"
                    raise _misfit(module, want, about)
            else:
                sums.append((want, axis, dim, extent))
    for want, axis, dim, extent in sums:
        names = {each.name for each in dim.free_symbols}
        if names <= extents.keys():
            number = evaluate(dim, {name: extents[name][0] for name in names})
            if number != extent:
                told = ", ".join(f"{name} is {extents[name][0]}" for name in sorted(names))
                about = f"with {extent} in axis {axis}, where {dim} is {number}: {told}"
                raise _misfit(module, want, about)


def _bound(
    inputs: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    bound = dict(zip(inputs, args, strict=False))
    return bound | {name: each for name, each in kwargs.items() if name in inputs}


def _was_converted(module: torch.nn.Module, want: Declared, tensor: torch.Tensor) -> bool:
    if not (want.dtype.is_floating_point and tensor.is_floating_point()):
        return False
    now = floats_of(module)
    return tensor.dtype in now and now != module.meta["lwc"]["floats"]


def _no_tensor(module: torch.nn.Module, want: Declared, given: Any) -> LwcError:
    what = "an array of numpy's" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
    remedy = "torch.from_numpy makes a tensor of it" if isinstance(given, np.ndarray) else None
    return _error(module, f"input '{want.name}' was fed {what}, not a tensor", want, remedy)


def _misfit(module: torch.nn.Module, want: Declared, wrong: str) -> LwcError:
    return _error(module, f"input '{want.name}' was fed a tensor {wrong}", want)


def _error(
    module: torch.nn.Module, message: str, want: Declared, remedy: str | None = None
) -> LwcError:
    feed = f"feed {want.wanted}"
    return LwcError(
        message,
        file=module.meta["lwc"]["file"],
        remedy=feed if remedy is None else f"{feed}; {remedy}",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
