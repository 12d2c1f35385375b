"""Dimensions: integers and sympy expressions in the model's own dimension names."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import sympy

__all__ = [
    "Dim",
    "DimShape",
    "Expr",
    "add",
    "as_ir_dim",
    "at_least",
    "bind",
    "ceil_div",
    "equal",
    "evaluate",
    "floor_div",
    "integer",
    "is_anonymous",
    "lower_bound",
    "maximum",
    "minimum",
    "modulo",
    "multiply",
    "parse_dim",
    "product",
    "quotient",
    "simplify_dim",
    "subtract",
    "symbol",
]

Expr: TypeAlias = Any
"""A sympy expression (sympy ships no types)."""

Dim: TypeAlias = "int | Expr"
"""A known extent, or a sympy expression over `symbol` names."""

DimShape: TypeAlias = tuple[Dim, ...]

_ANONYMOUS = re.compile(r"^(\?|unk__\d+|None|)$")


def is_anonymous(name: str | None) -> bool:
    """Tell whether a dimension name says nothing: two of them need not be equal.

    Exporters write `?`, `None`, the empty string and `unk__7` for "not known", and some use one of
    them for height and width at once.
    """
    return name is None or bool(_ANONYMOUS.match(name.strip()))


@functools.cache
def symbol(name: str) -> Expr:
    """Return the sympy symbol of a dimension: a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@functools.cache
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


# Exact integer arithmetic. Integers stay Python integers, and sympy, which is slow, is asked once
# per pair of operands. Results are expanded polynomials, so that equal dimensions mostly compare
# equal as they are.

_CACHE = 1 << 16


def integer(name: str) -> Expr:
    """Return the sympy symbol of an integer of any sign, for tensor content that is not known."""
    return sympy.Symbol(name, integer=True)


def add(a: Dim, b: Dim) -> Dim:
    """Return `a + b`."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return _add(a, b)


@functools.lru_cache(maxsize=_CACHE)
def _add(a: Dim, b: Dim) -> Dim:
    return simplify_dim(sympy.Add(a, b))


def subtract(a: Dim, b: Dim) -> Dim:
    """Return `a - b`."""
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return 0 if a is b else _subtract(a, b)


@functools.lru_cache(maxsize=_CACHE)
def _subtract(a: Dim, b: Dim) -> Dim:
    return simplify_dim(sympy.Add(a, sympy.Mul(-1, b)))


def multiply(a: Dim, b: Dim) -> Dim:
    """Return `a * b`, expanded."""
    if isinstance(a, int):
        if isinstance(b, int):
            return a * b
        if a == 1:
            return b
    elif isinstance(b, int) and b == 1:
        return a
    return _expanded_product(a, b)


@functools.lru_cache(maxsize=_CACHE)
def _expanded_product(a: Dim, b: Dim) -> Dim:
    return simplify_dim(sympy.expand_mul(sympy.Mul(a, b)))


def floor_div(a: Dim, b: Dim) -> Dim:
    """Return `a / b` rounded down, for `b` above zero."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    return _floor_div(a, b)


@functools.lru_cache(maxsize=_CACHE)
def _floor_div(a: Dim, b: Dim) -> Dim:
    if not isinstance(b, int):
        exact = quotient(a, b)
        if isinstance(exact, int) or not sympy.denom(sympy.together(exact)).free_symbols:
            return exact if isinstance(exact, int) or exact.is_integer else _floor(exact)
        return _floor(exact)
    if b == 1:
        return a
    whole, rest = [], []
    for term, coefficient in sympy.sympify(a).as_coefficients_dict().items():
        if not coefficient.is_Integer:
            return _floor(sympy.Mul(sympy.Rational(1, b), a))
        high, low = divmod(int(coefficient), b)
        whole.append(sympy.Mul(high, term))
        rest.append((low, term))
    return _add(sympy.Add(*whole), _proper_floor([(c, t) for c, t in rest if c], b))


