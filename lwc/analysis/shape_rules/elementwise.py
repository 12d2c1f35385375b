"""Elementwise operators: the shape of the inputs, broadcast, and content of small tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from lwc.analysis.shape_rules.registry import (
    Fact,
    Outcome,
    Site,
    SymbolicArray,
    array_of,
    differ,
    is_integer_type,
    rule,
    trackable,
)
from lwc.core.dims import (
    Dim,
    add,
    at_least,
    ceil_div,
    equal,
    floor_div,
    maximum,
    minimum,
    modulo,
    multiply,
    quotient,
    subtract,
)
from lwc.core.walk import is_default_domain

__all__ = ["in_range", "object_array"]

_UNARY = """
    Acos Acosh Asin Asinh Atan Atanh BitwiseNot Celu Cos Cosh Dropout Elu Erf Exp Gelu HardSigmoid
    HardSwish Hardmax Identity LeakyRelu Log LogSoftmax LpNormalization MeanVarianceNormalization
    Mish PRelu Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign
    Sqrt Swish Tan Tanh ThresholdedRelu Trilu CumSum CumProd LRN InstanceNormalization
    GroupNormalization RotaryEmbedding ReverseSequence Clip Abs Neg Floor Ceil Not
    com.microsoft::Gelu com.microsoft::FastGelu com.microsoft::BiasGelu com.microsoft::QuickGelu
    com.microsoft::RotaryEmbedding com.microsoft::Trilu
"""

_COMPARISONS = "Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor"

_BROADCAST = """
    Add Sub Mul Div Mod Pow Max Min Sum Mean BitwiseAnd BitwiseOr BitwiseXor BitShift
"""


def _truncated(a: Any, b: Any) -> Any:
    """Divide integers as ONNX does, toward zero."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            return None
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return floor_div(a, b) if at_least(a, 0) and at_least(b, 0) else None


