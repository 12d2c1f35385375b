"""Products in the interpreter against torch in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lwc.backends.triton.architectures import ARCHITECTURES
from lwc.backends.triton.kernels.tiled_bitmap_matmul import tiled_bitmap_operation
from lwc.backends.triton.kernels.w4a16_matmul import w4a16_operation
from lwc.backends.triton.kernels.w8a8_matmul import w8a8_operation
from lwc.backends.triton.operation import Configuration, Operation
from lwc.backends.triton.products import quantize_rows, sparse_matmul, w4a16_matmul, w8a8_matmul
from lwc.backends.triton.weights import SparseWeights, W4Weights, W8Weights
from lwc.core.dialect import DynamicQuantMatMul
from lwc.core.errors import LwcError, UsageError
from lwc.core.quant_layout import pack_codes, pack_columns
from lwc.core.tiled_bitmap import pack

GPU = ARCHITECTURES[0]

FUNCTIONS: dict[str, Any] = {
    "none": lambda value: value,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu-tanh": lambda value: torch.nn.functional.gelu(value, approximate="tanh"),
}
ACTIVATIONS = st.sampled_from(list(FUNCTIONS))


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def run_with(operation: Operation, **sizes: int) -> Any:
    """Run with a tiling of one's own; nothing is left of a run before."""
    first = operation.candidates[0]
    operation.results[0].fill_(77)
    configuration = Configuration({**first.tiles, **sizes}, first.warps, first.stages)
    for launch in operation.prepare(configuration):
        launch.run()
    return operation.results[0]


def near(found: Any, wanted: Any, bound: float) -> None:
    """Compare, in units of the largest result."""
    scale = max(float(wanted.abs().max()), 1.0) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound * scale)


def four_bits(seed: int, columns: int, depth: int, group: int, zeros: bool) -> tuple[Any, Any]:
    """Return weights of 4 bits, and as float64 [columns, depth]."""
    rng = draw(seed)
    groups = -(-depth // group)
    codes = rng.integers(0, 16, (columns, depth)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (columns, groups)).astype(np.float16)
    middles = rng.integers(0, 16, (columns, groups)).astype(np.uint8) if zeros else None
    which = np.arange(depth) // group
    middle = middles[:, which].astype(float) if middles is not None else 8.0
    dense = (codes - middle) * scales.astype(float)[:, which]
    return W4Weights.pack(codes, scales, middles, group), torch.from_numpy(dense)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40), depth=st.integers(1, 200), columns=st.integers(1, 80),
    biased=st.booleans(), activation=ACTIVATIONS,
)  # fmt: skip
def test_int8_products_are_exact(
    *, rows: int, depth: int, columns: int, biased: bool, activation: str
) -> None:
    rng = draw(rows)
    x = torch.from_numpy(rng.integers(-127, 128, (rows, depth)).astype(np.int8))
    w = torch.from_numpy(rng.integers(-128, 128, (columns, depth)).astype(np.int8))
    one = torch.ones(rows), torch.ones(columns)
    operation = w8a8_operation(x, one[0], w, one[1], None, GPU, dtype=torch.float32)
    exact = x.double() @ w.double().T
    for split in (1, 2):
        found = run_with(operation, ROWS=16, COLUMNS=64, DEPTH=64, SPLIT=split)
        assert torch.equal(found.double(), exact)
    scales = numbers(1, rows).abs(), numbers(2, columns).abs()
    bias = numbers(3, columns) if biased else None
    wanted = exact * scales[0].double()[:, None] * scales[1].double()
    wanted = FUNCTIONS[activation](wanted if bias is None else wanted + bias.double())
    operation = w8a8_operation(
        x, scales[0], w, scales[1], bias, GPU, dtype=torch.float32, function=activation
    )
    for split in (1, 4):
        near(run_with(operation, ROWS=16, COLUMNS=64, SPLIT=split), wanted, 1e-6)


