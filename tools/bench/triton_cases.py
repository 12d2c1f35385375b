"""Shapes that the Triton kernels are compiled and costed for: layers of models that are in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.kernels.activation import activation_operation
from lwc.backends.triton.kernels.decode_attention import decode_operation
from lwc.backends.triton.kernels.flash_attention import Attended, flash_operation
from lwc.backends.triton.kernels.norm import norm_operation
from lwc.backends.triton.kernels.rotary import rotary_operation
from lwc.backends.triton.operation import Least, Operation

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
MEMORY_BAR = 1.1
TILING_BAR = 1.15


@dataclass(frozen=True)
class Case:
    """An operation on given shapes.

    Attributes:
        name: What is shown.
        make: Makes the operation for an architecture, on tensors without storage.
        bar: Most of the bytes that must be moved; with `tiled`, of the bytes that the tiling with
            the fewest loads asks for.
        tiled: Elements are loaded more than once whatever the tiling.
        fewest: Finds the fewest bytes that a tiling asks for, given those of the one taken; as for
            attention when None.
        dense: For sparse weights: what the product with dense ones must do.
        steps: With `dense`, steps over the whole depth.
    """

    name: str
    make: Callable[[Architecture], Operation]
    bar: float = MEMORY_BAR
    tiled: bool = False
    fewest: Callable[[Operation, Architecture, int], int] | None = None
    dense: Least | None = None
    steps: int = 0


def meta(*shape: int, dtype: Any = BFLOAT16) -> Any:
    """Return a tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(rows: int, columns: int, dtype: Any, *, centred: bool, residual: bool) -> Case:
    def make(gpu: Architecture) -> Operation:
        x, weight = meta(rows, columns, dtype=dtype), meta(columns, dtype=dtype)
        return norm_operation(
            x, weight, weight if centred else None, x if residual else None, gpu, eps=1e-6,
            centred=centred,
        )  # fmt: skip

    kind = "layer norm" if centred else "rms norm"
    return Case(f"{kind}{' + sum' if residual else ''} {rows}x{columns} {_short(dtype)}", make)


def _rotary(batch: int, length: int, heads: int, size: int, *, interleaved: bool) -> Case:
    def make(gpu: Architecture) -> Operation:
        packed = meta(batch, length, heads + 8, size)
        table = meta(8192, size // 2)
        positions = meta(batch, length, dtype=torch.int64)
        return rotary_operation(
            packed[:, :, :heads], table, table, positions, gpu, interleaved=interleaved
        )

    kind = "interleaved" if interleaved else "halves"
    return Case(f"rotary {kind} {batch}x{length}, {heads} heads of {size} bf16", make)


def _activation(rows: int, columns: int, function: str) -> Case:
    def make(gpu: Architecture) -> Operation:
        both = meta(rows, 2 * columns)
        return activation_operation(both[:, :columns], both[:, columns:], function)

    return Case(f"{function} * up {rows}x{columns} bf16", make)


def _prefill(
    heads: str, length: int, size: int, *, batch: int = 1, dtype: Any = BFLOAT16,
    causal: bool = True, window: int | None = None, masked: bool = False, cap: float = 0.0,
) -> Case:  # fmt: skip
    queries, groups = map(int, heads.split("/"))

    def make(gpu: Architecture) -> Operation:
        q = meta(batch, queries, length, size, dtype=dtype)
        k = meta(batch, groups, length, size, dtype=dtype)
        mask = meta(batch, 1, length, length, dtype=dtype) if masked else None
        attended = Attended(left=window, right=0 if causal else None)
        spread = None if mask is None else mask.expand(batch, queries, length, length)
        return flash_operation(q, k, k, attended, gpu, mask=spread, cap=cap)

    kinds = [
        "causal" if causal else "whole", f"window {window}" if window else "",
        "mask" if masked else "", "capped" if cap else "",
    ]  # fmt: skip
    kind = ", ".join(filter(None, kinds))
    shape = f"{batch}x{length}, {heads} heads of {size} {_short(dtype)}"
    return Case(f"prefill {kind} {shape}", make, TILING_BAR, tiled=True)


def _decode(
    heads: str, keys: int, size: int, *, batch: int = 1, queries: int = 1, dtype: Any = BFLOAT16,
    window: int | None = None,
) -> Case:  # fmt: skip
    count, groups = map(int, heads.split("/"))

    def make(gpu: Architecture) -> Operation:
        q = meta(batch, count, queries, size, dtype=dtype)
        cache = meta(batch, groups, keys, size, dtype=dtype)
        lengths = meta(batch, dtype=torch.int32)
        return decode_operation(q, cache, cache, gpu, key_lengths=lengths, left=window)

    tokens = f"{queries} tokens" if queries > 1 else "a token"
    kind = f", window {window}" if window else ""
    shape = f"{batch}x{keys}, {heads} heads of {size} {_short(dtype)}"
    return Case(f"decode {tokens}{kind} {shape}", make)


def _short(dtype: Any) -> str:
    return {BFLOAT16: "bf16", FLOAT16: "f16", FLOAT32: "f32"}[dtype]


CASES = [
    _norm(8192, 4096, BFLOAT16, centred=False, residual=True),
    _norm(8192, 576, BFLOAT16, centred=False, residual=True),
    _norm(2048, 16384, BFLOAT16, centred=False, residual=True),
    _norm(32, 4096, BFLOAT16, centred=False, residual=True),
    _norm(4096, 768, FLOAT32, centred=True, residual=False),
    _rotary(4, 2048, 40, 128, interleaved=False),
    _rotary(4, 2048, 40, 128, interleaved=True),
    _rotary(32, 1, 40, 128, interleaved=False),
    _activation(4096, 14336, "silu"),
    _activation(4096, 3072, "gelu"),
    _activation(16, 14336, "silu"),
    _prefill("32/8", 4096, 128),
    _prefill("32/8", 4096, 128, dtype=FLOAT16),
    _prefill("32/32", 2048, 64, batch=4),
    _prefill("9/3", 2048, 64, batch=4),
    _prefill("8/1", 4096, 256, batch=4),
    _prefill("32/8", 16384, 128, window=4096),
    _prefill("16/8", 4096, 128, batch=2, window=1024, cap=50.0),
    _prefill("8/4", 4096, 256, batch=2, window=1024),
    _prefill("12/12", 512, 64, batch=32, causal=False, masked=True),
    _prefill("32/8", 2048, 128, masked=True),
    _prefill("9/3", 2048, 64, batch=4, dtype=FLOAT32),
    _decode("32/8", 4096, 128),
    _decode("32/8", 4096, 128, batch=16),
    _decode("32/32", 4096, 128),
    _decode("9/3", 2048, 64),
    _decode("8/1", 8192, 256),
    _decode("8/1", 131072, 256),
    _decode("128/8", 32768, 128),
    _decode("32/8", 32768, 128, window=4096),
    _decode("32/8", 4096, 128, batch=4, queries=4),
    _decode("9/3", 2048, 64, dtype=FLOAT32),
]
