"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from lwc.backends.fx.ops.windows import AutoPad, padded, pads_of
from lwc.backends.fx.registry import op

__all__ = ["convolve"]

Tensor: TypeAlias = torch.Tensor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: AutoPad,
    group: int,
    fill: float = 0,
) -> Tensor:
    """Convolve with what lies around x taken for `fill`."""
    rank = x.dim() - 2
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = pads_of(x.shape[2:], weight.shape[2:], steps, gaps, pads, auto_pad)
    function = _CONVOLUTIONS[rank]
    if before == after and fill == 0:
        return function(x, weight, bias, steps, before, gaps, group)
    return function(padded(x, before, after, fill), weight, bias, steps, 0, gaps, group)


@op("Conv", ignored="kernel_shape")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    group: int = 1,
) -> Tensor:
    """Convolve."""
    return convolve(
        x,
        weight,
        bias,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        group=group,
    )


@op("com.microsoft::FusedConv", ignored="kernel_shape")
def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    activation: Literal["", "Relu", "Tanh", "Sigmoid", "LeakyRelu", "Clip", "HardSigmoid"] = "",
    activation_params: Sequence[float] = (),
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    group: int = 1,
) -> Tensor:
    """Convolve, add, and apply an activation."""
    y = convolve(
        x,
        weight,
        bias,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        group=group,
    )
    y = y if addend is None else y + addend
    if not activation:
        return y
    return _ACTIVATIONS[activation](y, *activation_params)


_ACTIVATIONS: dict[str, Any] = {
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "LeakyRelu": F.leaky_relu,
    "Clip": torch.clamp,
    "HardSigmoid": lambda y, alpha, beta: (alpha * y + beta).clamp(0, 1),
}


@op("ConvTranspose", ignored="kernel_shape")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    auto_pad: AutoPad = "NOTSET",
    group: int = 1,
) -> Tensor:
    """Undo a convolution's change of extents."""
    rank = x.dim() - 2
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    whole = [
        s * (n - 1) + e + (k - 1) * d + 1
        for s, n, e, k, d in zip(steps, x.shape[2:], extra, weight.shape[2:], gaps, strict=True)
    ]
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    if output_shape is None and same:
        # ONNX Runtime pads by no less than 0.
        output_shape = [min(n * s, w) for n, s, w in zip(x.shape[2:], steps, whole, strict=True)]
    if output_shape is not None:
        totals = [w - n for w, n in zip(whole, output_shape[-rank:], strict=True)]
        # What lacks instead of being too much is filled at the end, as ONNX Runtime does it.
        before = [(max(t, 0) + (auto_pad != "SAME_UPPER")) // 2 for t in totals]
        after = [t - b for t, b in zip(totals, before, strict=True)]
    elif auto_pad == "VALID" or pads is None:
        before = after = [0] * rank
    else:
        before, after = list(pads[:rank]), list(pads[rank:])
    y = _TRANSPOSED[rank](x, weight, None, steps, 0, 0, group, gaps)
    # Output padding goes to the end; pads are cut off. Either may be the greater.
    y = F.pad(
        y,
        [
            n
            for b, a, e in zip(before[::-1], after[::-1], extra[::-1], strict=True)
            for n in (-b, e - a)
        ],
    )
    return y if bias is None else y + bias.reshape([-1] + [1] * rank)


@op("DeformConv", ignored="kernel_shape")
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    group: int = 1,
    offset_group: int = 1,
) -> Tensor:
    """Convolve a plane whose samples are moved about by `offset`, between pixels too."""
    (sy, sx), (dy, dx) = strides or (1, 1), dilations or (1, 1)
    top, left, *_ = pads or (0, 0, 0, 0)
    batch, channels = x.shape[:2]
    kernel_height, kernel_width = weight.shape[2:]
    height, width = offset.shape[2:]
    taps = kernel_height * kernel_width
    moves = offset.reshape(batch, offset_group, taps, 2, height, width)
    tap_rows = torch.arange(kernel_height).repeat_interleave(kernel_width) * dy
    tap_columns = torch.arange(kernel_width).repeat(kernel_height) * dx
    rows = (torch.arange(height) * sy - top).reshape(1, -1, 1) + tap_rows.reshape(-1, 1, 1)
    columns = (torch.arange(width) * sx - left).reshape(1, 1, -1) + tap_columns.reshape(-1, 1, 1)
    sampled = _bilinear(
        x.reshape(batch, offset_group, channels // offset_group, *x.shape[2:]),
        moves[:, :, :, 0] + rows,
        moves[:, :, :, 1] + columns,
    )
    if mask is not None:
        sampled = sampled * mask.reshape(batch, offset_group, 1, taps, height, width)
    sampled = sampled.reshape(batch, group, channels // group, taps, height, width)
    filters = weight.reshape(group, -1, weight.shape[1], taps)
    y = torch.einsum("bgcthw,gfct->bgfhw", sampled, filters).flatten(1, 2)
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def _bilinear(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample `x[batch, group, channel, h, w]` at `rows[batch, group, ...]`; 0 outside."""
    height, width = x.shape[3:]
    flat = x.flatten(3)
    total: Any = 0
    for row, row_weight in _neighbours(rows):
        for column, column_weight in _neighbours(columns):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index = place.to(torch.int64).flatten(2).unsqueeze(2)
            taken = torch.gather(flat, 3, index.expand(-1, -1, x.shape[2], -1))
            taken = taken.reshape(*x.shape[:3], *rows.shape[2:])
            total = total + taken * (row_weight * column_weight * inside).unsqueeze(2)
    return total


def _neighbours(places: Tensor) -> list[tuple[Tensor, Tensor]]:
    low = places.detach().floor()
    share = places - low
    return [(low, 1 - share), (low + 1, share)]


@op("CausalConvWithState", many=True)
def causal_conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    *,
    activation: Literal["none", "silu", "swish"] = "none",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with what came before, which is returned for the next call."""
    width = weight.shape[-1]
    if past is None:
        past = torch.zeros((*x.shape[:2], width - 1), dtype=x.dtype)
    whole = torch.cat([past, x], dim=-1)
    y = F.conv1d(whole, weight, bias, groups=x.shape[1])
    if activation != "none":
        y = F.silu(y)
    return y, whole[..., whole.shape[-1] - (width - 1) :]
