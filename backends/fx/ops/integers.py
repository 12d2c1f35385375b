"""Arithmetic of extents, on Python integers: a scalar is an int, a vector a list of them.

Numbers that the type of a result cannot hold wrap, as those of tensors do; `bits` is its width.
Under torch.export the integers are symbols, and extents stay what they are in the graph: a symbol
is taken to fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.registry import host

__all__ = ["as_tensor", "numbers"]

Tensor: TypeAlias = torch.Tensor
Ints: TypeAlias = Any
"""An int or bool, or a list of them."""


def as_tensor(value: Ints, dtype: torch.dtype) -> Tensor:
    """Return integers as a tensor."""
    if isinstance(value, list):
        if all(isinstance(item, int) for item in value):
            return torch.tensor(value, dtype=dtype)
        if not value:
            return torch.empty(0, dtype=dtype)
        return torch.stack([torch.full((), item, dtype=dtype) for item in value])
    return torch.full((), value, dtype=dtype)


def numbers(x: Tensor) -> Any:
    """Return the content of a tensor as a Python number or lists of them."""
    return x.tolist()


def _each(function: Callable[..., Any], *values: Ints) -> Ints:
    """Apply a function of scalars, broadcasting scalars and vectors of one element."""
    lengths = [len(value) for value in values if isinstance(value, list)]
    if not lengths:
        return function(*values)
    count = next((length for length in lengths if length != 1), 1)
    if any(length not in (1, count) for length in lengths):
        raise ValueError(f"vectors of {lengths} elements do not broadcast")
    rows = [
        value * (count if len(value) == 1 else 1) if isinstance(value, list) else [value] * count
        for value in values
    ]
    return [function(*items) for items in zip(*rows, strict=True)]


def _wrapped(value: Any, bits: int) -> Any:
    """Return what an integer of so many bits holds of a number."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    half = 1 << (bits - 1)
    if -half <= value < half:  # torch.compile, where symbols are integers too, keeps them so
        return value
    return (value + half) % (2 * half) - half


def _computed(function: Callable[..., Any], *values: Ints, bits: int) -> Ints:
    """Apply a function of scalars, and wrap; see `_each`."""
    return _each(lambda *items: _wrapped(function(*items), bits), *values)


@host("Shape", tensors=(0,))
def shape(x: Tensor | Ints, *, start: int = 0, end: int | None = None) -> Ints:
    """Return extents, also of integers."""
    extents = list(x.shape) if isinstance(x, torch.Tensor) else _extents(x)
    return extents[start:end]


def _extents(x: Ints) -> Ints:
    return [len(x)] if isinstance(x, list) else []


@host("Size", tensors=(0,))
def size(x: Tensor | Ints) -> Ints:
    """Return the number of elements, also of integers."""
    return x.numel() if isinstance(x, torch.Tensor) else math.prod(_extents(x))


@host("Add")
def add(a: Ints, b: Ints, *, bits: int = 64) -> Ints:
    """Add."""
    return _computed(lambda p, q: p + q, a, b, bits=bits)


@host("Sub")
def sub(a: Ints, b: Ints, *, bits: int = 64) -> Ints:
    """Subtract."""
    return _computed(lambda p, q: p - q, a, b, bits=bits)


@host("Mul")
def mul(a: Ints, b: Ints, *, bits: int = 64) -> Ints:
    """Multiply."""
    return _computed(lambda p, q: p * q, a, b, bits=bits)


@host("Div")
def div(a: Ints, b: Ints, *, bits: int = 64) -> Ints:
    """Divide toward zero."""
    return _computed(_quotient, a, b, bits=bits)


