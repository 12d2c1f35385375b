"""Operators that work on each element by itself: a fixed number of FLOPs per output element."""

from __future__ import annotations

from lwc.analysis.cost_rules.base import MS, CostRule, Operands, Work, cost_rule

__all__: list[str] = []

# FLOPs per element and kernel table, by operator. A primitive function is one FLOP; a compound
# one counts what its formula does, so that it costs what its decomposition would.
_FLOPS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Mod"), (1, "binary")
    ),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), (1, "compare")),
    **dict.fromkeys(("And", "Or", "Xor", "Not", "BitwiseAnd", "BitwiseOr"), (1, "compare")),
    **dict.fromkeys(("BitwiseNot", "BitwiseXor", "BitShift", "IsNaN", "IsInf"), (1, "compare")),
    **dict.fromkeys(("Abs", "Neg", "Relu", "Ceil", "Floor", "Round", "Sign"), (1, "relu")),
    "Reciprocal": (1, "relu"),
    "Sqrt": (1, "relu"),
    "Clip": (2, "relu"),
    "LeakyRelu": (2, "relu"),
    "ThresholdedRelu": (2, "relu"),
    "PRelu": (2, "binary"),
    "HardSigmoid": (4, "relu"),
    "HardSwish": (5, "relu"),
    **dict.fromkeys(("Exp", "Log", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan"), (1, "exp")),
    **dict.fromkeys(("Sinh", "Cosh", "Asinh", "Acosh", "Atanh"), (1, "exp")),
    "Sigmoid": (1, "sigmoid"),
    "Tanh": (1, "tanh"),
    "Erf": (1, "erf"),
    "Pow": (1, "pow"),
    "Elu": (3, "exp"),
    "Celu": (4, "exp"),
    "Selu": (4, "exp"),
    "Softplus": (3, "exp"),
    "Softsign": (3, "relu"),
    "Mish": (5, "tanh"),
    "Swish": (2, "sigmoid"),  # x · sigmoid(x)
    f"{MS}QuickGelu": (3, "sigmoid"),  # x · sigmoid(αx)
    # Gelu: x/2 · (1 + erf(x/√2)); the tanh form x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))).
    "Gelu": (5, "gelu"),
    f"{MS}Gelu": (5, "gelu"),
    f"{MS}FastGelu": (9, "gelu"),
    f"{MS}BiasSplitGelu": (7, "gelu"),
    f"{MS}BiasAdd": (2, "binary"),
}

_CONVERSIONS = {
    "Cast": "cast",
    "CastLike": "cast",
    "BitCast": "cast",
    "Dropout": "copy",
}
"""No FLOPs, but every element is read and written."""


def _per_element(flops: int, kernel: str) -> CostRule:
    def rule(node: Operands) -> Work:
        elements = node.out_size()
        return Work(other_flops=elements * flops, kernel=kernel, problem=(elements,))

    return rule


def _binary(flops: int) -> CostRule:
    def rule(node: Operands) -> Work:
        elements = node.out_size()
        count = max(len(node.inputs) - 1, 1)  # Sum, Max, ... take any number of inputs
        kernel = "binary" if len(node.inputs) > 1 else "copy"
        return Work(
            other_flops=elements * flops * count, kernel=kernel, problem=(elements,), repeat=count
        )

    return rule


for _op, (_flops, _kernel) in _FLOPS.items():
    cost_rule(_op)(_binary(_flops) if _kernel == "binary" else _per_element(_flops, _kernel))
for _op, _kernel in _CONVERSIONS.items():
    cost_rule(_op)(_per_element(0, _kernel))


@cost_rule("Where")
def _where(node: Operands) -> Work:
    """One selection per element; the kernel makes both sides as large as the result, then joins."""
    elements = node.out_size()
    scratch = 2 * node.out_nbytes()
    return Work(other_flops=elements, scratch=scratch, kernel="where", problem=(elements,))


@cost_rule(f"{MS}BiasGelu")
def _bias_gelu(node: Operands) -> Work:
    """Add the bias, then Gelu; the kernel holds the sum apart."""
    elements = node.out_size()
    return Work(other_flops=elements * 6, scratch=elements * 4, kernel="gelu", problem=(elements,))


@cost_rule("QuantizeLinear", f"{MS}QuantizeLinear")
def _quantize(node: Operands) -> Work:
    """Divide, round, add the zero point, clamp (two comparisons)."""
    elements = node.out_size()
    return Work(other_flops=elements * 5, kernel="quantize", problem=(elements,))


@cost_rule("DequantizeLinear", f"{MS}DequantizeLinear")
def _dequantize(node: Operands) -> Work:
    """Subtract the zero point, multiply by the scale."""
    elements = node.out_size()
    flops = 2 if node.has(2) else 1
    return Work(other_flops=elements * flops, kernel="dequantize", problem=(elements,))


@cost_rule("DynamicQuantizeLinear")
def _dynamic_quantize(node: Operands) -> Work:
    """Find minimum and maximum, then quantize."""
    elements = node.size(0)
    return Work(other_flops=elements * 7, kernel="quantize", problem=(elements,), repeat=2)


@cost_rule(f"{MS}QLinearAdd", f"{MS}QLinearMul")
def _quantized_binary(node: Operands) -> Work:
    """Dequantize both, combine, quantize."""
    elements = node.out_size()
    return Work(other_flops=elements * 10, kernel="quantize", problem=(elements,))


@cost_rule(f"{MS}QLinearSigmoid", f"{MS}QLinearLeakyRelu", f"{MS}QLinearSoftmax")
def _quantized_unary(node: Operands) -> Work:
    """Dequantize, apply, quantize."""
    elements = node.out_size()
    return Work(other_flops=elements * 8, kernel="quantize", problem=(elements,))


@cost_rule("RotaryEmbedding", f"{MS}RotaryEmbedding")
def _rotary(node: Operands) -> Work:
    """Rotate each pair: two products and a sum per element of the input."""
    elements = node.size(0)
    return Work(
        macs=elements,
        other_flops=elements,
        read=node.nbytes(0) * 2,
        kernel="binary",
        problem=(elements,),
        repeat=2,
    )
