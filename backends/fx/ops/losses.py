"""Losses."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch

from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor
Reduction: TypeAlias = Literal["none", "mean", "sum"]


@op("NegativeLogLikelihoodLoss")
def negative_log_likelihood_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return -x at the target classes, weighted and averaged by the weights."""
    wide = target.to(torch.int64)
    counted = torch.ones_like(wide, dtype=torch.bool)
    if ignore_index is not None:
        counted = wide != ignore_index
        wide = torch.where(counted, wide, torch.zeros_like(wide))
    shares = counted.to(x.dtype) if weight is None else weight[wide] * counted
    loss = -torch.gather(x, 1, wide.unsqueeze(1)).squeeze(1) * shares
    if reduction == "none":
        return loss
    return loss.sum() / shares.sum() if reduction == "mean" else loss.sum()


@op("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    outputs: int = 1,
) -> Any:
    """Return the loss of LogSoftmax, and that too where it is asked for."""
    logs = torch.log_softmax(x, 1)
    loss = negative_log_likelihood_loss(
        logs, target, weight, ignore_index=ignore_index, reduction=reduction
    )
    return (loss, logs) if outputs > 1 else loss