def _quotient(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    # Asking a symbol for its sign would fix it; extents are known to have none.
    if isinstance(a, torch.SymInt) and not a.node.expr.is_nonnegative:
        return torch.sym_max(a, 0) // b - torch.sym_max(-a, 0) // b
    return a // b


@host("Mod")
def mod(a: Ints, b: Ints, *, fmod: int = 0) -> Ints:
    """Take the remainder, with the sign of the divisor unless `fmod`."""
    return _each(lambda p, q: p - q * _quotient(p, q) if fmod else p % q, a, b)


@host("Neg")
def neg(x: Ints, *, bits: int = 64) -> Ints:
    """Negate."""
    return _computed(lambda p: -p, x, bits=bits)


@host("Max")
def maximum(*values: Ints) -> Ints:
    """Return the greatest."""
    return _each(lambda *p: functools.reduce(torch.sym_max, p), *values)


@host("Min")
def minimum(*values: Ints) -> Ints:
    """Return the least."""
    return _each(lambda *p: functools.reduce(torch.sym_min, p), *values)


@host("Equal")
def equal(a: Ints, b: Ints) -> Ints:
    """Compare."""
    return _each(lambda p, q: bool(p == q), a, b)


@host("Less")
def less(a: Ints, b: Ints) -> Ints:
    """Compare."""
    return _each(lambda p, q: bool(p < q), a, b)


@host("Greater")
def greater(a: Ints, b: Ints) -> Ints:
    """Compare."""
    return _each(lambda p, q: bool(p > q), a, b)


@host("Not")
def negated(x: Ints) -> Ints:
    """Negate truth values."""
    return _each(lambda p: not p, x)


@host("Where")
def where(condition: Ints, a: Ints, b: Ints) -> Ints:
    """Choose."""
    return _each(lambda c, p, q: p if c else q, condition, a, b)


@host("Identity")
def identity(x: Ints) -> Ints:
    """Return what is given."""
    return x


@host("Cast")
def cast(x: Ints, *, to: int, saturate: int = 1, round_mode: str = "up", bits: int = 64) -> Ints:
    """Turn into integers, or into truth values."""
    return _each(bool, x) if to == 9 else _computed(lambda p: p, x, bits=bits)


@host("Gather")
def gather(x: Ints, indices: Ints, *, axis: int = 0) -> Ints:
    """Take elements of a vector."""
    return [x[i] for i in indices] if isinstance(indices, list) else x[indices]


@host("Slice")
def slice_(x: Ints, starts: Ints, ends: Ints, axes: Ints = None, steps: Ints = None) -> Ints:
    """Cut a vector."""
    step = steps[0] if steps else 1
    start = max(starts[0], -len(x)) if step < 0 else starts[0]
    return x[start : ends[0] : step]


@host("Concat")
def concat(*values: Ints, axis: int) -> Ints:
    """Join vectors."""
    return [item for value in values for item in value]


@host("Unsqueeze")
def unsqueeze(x: Ints, axes: Ints) -> Ints:
    """Make a vector of a scalar."""
    return [x] if axes else x


@host("Squeeze")
def squeeze(x: Ints, axes: Ints = None) -> Ints:
    """Make a scalar of a vector of one."""
    return _only(x)


@host("Reshape")
def reshape(x: Ints, dims: Ints, *, allowzero: int = 0) -> Ints:
    """Make a vector of a scalar, or the other way around."""
    if not dims:
        return _only(x)
    return x if isinstance(x, list) else [x]


def _only(x: Ints) -> Ints:
    if isinstance(x, list):
        (x,) = x
    return x


@host("ReduceProd")
def reduce_prod(
    x: Ints,
    axes: Ints = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
    bits: int = 64,
) -> Ints:
    """Multiply the elements of a vector."""
    return _reduced(lambda v: _wrapped(math.prod(v), bits), x, axes, keepdims, noop_with_empty_axes)


@host("ReduceSum")
def reduce_sum(
    x: Ints,
    axes: Ints = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
    bits: int = 64,
) -> Ints:
    """Add the elements of a vector."""
    return _reduced(lambda v: _wrapped(sum(v), bits), x, axes, keepdims, noop_with_empty_axes)


def _reduced(function: Callable[..., Any], x: Ints, axes: Ints, keep: int, noop: int) -> Ints:
    if not isinstance(x, list) or (not axes and noop):
        return x
    return [function(x)] if keep else function(x)


@host("ConstantOfShape")
def constant_of_shape(dims: Ints, *, value: int = 0) -> Ints:
    """Repeat a number; without extents it is a scalar."""
    return [value] * dims[0] if dims else value
