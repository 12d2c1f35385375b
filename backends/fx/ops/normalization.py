"""Normalizations, and those fused with a residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lwc.backends.fx.ops.rotary import rows_at
from lwc.backends.fx.ops.rounding import in_single, rounded_to
from lwc.backends.fx.registry import op
from lwc.core.errors import LwcError

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor


def _computed_in(x: Tensor, stash_type: int) -> Tensor:
    """Return x in the type that statistics are taken in; 1 is float32."""
    return in_single(x) if stash_type == 1 else x


@op("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """Bring the axes from `axis` on to mean 0 and variance 1, then scale and shift."""
    extents = x.shape[axis % x.dim() :]
    plain = x.dtype in (torch.float32, torch.float64) and scale.shape == extents
    if outputs == 1 and plain and (bias is None or bias.shape == extents):
        return F.layer_norm(x, extents, scale, bias, epsilon)
    axes = list(range(axis % x.dim(), x.dim()))
    wide = _computed_in(x, stash_type)
    mean = wide.mean(axes, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    y = (centred * inverse).to(x.dtype) * scale
    y = y if bias is None else y + bias
    return (y, mean, inverse)[:outputs] if outputs > 1 else y


@op("RMSNormalization")
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Bring the axes from `axis` on to mean square 1, then scale."""
    return _rms(x, scale, axis, epsilon, stash_type)[0]


def _rms(
    x: Tensor, scale: Tensor, axis: int, epsilon: float, stash_type: int
) -> tuple[Tensor, Tensor]:
    axes = list(range(axis % x.dim(), x.dim()))
    wide = _computed_in(x, stash_type)
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale, inverse


@op("SimplifiedLayerNormalization com.microsoft::SimplifiedLayerNormalization")
def simplified_layer_normalization(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """RMSNormalization under its earlier name."""
    y, inverse = _rms(x, scale, axis, epsilon, stash_type)
    return (y, inverse) if outputs > 1 else y


@op("com.microsoft::SkipLayerNormalization")
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Any:
    """LayerNormalization of a sum; the fourth output is the sum."""
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    if outputs == 1:
        return y
    mean = total.mean(-1, keepdim=True)
    inverse = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + epsilon)
    return (y, mean, inverse, total)[:outputs]


@op("com.microsoft::SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Any:
    """RMSNormalization of a sum; the fourth output is the sum."""
    total = x + skip if bias is None else x + skip + bias
    y, inverse = _rms(total, gamma, -1, epsilon, 1)
    return (y, torch.zeros_like(inverse), inverse, total)[:outputs] if outputs > 1 else y


@op("com.microsoft::EmbedLayerNormalization")
def embed_layer_normalization(
    tokens: Tensor,
    segments: Tensor | None,
    word: Tensor,
    position: Tensor,
    segment: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> Any:
    """LayerNormalization of the sum of embeddings.

    Raises:
        LwcError: A token, position or segment is no row of its table, or positions are not those of
            one sequence or of all.
    """
    length = tokens.shape[1]
    places = torch.arange(length) if positions is None else positions
    if positions is not None and list(places.shape) not in ([1, length], list(tokens.shape)):
        raise LwcError(f"position_ids has shape {list(places.shape)}, not {list(tokens.shape)}")
    total = rows_at(word, tokens, "tokens") + rows_at(position, places)
    if segment is not None and segments is not None:
        total = total + rows_at(segment, segments, "segments")
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    if outputs == 1:
        return y
    counts = torch.zeros(tokens.shape[0], dtype=torch.int32)
    if mask is not None:
        counts = mask.sum(1).to(torch.int32)
    return (y, counts, total)[:outputs]


def _by_channel(x: Tensor, values: Tensor) -> Tensor:
    return values.reshape([-1] + [1] * (x.dim() - 2))


@op("BatchNormalization", ignored="spatial consumed_inputs")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    outputs: int = 1,
) -> Any:
    """Bring channels to mean 0 and variance 1, then scale and shift."""
    wide, now, spread = in_single(x), in_single(mean), in_single(variance)
    if training_mode:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        now = wide.mean(axes)
        spread = (wide - _by_channel(x, now)).square().mean(axes)
    factor = scale * torch.rsqrt(spread + epsilon)
    y = (wide - _by_channel(x, now)) * _by_channel(x, factor) + _by_channel(x, bias)
    y = rounded_to(y, x.dtype)
    if outputs == 1:
        return y
    running = [
        rounded_to(old * momentum + new * (1 - momentum), old.dtype)
        for old, new in ((mean, now), (variance, spread))
    ]
    return (y, *running)


@op("InstanceNormalization")
def instance_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """Bring each channel of each instance to mean 0 and variance 1, then scale and shift."""
    axes, wide = list(range(2, x.dim())), in_single(x)
    centred = wide - wide.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return rounded_to(y * _by_channel(x, scale) + _by_channel(x, bias), x.dtype)


@op("GroupNormalization", since=21)
def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """Bring groups of channels to mean 0 and variance 1, then scale and shift channels."""
    y = _grouped(x, num_groups, epsilon, stash_type)
    return y * _by_channel(x, scale) + _by_channel(x, bias)


@op("GroupNormalization", since=18)
def group_normalization_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """Bring groups of channels to mean 0 and variance 1, then scale and shift groups."""
    size = x.shape[1] // num_groups
    y = _grouped(x, num_groups, epsilon, 0)
    wide, shift = scale.repeat_interleave(size), bias.repeat_interleave(size)
    return y * _by_channel(x, wide) + _by_channel(x, shift)


def _grouped(x: Tensor, groups: int, epsilon: float, stash_type: int) -> Tensor:
    rows = _computed_in(x, stash_type).reshape(x.shape[0], groups, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return y.reshape(x.shape).to(x.dtype)


@op("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1
) -> Tensor:
    """Divide by what the neighbouring channels have together."""
    before, after = (size - 1) // 2, size // 2
    wide = in_single(x)
    squares = F.pad(wide.square(), [0, 0] * (x.dim() - 2) + [before, after])
    total = squares.unfold(1, size, 1).sum(-1)
    return rounded_to(wide / (bias + alpha / size * total) ** beta, x.dtype)


@op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the norm along an axis; what is all 0 stays."""
    wide = in_single(x)
    norm = torch.linalg.vector_norm(wide, p, axis, keepdim=True)
    return rounded_to(wide / torch.where(norm == 0, torch.ones_like(norm), norm), x.dtype)


@op("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Bring axes to mean 0 and variance 1."""
    wide = in_single(x)
    centred = wide - wide.mean(list(axes), keepdim=True)
    spread = centred.square().mean(list(axes), keepdim=True).sqrt()
    return rounded_to(centred / (spread + 1e-9), x.dtype)
