"""Reductions, softmax and normalizations: several FLOPs per element of the input."""

from __future__ import annotations

from lwc.analysis.cost_rules.base import MS, CostRule, Operands, Work, cost_rule
from lwc.core.dims import Dim, product

__all__: list[str] = []


def _reduction(per_input: int, per_output: int) -> CostRule:
    def rule(node: Operands) -> Work:
        elements = node.size(0)
        flops = elements * per_input + node.out_size() * per_output
        return Work(other_flops=flops, kernel="reduce", problem=(elements,))

    return rule


# FLOPs per element read and per element written.
for _op, (_per_input, _per_output) in {
    "ReduceSum": (1, 0),
    "ReduceMax": (1, 0),
    "ReduceMin": (1, 0),
    "ReduceProd": (1, 0),
    "ReduceMean": (1, 1),
    "ReduceL1": (2, 0),
    "ReduceL2": (2, 1),
    "ReduceSumSquare": (2, 0),
    "ReduceLogSum": (1, 1),
    "ReduceLogSumExp": (4, 2),
    "ArgMax": (1, 0),
    "ArgMin": (1, 0),
    "CumSum": (1, 0),
    "GlobalAveragePool": (1, 1),
    "GlobalMaxPool": (1, 0),
    f"{MS}QLinearGlobalAveragePool": (3, 5),
    f"{MS}QLinearReduceMean": (3, 5),
}.items():
    cost_rule(_op)(_reduction(_per_input, _per_output))


@cost_rule("Softmax", "LogSoftmax", f"{MS}Softmax")
def _softmax(node: Operands) -> Work:
    """Maximum, subtract, exp, sum, divide."""
    elements = node.size(0)
    return Work(other_flops=elements * 5, kernel="softmax", problem=(elements,))


@cost_rule("Hardmax")
def _hardmax(node: Operands) -> Work:
    elements = node.size(0)
    return Work(other_flops=elements * 2, kernel="reduce", problem=(elements,))


@cost_rule("TopK")
def _top_k(node: Operands) -> Work:
    """A heap of k per row: one comparison per element at least, a lower bound."""
    elements = node.size(0)
    return Work(other_flops=elements, kernel="reduce", problem=(elements,))


def _normalize(node: Operands, flops: int, kernel: str = "layer_norm") -> Work:
    elements = node.size(0)
    return Work(other_flops=elements * flops, kernel=kernel, problem=(elements,))


@cost_rule("LayerNormalization", "InstanceNormalization", "GroupNormalization")
@cost_rule(f"{MS}GroupNorm")
def _layer_norm(node: Operands) -> Work:
    """Sum, subtract the mean, square, sum, divide by the deviation; then scale and bias."""
    return _normalize(node, 5 + int(node.has(1)) + int(node.has(2)))


@cost_rule("RMSNormalization", "SimplifiedLayerNormalization")
@cost_rule(f"{MS}SimplifiedLayerNormalization", "LpNormalization")
def _rms_norm(node: Operands) -> Work:
    """Square, sum, divide by the root mean square; then scale."""
    return _normalize(node, 3 + int(node.has(1)), "rms_norm")


@cost_rule(f"{MS}SkipLayerNormalization", f"{MS}SkipSimplifiedLayerNormalization")
def _skip_norm(node: Operands) -> Work:
    """Add the skip (and a bias), then normalize."""
    simplified = node.op.endswith("SkipSimplifiedLayerNormalization")
    bias = int(node.has(3 if simplified else 4))
    if simplified:
        return _normalize(node, 3 + 1 + bias + 1, "skip_rms_norm")
    return _normalize(node, 5 + 1 + bias + 1 + int(node.has(3)), "skip_layer_norm")


@cost_rule(f"{MS}EmbedLayerNormalization")
def _embed_norm(node: Operands) -> Work:
    """Add two or three gathered rows, then normalize."""
    elements = node.out_size()
    added = 2 if node.has(4) else 1
    return Work(
        other_flops=elements * (7 + added),
        read=node.out_nbytes() * (added + 1) + node.nbytes(0),
        kernel="layer_norm",
        problem=(elements,),
    )


@cost_rule("BatchNormalization")
def _batch_norm(node: Operands) -> Work:
    """At inference one multiply-add per element; scale and bias of a channel are folded first."""
    elements = node.size(0)
    return Work(macs=elements, kernel="binary", problem=(elements,))


@cost_rule("MeanVarianceNormalization")
def _mean_variance(node: Operands) -> Work:
    return _normalize(node, 5)


@cost_rule("LRN")
def _lrn(node: Operands) -> Work:
    """Square, a window sum over channels, scale, bias, power, divide."""
    elements = node.size(0)
    return Work(
        other_flops=elements * (5 + int(node.attr("size", 1))), kernel="pow", problem=(elements,)
    )


@cost_rule("MaxPool", "AveragePool", "LpPool", "com.microsoft.nchwc::MaxPool")
@cost_rule("com.microsoft.nchwc::AveragePool", f"{MS}QLinearAveragePool")
def _pool(node: Operands) -> Work:
    """One operation per window element."""
    window: Dim = product(node.attr("kernel_shape", ()))
    elements = node.out_size() * window
    return Work(other_flops=elements, kernel="reduce", problem=(elements,))


@cost_rule("com.microsoft.nchwc::GlobalAveragePool", "com.microsoft.nchwc::GlobalMaxPool")
def _blocked_global_pool(node: Operands) -> Work:
    elements = node.size(0)
    return Work(other_flops=elements, kernel="reduce", problem=(elements,))
