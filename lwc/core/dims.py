"""Dimensions: integers and sympy expressions in the model's own dimension names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import sympy

__all__ = [
    "Dim",
    "DimShape",
    "as_ir_dim",
    "bind",
    "evaluate",
    "is_anonymous",
    "parse_dim",
    "product",
    "simplify_dim",
    "symbol",
]

Expr: TypeAlias = Any
"""A sympy expression (sympy ships no types)."""

Dim: TypeAlias = "int | Expr"
"""A known extent, or a sympy expression over `symbol` names."""

DimShape: TypeAlias = tuple[Dim, ...]

_ANONYMOUS = re.compile(r"^(\?|unk__\d+|)$")


def is_anonymous(name: str | None) -> bool:
    """Tell whether a dimension name says nothing: two of them need not be equal.

    Exporters write `?`, the empty string and `unk__7` for "not known", and some use one of them
    for height and width at once.
    """
    return name is None or bool(_ANONYMOUS.match(name.strip()))


@functools.lru_cache(maxsize=None)
def symbol(name: str) -> Expr:
    """Return the sympy symbol of a dimension: a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@functools.lru_cache(maxsize=None)
def parse_dim(text: str) -> Expr:
    """Read a dimension as exporters write it: a name, or an expression such as `2*seq + 1`.

    A text that is no arithmetic expression over names is taken as one name.
    """
    try:
        parsed = ir.SymbolicDim(text)._expr
    except (ValueError, TypeError, SyntaxError):
        parsed = None
    if parsed is None or not parsed.free_symbols:
        return symbol(text)
    return parsed.subs({old: symbol(old.name) for old in parsed.free_symbols})


def simplify_dim(dim: Dim) -> Dim:
    """Turn constant expressions into int and leave everything else as it is."""
    if isinstance(dim, int):
        return dim
    if dim.is_Integer:
        return int(dim)
    return dim


def as_ir_dim(dim: Dim) -> int | ir.SymbolicDim:
    """Return the form onnx_ir stores in a `Shape`."""
    dim = simplify_dim(dim)
    return dim if isinstance(dim, int) else ir.SymbolicDim(str(dim))


def bind(dim: Dim, bindings: Mapping[str, int]) -> Dim:
    """Replace the named symbols of `dim` by numbers."""
    if isinstance(dim, int) or not bindings:
        return dim
    return simplify_dim(
        dim.subs({s: bindings[s.name] for s in dim.free_symbols if s.name in bindings})
    )


def evaluate(dim: Dim, bindings: Mapping[str, int]) -> int:
    """Return the number `dim` stands for under `bindings`.

    Raises:
        KeyError: A symbol of `dim` has no binding; its name is the key.
    """
    bound = bind(dim, bindings)
    if isinstance(bound, int):
        return bound
    free = sorted(s.name for s in bound.free_symbols)
    if free:
        raise KeyError(free[0])
    return int(bound)


def product(dims: Iterable[Dim]) -> Dim:
    """Multiply extents; the empty product is 1."""
    number = 1
    rest: list[Expr] = []
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        else:
            rest.append(dim)
    if number == 0 or not rest:
        return number
    return _multiply(number, tuple(rest))


@functools.lru_cache(maxsize=65536)
def _multiply(number: int, rest: Sequence[Expr]) -> Dim:
    return simplify_dim(sympy.Mul(number, *rest))
