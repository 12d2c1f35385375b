"""Products and lookups that read packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
import torch.nn.functional as F

from lwc.backends.fx.ops.rounding import rounded
from lwc.backends.fx.registry import Use, op
from lwc.core.quant_layout import STEP, TILE
from lwc.passes.quantization.codebook import nf4_levels

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Take the fields of bytes apart, the lowest first: the last axis gets longer."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


@op("com.microsoft::MatMulNBits", ignored="accuracy_level", zero="weight_prepacked")
def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    group_of_input: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
) -> Tensor:
    """Multiply by weights of `[N, K]`, packed in blocks along K."""
    blocks = -(-K // block_size)
    numbers = _fields(codes.reshape(N, blocks, -1), bits)[..., :block_size].to(scales.dtype)
    if zero_points is None:
        zeros: Any = float(1 << (bits - 1))
    elif zero_points.is_floating_point():
        zeros = zero_points.reshape(N, blocks, 1)
    else:
        unpacked = _fields(zero_points.reshape(N, -1), bits)[:, :blocks]
        zeros = unpacked.to(scales.dtype).unsqueeze(-1)
    steps = scales.reshape(N, blocks, 1)
    if group_of_input is None:
        weight = ((numbers - zeros) * steps).reshape(N, -1)[:, :K]
    else:
        group = group_of_input.to(torch.int64)[:K]
        flat = numbers.reshape(N, -1)[:, :K]
        centre = zeros if isinstance(zeros, float) else zeros[:, group, 0]
        weight = (flat - centre) * steps[:, group, 0]
    return F.linear(x, weight.to(x.dtype), bias)


_FP4 = (0.0, 5.208333333e-03, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
"""The levels of `quant_type` 0; the upper half of the codes are their negatives."""


@op("com.microsoft::MatMulBnb4", ignored="training_mode")
def matmul_bnb4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    transB: int = 1,
) -> Tensor:
    """Multiply by weights whose codes stand for uneven levels; the high half of a byte is first."""
    levels = nf4_levels().tolist() if quant_type else [*_FP4, *(-level for level in _FP4)]
    table = torch.tensor(levels, dtype=scales.dtype)
    flat = codes.reshape(-1)
    order = torch.stack([flat >> 4, flat & 15], dim=-1).reshape(-1)[: N * K]
    steps = scales.repeat_interleave(block_size)[: N * K]
    weight = (table[order.to(torch.int64)] * steps).to(x.dtype)
    return F.linear(x, weight.reshape(N, K)) if transB else torch.matmul(x, weight.reshape(K, N))


def _is_packed(use: Use) -> Mapping[str, Any]:
    return {"packed": use.dtype(0) == ir.DataType.UINT8}


@op("com.microsoft::GatherBlockQuantized", extra=_is_packed)
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    packed: bool,
) -> Tensor:
    """Look up quantized rows; bytes hold several codes along the last axis where `packed`."""
    codes = _fields(data, bits) if packed else data
    axis, blocked = gather_axis % codes.dim(), quantize_axis % codes.dim()
    place = (slice(None),) * axis + (indices.to(torch.int64),)
    numbers = codes[place].to(scales.dtype)
    width = codes.shape[blocked]
    if zero_points is not None:
        zeros = _fields(zero_points, bits)[..., : scales.shape[-1]] if packed else zero_points
        numbers = numbers - _by_block(zeros.to(scales.dtype), block_size, blocked, width)[place]
    elif packed:
        numbers = numbers - float(1 << (bits - 1))
    return numbers * _by_block(scales, block_size, blocked, width)[place]


def _by_block(values: Tensor, size: int, axis: int, width: int) -> Tensor:
    return values.repeat_interleave(size, axis).narrow(axis, 0, width)


@op("lwc::DynamicQuantMatMul")
def dynamic_quant_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *rest: Tensor,
    K: int,
    N: int,
    bits: int,
    block_size: int = 0,
    x_block: int = 0,
    zero_points: int = 0,
    bias: int = 0,
    activation: str = "none",
    gated: int = 0,
    straight_through: bool = False,
) -> Tensor:
    """Round activations to 8 bits and multiply; `lwc.core.dialect` states the formula."""
    zeros = rest[0] if zero_points else None
    shift = rest[zero_points] if bias else None
    tiles = -(-N // TILE)
    depth = -(-K // STEP) * STEP
    numbers = _lines(codes, bits, tiles).permute(1, 3, 0, 2).reshape(depth, tiles * TILE)
    block = block_size or depth
    weight = numbers[:K, :N].to(torch.float32)
    centre: Any = float(1 << (bits - 1))
    if zeros is not None:
        centre = _columns(zeros, tiles, block, K, N)
    weight = (weight - centre) * _columns(scales, tiles, block, K, N)
    y = torch.matmul(_eight_bits(x, block_size if x_block else 0, straight_through), weight)
    y = y if shift is None else y + shift
    if not gated:
        return _activated(y, activation)
    pairs = y.reshape(*y.shape[:-1], tiles // 2, 2, TILE)
    open_, other = _activated(pairs[..., 0, :], activation), pairs[..., 1, :]
    return (open_ * other).flatten(-2)


def _lines(codes: Tensor, bits: int, tiles: int) -> Tensor:
    """Take packed codes apart: uint8 `[tiles, depth / 4, 16, 4]`."""
    if bits == 8:
        return codes.reshape(tiles, -1, TILE, 4)
    if bits != 3:
        return _split(codes.reshape(tiles, -1, TILE, 4), bits).reshape(tiles, -1, TILE, 4)
    planes = codes.reshape(tiles, -1, 3, TILE, 4)
    low = _split(planes[:, :, :2], 2).reshape(tiles, -1, TILE, 4)
    high = _split(planes[:, :, 2], 1).reshape(tiles, -1, TILE, 4)
    return low | (high << 2)


def _split(lines: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).reshape(-1, 1, 1)
    return (lines.unsqueeze(-3) >> shifts) & ((1 << bits) - 1)


def _columns(values: Tensor, tiles: int, block: int, inputs: int, outputs: int) -> Tensor:
    """Spread scales or zero points of tiles to the elements of a weight `[inputs, outputs]`."""
    rows = values.reshape(tiles, -1, TILE).transpose(0, 1).reshape(-1, tiles * TILE)
    return rows[:, :outputs].to(torch.float32).repeat_interleave(block, 0)[:inputs]


def _eight_bits(x: Tensor, block: int, straight_through: bool) -> Tensor:
    """Round rows, or blocks of them, to 127 steps on either side of 0."""
    rows = x
    if block:
        rows = F.pad(x, [0, -x.shape[-1] % block]).unflatten(-1, (-1, block))
    step = rows.detach().abs().amax(-1, keepdim=True) / 127
    step = torch.where(step == 0, torch.ones_like(step), step)
    back = rounded(rows / step, straight_through) * step
    return back.flatten(-2)[..., : x.shape[-1]] if block else back


def _activated(x: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return x
    if kind == "relu":
        return F.relu(x)
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate=_GELU[kind])


_GELU = {"gelu": "none", "gelu_tanh": "tanh"}
