"""`quantize-weights` on generated weights: bounds, packing, tiles, agreement with the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st

from lwc.passes.quantization.packing import pack_rows, pack_tile, unpack_rows
from lwc.passes.quantization.rounding import Codes, Grid, TileRounder
from lwc.passes.quantization.streaming import WeightSpec, quantize

Array = np.ndarray[Any, Any]

grids = st.builds(
    Grid,
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    search=st.sampled_from(["none", "mse"]),
)
plain_grids = grids.filter(lambda grid: grid.search == "none")
seeds = st.integers(0, 2**32 - 1)


def weights_of(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """Blocks of many magnitudes, some one-sided, some constant, some with an outlier."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 2, shape[-1])
    array[..., rng.random(shape[-1]) < 0.2] += 3
    array[..., rng.random(shape[-1]) < 0.1] = rng.standard_normal()
    array[..., rng.random(shape[-1]) < 0.1] = 0
    array[rng.random(shape) < 0.01] *= 20
    return array.astype(dtype)


def rounded(grid: Grid, weights: Array, dtype: Any = np.float32) -> Codes:
    """Round a tile `[block_size, blocks]`."""
    size, blocks = weights.shape
    rounder = TileRounder(grid, size, blocks, dtype)
    tile = rounder.weights(blocks)
    tile[...] = weights
    result = rounder.round(tile)
    assert result is not None
    return result


def restored(codes: Codes) -> Array:
    """The stored numbers, exactly."""
    steps = codes.codes.astype(np.float64) - codes.zero_points
    result: Array = steps * codes.scales.astype(np.float64)
    return result


@given(plain_grids, seeds, st.sampled_from([16, 32, 128]), st.sampled_from(["f4", "f2"]))
@settings(deadline=None, max_examples=60)
def test_error_is_at_most_half_a_step(grid: Grid, seed: int, size: int, kind: str) -> None:
    """|w - restored| <= |scale| / 2, plus float32 rounding of w / scale + z (2^-14 steps).

    Symmetric 4-bit blocks have one step more below zero than above: there the error may reach a
    whole step at the far end, where a weight nearly as large as the largest has the other sign.
    """
    dtype = np.dtype(kind)
    weights = weights_of(seed, (size, 80), dtype).astype(np.float32)
    codes = rounded(grid, weights, dtype)
    assert np.array_equal(codes.scales.astype(dtype).astype(np.float32), codes.scales)
    steps = np.abs(restored(codes) - weights) / np.abs(codes.scales)
    bound = 1.0 if grid.bits == 4 and grid.symmetric else 0.5
    assert steps.max() <= bound + 2.0**-14


@given(grids, seeds)
@settings(deadline=None, max_examples=40)
def test_search_never_adds_error(grid: Grid, seed: int) -> None:
    weights = weights_of(seed, (32, 80))
    plain = rounded(Grid(grid.bits, grid.symmetric, "none"), weights)
    searched = rounded(Grid(grid.bits, grid.symmetric, "mse"), weights)
    errors = [np.square(restored(c) - weights).sum(axis=0) for c in (plain, searched)]
    # The search compares errors computed in float32.
    noise = 1e-9 * np.square(weights).sum(axis=0)
    assert (errors[1] <= errors[0] * (1 + 1e-3) + noise).all()
    total = errors[1].sum()
    assert abs(searched.squared_error - total) <= 1e-3 * total + 1e-12


@given(grids, seeds)
@settings(deadline=None, max_examples=40)
def test_zero_stays_zero_and_codes_stay_in_range(grid: Grid, seed: int) -> None:
    weights = weights_of(seed, (32, 50))
    weights[::3] = 0
    codes = rounded(grid, weights)
    assert (restored(codes)[::3] == 0).all()
    assert codes.codes.max() <= grid.top


@given(seeds, st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 33))
@settings(deadline=None, max_examples=60)
def test_rows_pack_and_unpack(seed: int, bits: int, rows: int, length: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, length), dtype=np.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, -(-length * bits // 8))
    assert np.array_equal(unpack_rows(packed, bits, length), codes)


@given(seeds, st.sampled_from([4, 8]), st.integers(1, 4), st.sampled_from([16, 32]))
@settings(deadline=None, max_examples=40)
def test_tiles_pack_like_rows(seed: int, bits: int, blocks: int, size: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (size, blocks), dtype=np.uint8)
    expected = pack_rows(codes.T.copy(), bits)
    assert np.array_equal(pack_tile(codes, bits), expected)


@given(
    grids,
    seeds,
    st.integers(16, 150),
    st.integers(1, 70),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_runtime_computes_with_the_stored_weight(  # noqa: PLR0917
    grid: Grid, seed: int, inputs: int, outputs: int, block_size: int, transposed: bool
) -> None:
    """MatMulNBits in float32 equals x @ restored within 1e-4 of the largest possible product."""
    weights = weights_of(seed, (inputs, outputs))
    spec = WeightSpec(grid, block_size, transposed, "matmulnbits")
    tensor = ir.Tensor(weights.T.copy() if transposed else weights)
    result = quantize(tensor, spec)
    assert result is not None
    codes = unpack_rows(result.codes.numpy(), grid.bits, block_size).astype(np.float64)
    blocks = codes.shape[1]
    zeros: Any = float(grid.middle)
    if result.zero_points is not None:
        zeros = unpack_rows(result.zero_points.numpy(), grid.bits, blocks)[..., None]
    real = (codes - zeros) * result.scales.numpy()[..., None]
    matrix = real.reshape(outputs, -1)[:, :inputs]
    relative = np.linalg.norm(matrix.T - weights) / max(float(np.linalg.norm(weights)), 1e-30)
    assert abs(relative - result.relative_error) < 1e-3 + 1e-2 * relative

    x = np.random.default_rng(seed).standard_normal((3, inputs)).astype(np.float32)
    tensors = {"b": result.codes, "s": result.scales, "z": result.zero_points}
    named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *named], ["y"], domain="com.microsoft", K=inputs, N=outputs,
        bits=grid.bits, block_size=block_size, accuracy_level=0,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node], "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", inputs])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", outputs])],
        [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in named.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (y,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    largest = np.abs(x).astype(np.float64) @ np.abs(matrix.T)
    assert (np.abs(y - x @ matrix.T) <= 1e-4 * largest + 1e-20).all()
