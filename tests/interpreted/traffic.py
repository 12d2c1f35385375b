"""Bytes and operations counted from the tiling are those that the kernels ask for as they run."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from interpreted_attention import numbers
from triton.runtime.interpreter import interpreter_builder

from lwc.backends.triton.architectures import architecture
from lwc.backends.triton.kernels.activation import activation_operation
from lwc.backends.triton.kernels.decode_attention import decode_operation
from lwc.backends.triton.kernels.flash_attention import Attended, flash_operation
from lwc.backends.triton.kernels.norm import norm_operation
from lwc.backends.triton.kernels.quantize_rows import quantize_rows_operation
from lwc.backends.triton.kernels.rotary import rotary_operation
from lwc.backends.triton.kernels.tiled_bitmap_matmul import tiled_bitmap_operation
from lwc.backends.triton.kernels.w4a16_matmul import w4a16_operation
from lwc.backends.triton.kernels.w8a8_matmul import w8a8_operation
from lwc.backends.triton.operation import Configuration, Operation
from lwc.backends.triton.weights import SparseWeights, W4Weights
from lwc.core.tiled_bitmap import pack

GPU = architecture("A100")


class Counter:
    """Counts what goes through the interpreter."""

    def __init__(self) -> None:
        self.nbytes = self.flops = 0
        self._load = interpreter_builder.create_masked_load
        self._store = interpreter_builder.create_masked_store
        self._dot = interpreter_builder.create_dot

    def __enter__(self) -> Counter:
        def count(pointers: Any, mask: Any) -> None:
            self.nbytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

        def load(pointers: Any, mask: Any, *rest: Any) -> Any:
            count(pointers, mask)
            return self._load(pointers, mask, *rest)

        def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            count(pointers, mask)
            return self._store(pointers, value, mask, *rest)

        def dot(a: Any, b: Any, *rest: Any) -> Any:
            self.flops += 2 * a.data.size * b.data.shape[-1]
            return self._dot(a, b, *rest)

        interpreter_builder.create_masked_load = load
        interpreter_builder.create_masked_store = store
        interpreter_builder.create_dot = dot
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("create_masked_load", "create_masked_store", "create_dot"):
            delattr(interpreter_builder, name)


def check(operation: Operation, configuration: Configuration | None = None) -> None:
    launches = operation.prepare(configuration or operation.candidates[0])
    for launch in launches:
        with Counter() as counter:
            launch.run()
        assert counter.nbytes == launch.work.requested, launch.name
        if counter.flops:
            assert counter.flops == launch.work.flops, launch.name


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), left=st.none() | st.integers(0, 40),
    right=st.none() | st.integers(0, 40), masked=st.booleans(),
)  # fmt: skip
def test_prompts(
    queries: int, keys: int, *, left: int | None, right: int | None, masked: bool
) -> None:
    q, k, v = (numbers(i, 2, heads, n, w) for i, heads, n, w in (
        (0, 4, queries, 20), (1, 2, keys, 20), (2, 2, keys, 16),
    ))  # fmt: skip
    mask = numbers(3, 1, 1, queries, keys).expand(2, 4, queries, keys) if masked else None
    operation = flash_operation(q, k, v, Attended(left, right), GPU, mask=mask)
    tiles = {"QUERIES": 32, "KEYS": 16, "SIZE": 32, "VALUE_SIZE": 16}
    check(operation, Configuration(tiles))


@pytest.mark.parametrize("splits", [1, 3, 9])
@pytest.mark.parametrize("left", [None, 50])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_decoding(splits: int, left: int | None, queries: int) -> None:
    q, k, v = numbers(0, 2, 6, queries, 20), numbers(1, 2, 2, 100, 20), numbers(2, 2, 2, 100, 16)
    operation = decode_operation(q, k, v, GPU, left=left)
    tiles = {"ROWS": 16, "KEYS": 16, "SIZE": 32, "VALUE_SIZE": 16, "SPLITS": splits}
    check(operation, Configuration(tiles))


@pytest.mark.parametrize("rows", [1, 5, 700])
def test_norms(rows: int) -> None:
    x, weight = numbers(0, rows, 40, dtype=torch.float16), numbers(1, 40)
    check(norm_operation(x, weight, weight, x, GPU, eps=1e-6, centred=True))
    check(norm_operation(x, None, None, None, GPU, eps=1e-6, centred=False))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("length", [1, 30])
def test_rotary(interleaved: bool, length: int) -> None:
    x, table = numbers(0, 2, length, 21, 20), numbers(1, 40, 8)
    positions = torch.arange(2 * length).view(2, length) % 40
    for rows in (None, positions):
        check(rotary_operation(x, table, table, rows, GPU, interleaved=interleaved))


def test_activations() -> None:
    both = numbers(0, 3, 4200, dtype=torch.float16)
    check(activation_operation(both[:, :2100], both[:, 2100:], "silu"))
    check(activation_operation(both, both, "relu"))


SPLIT = pytest.mark.parametrize("split", [1, 2])


@SPLIT
def test_products_of_eight_bits(split: int) -> None:
    x, w = torch.ones(37, 150, dtype=torch.int8), torch.ones(130, 150, dtype=torch.int8)
    operation = w8a8_operation(
        x, torch.ones(37), w, torch.ones(130), torch.ones(130), GPU, dtype=torch.float16
    )
    sizes = {"ROWS": 16, "COLUMNS": 64, "DEPTH": 32, "PIECES": 2, "GROUP": 8, "SPLIT": split}
    check(operation, Configuration(sizes))


@SPLIT
def test_products_of_four_bits(split: int) -> None:
    codes, scales = np.ones((130, 300), np.uint8), np.ones((130, 5))
    weights = W4Weights.pack(codes, scales, scales.astype(np.uint8), 64)
    operation = w4a16_operation(
        torch.ones(37, 300), weights.codes, weights.scales, weights.zeros, None, GPU, columns=130,
        group_size=64,
    )  # fmt: skip
    sizes = {"ROWS": 16, "COLUMNS": 64, "PIECE": 32, "GROUP": 8, "SPLIT": split}
    check(operation, Configuration(sizes))


@SPLIT
@pytest.mark.parametrize("width", [128, 256])
def test_products_with_sparse_weights(split: int, width: int) -> None:
    """Three tiles of columns, of which two are taken together."""
    matrix = (np.arange(300 * 200).reshape(300, 200) % 3 == 0).astype(np.float16)
    weights = SparseWeights.of(pack(matrix))
    operation = tiled_bitmap_operation(
        torch.ones(37, 200), weights.bits, weights.pairs, weights.offsets, torch.ones(300), GPU,
        columns=300, fullest=weights.fullest,
    )  # fmt: skip
    check(operation, Configuration({"ROWS": 16, "COLUMNS": width, "GROUP": 8, "SPLIT": split}))


@pytest.mark.parametrize("columns", [70, 20000])
def test_rounding_of_rows(columns: int) -> None:
    x = torch.ones(3, columns, dtype=torch.float16)
    check(quantize_rows_operation(x))
    check(quantize_rows_operation(x, columns + 10))