def test_tiles_in_groups_and_parts_of_many_columns() -> None:
    """More columns than a group of tiles has, and than one program of the sum of parts takes."""
    rng = draw(0)
    x = torch.from_numpy(rng.integers(-127, 128, (40, 150)).astype(np.int8))
    w = torch.from_numpy(rng.integers(-128, 128, (1100, 150)).astype(np.int8))
    one = torch.ones(40), torch.ones(1100)
    operation = w8a8_operation(x, one[0], w, one[1], None, GPU, dtype=torch.float32)
    for split, group in ((1, 4), (3, 8)):
        found = run_with(operation, ROWS=16, COLUMNS=128, DEPTH=32, SPLIT=split, GROUP=group)
        assert torch.equal(found.double(), x.double() @ w.double().T)


def test_rounding_is_that_of_the_dialect() -> None:
    x = numbers(0, 5, 77)
    x[1] = 0
    x[2, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # halves go to even
    x[2, 4:] = 0
    codes, scales = quantize_rows(x)
    expected_scales = x.abs().amax(1) / 127
    assert torch.equal(scales, expected_scales)
    step = torch.where(expected_scales == 0, 1.0, expected_scales)
    assert torch.equal(codes, torch.round(x / step[:, None]).to(torch.int8))
    assert codes[2, :4].tolist() == [127, 0, 2, -2]
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    codes, scales = quantize_rows(x)
    assert scales.isnan().tolist() == [False, False, False, True, True]
    assert torch.equal(codes[3:], torch.zeros_like(codes[3:]))
    long = numbers(1, 2, 40000)  # three parts
    codes, scales = quantize_rows(long)
    assert torch.equal(scales, long.abs().amax(1) / 127)
    assert torch.equal(codes, torch.round(long / scales[:, None]).to(torch.int8))
    long[1, 39999] = float("nan")
    assert quantize_rows(long)[1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_products_of_any_activations(dtype: torch.dtype) -> None:
    """The error is that of rounding activations, half of 1/127 of each row's largest."""
    x = numbers(0, 2, 3, 130, dtype=dtype)
    codes = draw(1).integers(-127, 128, (40, 130)).astype(np.int8)
    weights = W8Weights.pack(codes, np.full(40, 0.01))
    found = w8a8_matmul(x, weights)
    assert found.shape == (2, 3, 40)
    assert found.dtype == dtype
    wide = x.double()
    step = wide.abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(wide / step) * step
    wanted = rounded @ (torch.from_numpy(codes).double().T * 0.01)
    near(found, wanted, {torch.float32: 1e-6, torch.float16: 2.0**-10}.get(dtype, 2.0**-7))
    x[0, 1, 7] = float("nan")
    bad = w8a8_matmul(x, weights).isnan()
    assert bad[0, 1].all()
    assert bad.sum() == 40


def test_weights_of_the_dialect() -> None:
    codes = draw(0).integers(0, 256, (70, 35)).astype(np.uint8)
    scales = draw(1).uniform(0.01, 0.02, 35).astype(np.float32)
    node = DynamicQuantMatMul(K=70, N=35, bits=8)
    weights = W8Weights.from_dialect(node, pack_codes(codes, 8), pack_columns(scales[None]))
    assert torch.equal(
        weights.codes[:, :70], torch.from_numpy(codes.T.astype(np.int16) - 128).to(torch.int8)
    )
    assert torch.equal(weights.scales, torch.from_numpy(scales))
    with pytest.raises(LwcError, match="symmetrically"):
        W8Weights.from_dialect(DynamicQuantMatMul(K=70, N=35, bits=4), pack_codes(codes, 8), scales)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40), depth=st.integers(1, 400), columns=st.integers(1, 140),
    group=st.sampled_from([32, 64, 128]), zeros=st.booleans(), biased=st.booleans(),
    activation=ACTIVATIONS, split=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_four_bits_equal_torch(
    *, rows: int, depth: int, columns: int, group: int, zeros: bool, biased: bool,
    activation: str, split: int,
) -> None:  # fmt: skip
    """In float32 a sum of up to 400 products is left, each rounded once."""
    x = numbers(depth, rows, depth)
    weights, dense = four_bits(columns, columns, depth, group, zeros)
    bias = numbers(3, columns) if biased else None
    wanted = x.double() @ dense.T
    wanted = FUNCTIONS[activation](wanted if bias is None else wanted + bias.double())
    operation = w4a16_operation(
        x, weights.codes, weights.scales, weights.zeros, bias, GPU, columns=columns,
        group_size=group, function=activation,
    )  # fmt: skip
    near(run_with(operation, ROWS=16, COLUMNS=64, SPLIT=split), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_four_bits_in_sixteen_bits(dtype: torch.dtype, group: int) -> None:
    """A weight is rounded once, to 2^-11 (2^-8), and so is the result; errors of products add up
    as their roots do.
    """
    x = numbers(1, 1, 9, 448, dtype=dtype)
    weights, dense = four_bits(2, 72, 448, group, True)
    found = w4a16_matmul(x, weights, activation="relu")
    assert found.dtype == dtype
    near(found, torch.relu(x.double() @ dense.T), 2.0**-10 if dtype == torch.float16 else 2.0**-7)


@pytest.mark.parametrize("zeros", [True, False])
def test_weights_of_matmul_nbits(zeros: bool) -> None:
    """An odd number of blocks, the last one not full."""
    rng = draw(0)
    columns, depth, size = 5, 83, 32
    codes = rng.integers(0, 256, (columns, 3, size // 2)).astype(np.uint8)
    scales = rng.uniform(0.1, 1, columns * 3).astype(np.float32)
    points = rng.integers(0, 256, columns * 2).astype(np.uint8) if zeros else None
    weights = W4Weights.from_matmul_nbits(codes, scales, points, depth=depth, block_size=size)
    found = w4a16_matmul(torch.eye(depth), weights)
    for k in range(depth):
        block, inside = divmod(k, size)
        for n in range(columns):
            code = codes[n, block, inside // 2] >> 4 * (inside % 2) & 15
            zero = 8 if points is None else points[n * 2 + block // 2] >> 4 * (block % 2) & 15
            scale = float(np.float16(scales[n * 3 + block]))
            wanted = (int(code) - int(zero)) * scale
            assert float(found[k, n]) == pytest.approx(wanted, rel=1e-6)


def sparse(seed: int, columns: int, depth: int, density: float) -> Any:
    rng = draw(seed)
    matrix = rng.normal(size=(columns, depth)) * (rng.random((columns, depth)) < density)
    return matrix.astype(np.float16)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40), depth=st.integers(1, 260), columns=st.integers(1, 400),
    density=st.sampled_from([0, 0.01, 0.2, 0.5, 1]), biased=st.booleans(), activation=ACTIVATIONS,
    split=st.sampled_from([1, 2]), width=st.sampled_from([128, 256]),
)  # fmt: skip
def test_sparse_products_equal_torch(
    *, rows: int, depth: int, columns: int, density: float, biased: bool, activation: str,
    split: int, width: int,
) -> None:  # fmt: skip
    x = numbers(0, rows, depth)
    matrix = sparse(depth, columns, depth, density)
    weights = SparseWeights.of(pack(matrix))
    bias = numbers(3, columns) if biased else None
    wanted = x.double() @ torch.from_numpy(matrix).double().T
    wanted = FUNCTIONS[activation](wanted if bias is None else wanted + bias.double())
    operation = tiled_bitmap_operation(
        x, weights.bits, weights.pairs, weights.offsets, bias, GPU, columns=columns,
        fullest=weights.fullest, function=activation,
    )  # fmt: skip
    near(run_with(operation, ROWS=16, COLUMNS=width, SPLIT=split), wanted, 1e-5)


def test_sparse_tiles_of_all_kinds() -> None:
    """A full tile, an empty one, one whose nonzeros fill a power of two, subnormal numbers."""
    matrix = np.zeros((256, 128), np.float16)
    matrix[:128, :64] = draw(0).normal(size=(128, 64)) + 3
    matrix[128:144, :64] = 2.0**-20
    weights = SparseWeights.of(pack(matrix))
    x = numbers(1, 3, 128, dtype=torch.float16)
    found = sparse_matmul(x, weights)
    assert found.dtype == torch.float16
    near(found, x.double() @ torch.from_numpy(matrix).double().T, 2.0**-10)
    matrix[:] = 0
    matrix[:16, :64] = 1  # 512 pairs: zeros after them look behind the last
    found = sparse_matmul(x, SparseWeights.of(pack(matrix)))
    near(found, x.double() @ torch.from_numpy(matrix).double().T, 2.0**-10)


def test_no_offsets_lead_outside_of_the_pairs() -> None:
    """What is touched is watched."""
    weights = SparseWeights.of(pack(sparse(0, 150, 100, 0.1)))
    x = numbers(0, 2, 100)
    for odd in (-(2**31), -1, 10**6, 2**31 - 1):
        for place in range(len(weights.offsets)):
            offsets = weights.offsets.clone()
            offsets[place] = odd
            sparse_matmul(x, replace(weights, offsets=offsets))


def test_sparse_weights_that_do_not_fit_their_bitmap_are_refused() -> None:
    packed = pack(sparse(0, 150, 100, 0.1))
    for odd in (
        replace(packed, bits=packed.bits | 1),
        replace(packed, offsets=packed.offsets + 1),
        replace(packed, pairs=packed.pairs[:-4]),
    ):
        with pytest.raises(LwcError, match="do not fit the bitmap"):
            SparseWeights.of(odd)


def test_weights_that_are_not_laid_out_as_kernels_read_them_are_refused() -> None:
    eight = W8Weights.pack(np.ones((7, 40), np.int8), np.ones(7))
    four, _ = four_bits(0, 7, 40, 32, True)
    some = SparseWeights.of(pack(np.ones((7, 40), np.float16)))
    kinds: list[tuple[Any, Any]] = [
        (w8a8_matmul, eight), (w4a16_matmul, four), (sparse_matmul, some),
    ]  # fmt: skip
    for multiply, weights in kinds:
        multiply(torch.ones(1, 40), weights)
        for name, (shape, _) in weights.layout.items():
            whole = getattr(weights, name)
            wide = torch.stack([whole, whole], -1)[..., 0]
            for odd in (whole[:-1], whole.to(torch.int16), wide):
                if name == "pairs" and odd.shape != shape:
                    continue  # of any number
                with pytest.raises(UsageError, match=f"^{name} of the weights are "):
                    multiply(torch.ones(1, 40), replace(weights, **{name: odd}))
    with pytest.raises(UsageError, match=r"^groups of 16 inputs are not among \(32, 64, 128\)$"):
        w4a16_matmul(torch.ones(1, 40), replace(four, group_size=16))


def test_nothing_to_multiply() -> None:
    weights, _ = four_bits(0, 7, 40, 32, False)
    assert w4a16_matmul(torch.empty(0, 40), weights).shape == (0, 7)
    assert (
        sparse_matmul(
            torch.empty(2, 0), SparseWeights.of(pack(np.zeros((3, 0), np.float16))), torch.ones(3)
        ).tolist()
        == [[1.0] * 3] * 2
    )
    nothing = SparseWeights.of(pack(np.zeros((3, 0), np.float16)))
    x, bias = torch.empty(1, 2, 0, dtype=torch.float16), numbers(0, 3)
    for activation, function in FUNCTIONS.items():
        found = sparse_matmul(x, nothing, bias, activation=activation)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, function(bias).half().expand(1, 2, 3))


def test_what_does_not_fit_is_named() -> None:
    weights, _ = four_bits(0, 7, 40, 32, False)
    with pytest.raises(UsageError, match=r"x has shape \[2, 39\], not \[..., 40\]"):
        w4a16_matmul(torch.ones(2, 39), weights)
    with pytest.raises(UsageError, match=r"bias has shape \[8\], not \[7\]"):
        w4a16_matmul(torch.ones(2, 40), weights, torch.ones(8))
    with pytest.raises(UsageError, match="no activation 'tanh'"):
        w4a16_matmul(torch.ones(2, 40), weights, activation="tanh")
    with pytest.raises(UsageError, match="float64"):
        w4a16_matmul(torch.ones(2, 40).double(), weights)
    some = SparseWeights.of(pack(np.ones((2, 3), np.float16)))
    with pytest.raises(UsageError, match="bfloat16"):
        sparse_matmul(torch.ones(1, 3, dtype=torch.bfloat16), some)
    with pytest.raises(LwcError, match="too large for float16"):
        W4Weights.pack(np.zeros((1, 32), np.uint8), np.full((1, 1), 1e6), None, 32)
    with pytest.raises(LwcError, match="not among"):
        W4Weights.pack(np.zeros((1, 32), np.uint8), np.ones((1, 2)), None, 16)