def _proper_floor(terms: list[tuple[int, Expr]], b: int) -> Expr:
    """Return floor(sum of coefficient * term / b), in lowest terms, nested floors as one."""
    constant = next((c for c, term in terms if term == 1), 0)
    factors = [(c, term) for c, term in terms if term != 1]
    if not factors:
        return sympy.Integer(constant // b)
    common = math.gcd(b, *(c for c, _ in factors))
    b //= common
    constant //= common
    factors = [(c // common, term) for c, term in factors]
    total = sympy.Add(constant, *(sympy.Mul(c, term) for c, term in factors))
    if b == 1:
        return total
    if len(factors) == 1 and factors[0][0] == 1 and isinstance(factors[0][1], sympy.floor):
        # floor((floor(x / n) + c) / b) = floor((x + c n) / (n b)), with x / n the argument.
        total = sympy.Add(factors[0][1].args[0], constant)
    return _floor(sympy.Mul(sympy.Rational(1, b), total))


def _floor(expression: Expr) -> Expr:
    # Evaluation by sympy takes milliseconds, and the callers have already taken the whole part out.
    return sympy.floor(expression, evaluate=False)


def ceil_div(a: Dim, b: Dim) -> Dim:
    """Return `a / b` rounded up, for `b` above zero."""
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b)
    return floor_div(subtract(add(a, b), 1), b)


def modulo(a: Dim, b: Dim) -> Dim:
    """Return the remainder of `floor_div`, which has the sign of `b`."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    return subtract(a, multiply(b, floor_div(a, b)))


def quotient(a: Dim, b: Dim) -> Dim:
    """Return `a / b` where the division is known to leave no remainder, and `b` not to be zero."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else sympy.Rational(a, b)
    return _quotient(a, b)


@functools.lru_cache(maxsize=_CACHE)
def _quotient(a: Dim, b: Dim) -> Dim:
    if isinstance(b, sympy.Add):
        return simplify_dim(sympy.cancel(sympy.Mul(a, sympy.Pow(b, -1))))
    return simplify_dim(sympy.expand_mul(sympy.Mul(a, sympy.Pow(b, -1))))


def maximum(a: Dim, b: Dim) -> Dim:
    """Return the larger of two."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return a if at_least(a, b) else b if at_least(b, a) else _extreme(sympy.Max, a, b)


def minimum(a: Dim, b: Dim) -> Dim:
    """Return the smaller of two."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a if at_least(b, a) else b if at_least(a, b) else _extreme(sympy.Min, a, b)


@functools.lru_cache(maxsize=_CACHE)
def _extreme(kind: Any, a: Dim, b: Dim) -> Expr:
    first, second = sorted((sympy.sympify(a), sympy.sympify(b)), key=sympy.default_sort_key)
    return kind(first, second, evaluate=False)


def at_least(a: Dim, b: Dim) -> bool:
    """Tell whether `a >= b` holds for every binding, as far as `lower_bound` can tell."""
    bound = lower_bound(subtract(a, b))
    return bound is not None and bound >= 0


def lower_bound(dim: Dim) -> int | None:
    """Return a number that `dim` is never below, or None if none was found."""
    if isinstance(dim, int):
        return dim
    bound = _lower_bound(dim)
    return None if bound is None else math.ceil(bound)


@functools.lru_cache(maxsize=_CACHE)
def _lower_bound(dim: Expr) -> Any:
    if dim.is_Symbol:
        return 0 if dim.is_nonnegative else None
    if dim.is_Rational:
        return dim
    if isinstance(dim, sympy.Max):
        return max((b for b in map(_lower_bound, dim.args) if b is not None), default=None)
    bounds = [_lower_bound(argument) for argument in dim.args]
    if isinstance(dim, sympy.Mul):
        number, factors = dim.as_coeff_mul()
        bounds = [_lower_bound(factor) for factor in factors]
        if number < 0 or any(bound is None or bound < 0 for bound in bounds):
            return None
        return number * math.prod(bounds)
    if not bounds or any(bound is None for bound in bounds):
        return None
    if isinstance(dim, sympy.Add):
        return sum(bounds)
    if isinstance(dim, sympy.Min):
        return min(bounds)
    return sympy.floor(bounds[0]) if isinstance(dim, sympy.floor) else None


def equal(a: Dim, b: Dim) -> bool:
    """Tell whether two dimensions are equal for every binding; False means not proved."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is b or _equal(a, b)


@functools.lru_cache(maxsize=_CACHE)
def _equal(a: Dim, b: Dim) -> bool:
    difference = subtract(a, b)
    return bool(difference == 0 or sympy.expand(difference) == 0)
