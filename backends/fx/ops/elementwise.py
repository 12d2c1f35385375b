"""Elementwise operators."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from lwc.backends.fx.ops.rounding import in_single, rounded, rounded_to
from lwc.backends.fx.registry import direct, op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor

direct(
    {
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "Ceil": torch.ceil,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": torch.floor,
        "IsNaN": torch.isnan,
        "Log": torch.log,
        "Mish": F.mish,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Softsign": F.softsign,
        "Sqrt": torch.sqrt,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "And": torch.logical_and,
        "Or": torch.logical_or,
        "Where": torch.where,
        "Xor": torch.logical_xor,
    }
)
direct(
    {
        "Abs": torch.abs,
        "Add": torch.add,
        "Equal": torch.eq,
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "Mul": torch.mul,
        "Sub": torch.sub,
    },
    wide=True,
)
direct(
    {
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseNot": torch.bitwise_not,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
    },
    wide=True,
    exact=True,
)


@op("Identity")
def identity(x: Any) -> Any:
    """Return what is given."""
    return x


@op("Sign", wide=True)
def sign(x: Tensor) -> Tensor:
    """Return -1, 0 or 1; NaN stays."""
    return torch.where(x.isnan(), x, x.sign()) if x.is_floating_point() else x.sign()


@op("Softplus")
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return torch.logaddexp(x, torch.zeros_like(x))


@op("Round")
def round_(x: Tensor, *, straight_through: bool = False) -> Tensor:
    """Round, half to even."""
    return rounded(x, straight_through)


@op("Div", wide=True, exact=True)
def div(a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers toward zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@op("Mod", wide=True)
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Take the remainder, with the sign of the divisor, or of the dividend with `fmod`."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@op("Pow", wide=True)
def pow_(base: Tensor, exponent: Tensor) -> Tensor:
    """Raise to a power, in the type of the base."""
    return torch.pow(base, exponent).to(base.dtype)


@op("Max", wide=True)
def max_(*values: Tensor) -> Tensor:
    """Return the greatest."""
    return functools.reduce(torch.maximum, values)


@op("Min", wide=True)
def min_(*values: Tensor) -> Tensor:
    """Return the least."""
    return functools.reduce(torch.minimum, values)


@op("Sum")
def sum_(*values: Tensor) -> Tensor:
    """Add."""
    return rounded_to(functools.reduce(torch.add, map(in_single, values)), values[0].dtype)


@op("Mean")
def mean(*values: Tensor) -> Tensor:
    """Average."""
    total = functools.reduce(torch.add, map(in_single, values))
    return rounded_to(total / len(values), values[0].dtype)


@op("Clip", wide=True)
def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """Bound; the greatest wins where the bounds cross."""
    if min is not None:
        x = torch.maximum(x, torch.as_tensor(min, dtype=x.dtype))
    return x if max is None else torch.minimum(x, torch.as_tensor(max, dtype=x.dtype))


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Tell which elements are infinite."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | (x == -math.inf)
    return found | (x == math.inf) if detect_positive else found


@op("BitShift", wide=True, exact=True)
def bit_shift(x: Tensor, by: Tensor, *, direction: Literal["LEFT", "RIGHT"]) -> Tensor:
    """Shift."""
    shift = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return shift(x, by)


# Activations


@op("Celu")
def celu(x: Tensor, *, alpha: float = 1) -> Tensor:
    """max(0, x) + min(0, alpha * (exp(x / alpha) - 1))."""
    return F.celu(x, alpha)


@op("Elu")
def elu(x: Tensor, *, alpha: float = 1) -> Tensor:
    """x above 0, alpha * (exp(x) - 1) below."""
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


@op("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha * x + beta, between 0 and 1."""
    return (alpha * x + beta).clamp(0, 1)


@op("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """x * HardSigmoid(x) with 1/6 and 1/2."""
    return x * (x / 6 + 0.5).clamp(0, 1)


@op("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x above 0, alpha * x below."""
    return F.leaky_relu(x, alpha)


@op("PRelu")
def p_relu(x: Tensor, slope: Tensor) -> Tensor:
    """x above 0, slope * x below."""
    return torch.where(x < 0, slope * x, x)


@op("Selu")
def selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    """gamma * Elu(x)."""
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


@op("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1) -> Tensor:
    """x above alpha, 0 below."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@op("Shrink")
def shrink(x: Tensor, *, lambd: float = 0.5, bias: float = 0) -> Tensor:
    """Bring what lies outside of [-lambd, lambd] nearer by bias; 0 inside."""
    outer = torch.where(x > lambd, x - bias, torch.zeros_like(x))
    return torch.where(x < -lambd, x + bias, outer)


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


@op("com.microsoft::QuickGelu")
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


@op("SwiGLU")
def swiglu(x: Tensor, gate: Tensor | None = None, *, alpha: float = 1) -> Tensor:
    """Open a gate by Swish."""
    if gate is None:
        x, gate = x.chunk(2, dim=-1)
    return x * torch.sigmoid(alpha * x) * gate


@op("Gelu")
def gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """x * P(X <= x) for a normal variable X, exactly or by tanh."""
    return F.gelu(x, approximate=approximate)


direct({"com.microsoft::Gelu": F.gelu})


@op("com.microsoft::BiasGelu")
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Gelu of a sum."""
    return F.gelu(x + bias)


@op("com.microsoft::FastGelu")
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gelu by tanh, of a sum if there is a bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("Dropout", ignored="seed", since=7)
def dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training: Tensor | None = None,
    *,
    outputs: int = 1,
) -> Any:
    """Return x; in training mode, drop elements at random."""
    if training is None or not bool(training):
        y, mask = x, torch.ones_like(x, dtype=torch.bool)
    else:
        rate = 0.5 if ratio is None else float(ratio)
        mask = torch.rand_like(x) >= rate
        y = x * mask / (1 - rate) if rate < 1 else torch.zeros_like(x)
    return (y, mask) if outputs > 1 else y
