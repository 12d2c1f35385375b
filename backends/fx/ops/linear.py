"""Products."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

from lwc.backends.fx.ops.activations import ACTIVATIONS
from lwc.backends.fx.registry import direct, op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor

direct({"Det": torch.linalg.det})


@op("MatMul", wide=True)
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices."""
    return torch.matmul(a, b)


@op("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1,
    beta: float = 1,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha * A B + beta * C."""
    y = torch.matmul(a.T if transA else a, b.T if transB else b)
    if alpha != 1.0:
        y = (y * alpha).to(a.dtype)
    if c is None:
        return y
    return y + (c if beta == 1.0 else (c * beta).to(c.dtype))


@op("com.microsoft::FusedGemm")
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: Literal[
        "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "Selu", "Softplus",
        "Softsign", "ThresholdedRelu", "ScaledTanh",
    ],
    activation_alpha: float = 0,
    activation_beta: float = 0,
    activation_gamma: float = 0,
    alpha: float = 1,
    beta: float = 1,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:  # fmt: skip
    """Gemm, and an activation of it."""
    y = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    if activation == "Selu":
        return activation_gamma * F.elu(y, activation_alpha)
    return ACTIVATIONS[activation.lower()](y, activation_alpha, activation_beta)


@op("com.microsoft::FusedMatMul com.microsoft::TransposeMatMul")
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha * A B, with the last axes turned, or the first moved before the last."""
    a, b = _turned(a, transA, transBatchA), _turned(b, transB, transBatchB)
    y = torch.matmul(a, b)
    return y if alpha == 1.0 else y * alpha


def _turned(x: Tensor, last: int, batch: int) -> Tensor:
    if batch:
        x = x.movedim(0, -2)
    return x.mT if last and x.dim() > 1 else x


@op("Einsum")
def einsum(*values: Tensor, equation: str) -> Tensor:
    """Sum products of elements by named axes."""
    return torch.einsum(re.sub(r"\s", "", equation), *values)