def _remainder(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a % b if b else None
    return modulo(a, b) if isinstance(b, int) and b > 0 else None


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and 0 <= b <= 64:
        return a**b
    return a if isinstance(b, int) and b == 1 else None


def _equal(a: Dim, b: Dim) -> Any:
    return True if equal(a, b) else False if differ(a, b) else None


def _less(a: Dim, b: Dim) -> Any:
    return True if at_least(subtract(b, a), 1) else False if at_least(a, b) else None


def _at_most(a: Dim, b: Dim) -> Any:
    return True if at_least(b, a) else False if at_least(subtract(a, b), 1) else None


def _and(a: Any, b: Any) -> Any:
    if a is False or b is False:
        return False
    return True if a is True and b is True else None


def _or(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return True
    return False if a is False and b is False else None


def _xor(a: Any, b: Any) -> Any:
    return (a is not b) if isinstance(a, bool) and isinstance(b, bool) else None


_INTEGER: dict[str, Callable[[Any, Any], Any]] = {
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": _truncated,
    "Mod": _remainder,
    "Pow": _power,
    "Max": maximum,
    "Min": minimum,
    "Sum": add,
    "Equal": _equal,
    "Less": _less,
    "LessOrEqual": _at_most,
    "Greater": lambda a, b: _less(b, a),
    "GreaterOrEqual": lambda a, b: _at_most(b, a),
    "And": _and,
    "Or": _or,
    "Xor": _xor,
}

_FLOATING: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
}


def object_array(content: Any) -> SymbolicArray:
    """Return content as an object array, a scalar as one of rank zero."""
    if isinstance(content, np.ndarray):
        return content.astype(object)
    array = np.empty((), dtype=object)
    array[()] = content.item() if isinstance(content, np.generic) else content
    return array


def in_range(array: SymbolicArray, dtype: ir.DataType) -> bool:
    """Tell whether no number of `array` overflows `dtype`.

    Expressions of extents are taken to fit unless they contain a number that leaves an extent
    less than 16 bits, or the type has no negative numbers and they may be negative.
    """
    if dtype == ir.DataType.BOOL:
        return True
    limits = np.iinfo(dtype.numpy())
    most = 1 << max(limits.bits - 16, 0)
    return all(
        limits.min <= element <= limits.max
        if isinstance(element, int)
        else _fits(element, most) and (limits.min < 0 or at_least(element, 0))
        for element in array.flat
    )


@functools.lru_cache(maxsize=1 << 14)
def _fits(element: Any, most: int) -> bool:
    """Tell whether the numbers in an expression are at most `most`, but for bounds it is within."""
    if isinstance(element, float):
        return True
    if element.is_Rational:
        return bool(abs(element.p) <= most)
    parts = element.args
    if isinstance(element, sympy.Min | sympy.Max):
        side = 1 if isinstance(element, sympy.Min) else -1
        parts = [part for part in parts if not (part.is_Rational and side * part > 0)]
    return all(_fits(part, most) for part in parts)


def _binary_content(
    op: str, a: SymbolicArray, b: SymbolicArray, dtype: ir.DataType | None, site: Site
) -> SymbolicArray | None:
    """Compute one elementwise operator over followed content; see `_INTEGER`."""
    if dtype is None:
        return None
    if not is_integer_type(dtype):
        return _floating_content(op, a, b, dtype)
    function = _INTEGER.get(op)
    if function is None or max(a.size, b.size) == 0:
        return None

    def apply(x: Any, y: Any) -> Any:
        result = function(x, y)
        return site.anything() if result is None else result

    return object_array(np.frompyfunc(apply, 2, 1)(a, b))


def _floating_content(
    op: str, a: SymbolicArray, b: SymbolicArray, dtype: ir.DataType
) -> SymbolicArray | None:
    """Compute over numbers in the type itself, over exact integers symbolically.

    An integer expression held in a float (a length that was cast) stays exact below 2**24, so
    sums and products with whole numbers do; a quotient is only good to be rounded at once.
    """
    numbers = all(isinstance(e, float | int) for array in (a, b) for e in array.flat)
    if numbers and op == "Pow":
        powers = object_array(np.frompyfunc(_exact_power, 2, 1)(a, b))
        return None if any(element is None for element in powers.flat) else powers
    if numbers:
        function = _FLOATING.get(op)
        if function is None:
            return None
        kind = dtype.numpy()
        with np.errstate(all="ignore"):
            return object_array(function(a.astype(kind), b.astype(kind)))
    symbolic = {"Add": add, "Sub": subtract, "Mul": multiply, "Div": _exact_ratio}.get(op)
    if symbolic is None or dtype == ir.DataType.FLOAT16:
        return None
    whole = [_whole(array) for array in (a, b)]
    if whole[0] is None or whole[1] is None:
        return None
    result = object_array(np.frompyfunc(symbolic, 2, 1)(*whole))
    return None if any(element is None for element in result.flat) else result


def _exact_power(a: float, b: float) -> float | None:
    """Return a power where its result is exact, so that every runtime gives the same."""
    if not (0 <= a < 1 << 24 and float(a).is_integer()):
        return None
    if b == 0.5:
        root = math.isqrt(int(a))
        return float(root) if root * root == a else None
    result = a**b if b in (1, 2) else None
    return float(result) if result is not None and result < 1 << 24 else None


def _exact_ratio(a: Dim, b: Dim) -> Any:
    return None if isinstance(b, int) and b == 0 else quotient(a, b)


def _whole(array: SymbolicArray) -> SymbolicArray | None:
    """Turn whole floats into int; None if an element is not a whole number."""
    result = np.empty(array.shape, dtype=object)
    for index, element in np.ndenumerate(array):
        if isinstance(element, float):
            if not element.is_integer():
                return None
            result[index] = int(element)
        elif isinstance(element, int) or element.is_integer:
            result[index] = element
        else:
            return None
    return result


def _negated(element: Any) -> Any:
    return (not element) if isinstance(element, bool) else None


def _absolute(element: Any) -> Any:
    if isinstance(element, int | float):
        return abs(element)
    return element if at_least(element, 0) else None


def _square_root(element: Any) -> Any:
    # Correctly rounded in double, and rounding again to the type changes nothing.
    return math.sqrt(element) if isinstance(element, float) and element >= 0 else None


def _floor(element: Any) -> Any:
    return _whole_number(element, math.floor, up=False)


def _ceil(element: Any) -> Any:
    return _whole_number(element, math.ceil, up=True)


def _whole_number(element: Any, of_number: Callable[[float], int], *, up: bool) -> Any:
    if isinstance(element, int | float):
        return of_number(element) if math.isfinite(element) else element
    return _rounded(element, up)


def _rounded(element: Any, up: bool) -> Any:
    """Round an exact quotient of integers."""
    if element.is_integer:
        return element
    numerator, denominator = element.as_numer_denom()
    if denominator.is_Integer:
        denominator = int(denominator)
    return (ceil_div if up else floor_div)(numerator, denominator)


_CONTENT: dict[str, Callable[[Any], Any]] = {
    "Identity": lambda element: element,
    "Neg": lambda element: -element,
    "Abs": _absolute,
    "Not": _negated,
    "Floor": _floor,
    "Ceil": _ceil,
    "Sqrt": _square_root,
}
"""Elementwise functions of content; None where the result is not known."""


@rule(_UNARY)
def _unary(site: Site) -> Outcome:
    first = site.fact(0)
    op = site.node.op_type
    known = first.known
    if op != "Identity" and known is not None:
        function = _CONTENT.get(op) if is_default_domain(site.node) else None
        known = None if function is None else _mapped(site, function, known, first.dtype)
    result = Fact(first.dtype, first.shape, known, first.element)
    if site.outputs == 1:
        return result
    return [result, Fact(ir.DataType.BOOL, first.shape)]


def _mapped(
    site: Site, function: Callable[[Any], Any], known: SymbolicArray, dtype: ir.DataType | None
) -> SymbolicArray | None:
    """Apply a function to each element; what is not known becomes a symbol that says so."""
    elements = [function(element) for element in known.flat]
    if dtype is None:
        return None
    if is_integer_type(dtype):
        elements = [site.anything() if element is None else element for element in elements]
        result = array_of(elements, known.shape)
        return result if in_range(result, dtype) else None
    if any(element is None for element in elements):
        return None
    kind = dtype.numpy().type
    numbers = [float(kind(e)) if isinstance(e, int | float) else e for e in elements]
    return array_of(numbers, known.shape)


@rule("IsNaN IsInf")
def _predicate(site: Site) -> Outcome:
    return Fact(ir.DataType.BOOL, site.shape(0))


@rule(_BROADCAST)
def _broadcast(site: Site) -> Outcome:
    dtype = site.dtype(0)
    return Fact(dtype, _common_shape(site), _folded(site, dtype))


@rule(_COMPARISONS)
def _comparison(site: Site) -> Outcome:
    return Fact(ir.DataType.BOOL, _common_shape(site), _folded(site, ir.DataType.BOOL))


def _common_shape(site: Site) -> Any:
    inputs = site.inputs
    if len(inputs) == 2 and inputs[0] is not None and inputs[1] is not None:
        first, second = inputs[0].shape, inputs[1].shape
        if first is second or first == second:
            return first
    return site.broadcast(*(fact.shape for fact in inputs if fact is not None))


def _folded(site: Site, dtype: ir.DataType | None) -> SymbolicArray | None:
    """Fold the operator over its inputs, left to right, where all their content is known."""
    if dtype is None or (site.node.op_type == "Mod" and site.attribute("fmod", 0)):
        return None
    total: SymbolicArray | None = None
    for fact in site.inputs:
        if fact is None or fact.known is None:
            return None
        if total is None:
            total = fact.known
        else:
            operand = site.dtype(0)
            total = _binary_content(site.node.op_type, total, fact.known, operand, site)
            if total is None or not trackable(dtype, total.size):
                return None
    if total is not None and is_integer_type(dtype) and not in_range(total, dtype):
        return None
    return total


@rule("Where")
def _where(site: Site) -> Outcome:
    shape = site.broadcast(site.shape(0), site.shape(1), site.shape(2))
    dtype = site.dtype(1) or site.dtype(2)
    condition, then, other = site.known(0), site.known(1), site.known(2)
    if condition is None or then is None or other is None:
        return Fact(dtype, shape)

    def choose(c: Any, x: Any, y: Any) -> Any:
        if c is True or c is False:
            return x if c else y
        return x if x is y or x == y else site.anything()

    known = object_array(np.frompyfunc(choose, 3, 1)(condition, then, other))
    followed = trackable(dtype, known.size)
    if followed and not is_integer_type(dtype):
        followed = all(isinstance(element, float) for element in known.flat)
    return Fact(dtype, shape, known if followed else None)


@rule("Cast CastLike BitCast")
def _cast(site: Site) -> Outcome:
    like = site.node.op_type == "CastLike"
    dtype = site.dtype(1) if like else ir.DataType(site.attribute("to"))
    known = None
    if site.known(0) is not None and dtype is not None and site.node.op_type != "BitCast":
        known = _cast_content(site.known(0), dtype, site)
    return Fact(dtype, site.shape(0), known)


def _cast_content(
    known: SymbolicArray | None, dtype: ir.DataType, site: Site
) -> SymbolicArray | None:
    """Convert content between types; see `in_range` for what is taken to fit 32 bits."""
    if known is None or not trackable(dtype, known.size):
        return None
    if known.size and dtype == ir.DataType.FLOAT16:
        return None
    result = np.empty(known.shape, dtype=object)
    for index, element in np.ndenumerate(known):
        converted = _cast_element(element, dtype)
        if _may_be_cut(converted, site.dtype(0), dtype):
            converted = site.anything()
        if converted is None:
            return None
        result[index] = converted
    if is_integer_type(dtype) and not in_range(result, dtype):
        return None
    return result


def _may_be_cut(element: Any, source: ir.DataType | None, dtype: ir.DataType) -> bool:
    """Tell whether an element is no extent, but any number, which a narrow type may not hold."""
    if source == dtype or not is_integer_type(dtype) or dtype.bitwidth == 64:
        return False
    symbols = getattr(element, "free_symbols", ())
    return not all(symbol.is_nonnegative for symbol in symbols)


def _cast_element(element: Any, dtype: ir.DataType) -> Any:
    if isinstance(element, bool | int | float):
        if dtype == ir.DataType.BOOL:
            return bool(element)
        if is_integer_type(dtype):
            return int(element) if math.isfinite(element) else None
        return float(dtype.numpy().type(element))
    if dtype == ir.DataType.BOOL:
        return True if at_least(element, 1) else None
    if is_integer_type(dtype):
        if dtype.bitwidth < 32:
            return None
        if not element.is_integer:
            return _rounded(element, False) if at_least(element, 0) else None
    return element
