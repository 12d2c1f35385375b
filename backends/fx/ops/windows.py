"""What convolutions and pools share: pads of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

__all__ = ["AutoPad", "padded", "pads_of"]

Tensor: TypeAlias = torch.Tensor
AutoPad: TypeAlias = Literal["", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]


def pads_of(
    extents: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: AutoPad,
) -> tuple[list[int], list[int]]:
    """Return how much is added before and after each spatial axis."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            torch.sym_max(((n + s - 1) // s - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(extents, kernel, strides, dilations, strict=True)
        ]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    if auto_pad == "VALID" or pads is None:
        return [0] * rank, [0] * rank
    return list(pads[:rank]), list(pads[rank:])


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0) -> Tensor:
    """Put a constant around the last axes."""
    edges = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    return F.pad(x, edges, value=value) if any(edges) else x
