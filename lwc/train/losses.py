"""Losses of logits and other outputs, as torch scalars: means over positions, in nats."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F

__all__ = ["kl_divergence", "mean_squares", "next_token_loss", "reverse_kl_divergence"]

Tensor: TypeAlias = torch.Tensor


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of each token given those before it.

    Args:
        logits: `[batch, length, classes]`.
        ids: `[batch, length]`; the label of a position is the token after it.
        mask: `[batch, length]`, 0 where there is padding, which is neither label nor context.

    Returns:
        The mean over labels, 0 where there is none.
    """
    counts = None if mask is None else (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    rows, labels = (_rows(each, counts) for each in (logits[:, :-1], ids[:, 1:]))
    return _mean(
        F.cross_entropy(rows.flatten(0, -2), labels.flatten().to(torch.int64), reduction="none")
    )


def kl_divergence(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher ‖ student) of softened distributions, times the squared temperature.

    The square keeps the size of gradients (Hinton et al. 2015, section 2). It makes the student
    cover all that the teacher thinks likely.

    Args:
        teacher: Logits `[..., classes]`.
        student: Logits of the same shape.
        temperature: What logits are divided by.
        mask: `[...]`, 0 where a position does not count.
    """
    return _divergence(teacher, student, temperature, mask)


def reverse_kl_divergence(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """KL(student ‖ teacher), else as `kl_divergence`.

    It keeps the student from what the teacher thinks unlikely, also at the cost of leaving some
    of the likely out (Gu et al. 2024, MiniLLM; here at each position of given texts).
    """
    return _divergence(student, teacher, temperature, mask)


def _divergence(p: Tensor, q: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    log_p, log_q = (torch.log_softmax(_rows(each, mask) / temperature, -1) for each in (p, q))
    never = log_p.isneginf()
    if never.any():  # 0 · log 0 is 0, and so are its derivatives
        log_p, log_q = log_p.masked_fill(never, 0), log_q.masked_fill(never, 0)
    each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return _mean(each) * temperature**2


def mean_squares(teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error over the mean square of the teacher, which makes it free of units.

    Where the teacher is all zeros, the plain mean of squares.

    Args:
        teacher: Numbers of any shape; with a mask `[..., size]`.
        student: Of the same shape.
        mask: `[...]`, 0 where a position does not count.
    """
    teacher, student = _rows(teacher, mask), _rows(student, mask)
    size = _mean(teacher.square())
    off = _mean((student - teacher).square())
    return off / torch.where(size > 0, size, torch.ones_like(size))


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows that count. Others are left out, not multiplied by 0: they may be NaN."""
    return values if mask is None or mask.all() else values[mask != 0]


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())
