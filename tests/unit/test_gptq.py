"""GPTQ and AWQ on one layer: against their definitions, and where they must not be worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwc.passes.quantization.awq import clipped, input_factors
from lwc.passes.quantization.gptq import Rounded, gptq, output_error, round_to_nearest
from lwc.passes.quantization.rounding import Grid

Array = np.ndarray[Any, Any]


def layer(seed: int, inputs: int = 48, outputs: int = 24, rows: int = 400) -> tuple[Array, Array]:
    """Weights, and X·Xᵀ of activations with correlated channels of different size."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((inputs, inputs)) * np.exp(random.standard_normal(inputs))
    activations = random.standard_normal((rows, inputs)) @ mixing
    weights = random.standard_normal((inputs, outputs)).astype(np.float32)
    return weights, activations.T @ activations


def error(weights: Array, rounded: Rounded, grid: Grid, size: int, gram: Array) -> float:
    return output_error(weights - rounded.values(grid, size), gram)


def column_by_column(weights: Array, gram: Array, rounded: Rounded, damping: float) -> Array:
    """GPTQ as optimal brain surgeon defines it, one input after another, on the grids of `rounded`.

    After input i is rounded, those left change by
    -(w_i - q_i) / [H⁻¹]_ii · [H⁻¹]_:,i; then i leaves H.
    """
    work = weights.astype(np.float64)
    codes = np.empty(weights.shape)
    damped = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    for row in range(len(weights)):
        inverse = np.linalg.inv(damped[row:, row:])
        scale, zero = rounded.scales[0].astype(np.float64), rounded.zeros[0].astype(np.float64)
        codes[row] = np.clip(np.rint(work[row] / scale) + zero, 0, 15)
        off = work[row] - (codes[row] - zero) * scale
        work[row:] -= np.outer(inverse[:, 0] / inverse[0, 0], off)
    return codes


def test_it_is_optimal_brain_surgeon_on_a_grid() -> None:
    """Codes differ only where a weight lies within float32 rounding of a tie: none does here."""
    weights, gram = layer(0)
    found = gptq(weights, gram, Grid(4, False, "none"), 48)
    np.testing.assert_array_equal(found.codes, column_by_column(weights, gram, found, 0.01))


@pytest.mark.parametrize("damping", [1e-4, 0.1, 1.0])
@pytest.mark.parametrize("dead", [0, 24])
def test_damping_is_a_share_of_the_mean_of_active_inputs(damping: float, dead: int) -> None:
    """Those that are never active have no part in it, and are rounded to nearest."""
    weights, gram = layer(0)
    gram[:dead] = gram[:, :dead] = 0
    found = gptq(weights, gram, Grid(4, False, "none"), 48, damping=damping)
    live = found._replace(codes=found.codes[dead:])
    wanted = column_by_column(weights[dead:], gram[dead:, dead:], live, damping)
    np.testing.assert_array_equal(live.codes, wanted)
    nearest = round_to_nearest(weights, Grid(4, False, "none"), 48)
    np.testing.assert_array_equal(found.codes[:dead], nearest.codes[:dead])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [16, 32, 48])
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_are_nearer_than_by_rounding(bits: Any, size: int, act_order: bool) -> None:
    """With short last blocks too (48 = 32 + 16)."""
    weights, gram = layer(bits)
    grid = Grid(bits, False, "mse")
    nearest = error(weights, round_to_nearest(weights, grid, size), grid, size, gram)
    found = gptq(weights, gram, grid, size, by_activation=act_order)
    assert found.codes.max() <= grid.top
    assert error(weights, found, grid, size, gram) < (0.8 if act_order else 1.0) * nearest


@pytest.mark.parametrize("act_order", [False, True])
def test_without_correlation_it_rounds_to_nearest(act_order: bool) -> None:
    weights, gram = layer(1)
    grid = Grid(4, False, "mse")
    found = gptq(weights, np.diag(np.diag(gram)), grid, 16, by_activation=act_order)
    for made, wanted in zip(found, round_to_nearest(weights, grid, 16), strict=True):
        np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("symmetric", [False, True])
def test_inputs_that_are_never_active_are_rounded_to_nearest(symmetric: bool) -> None:
    weights, gram = layer(2)
    dead = [3, 30]
    gram[dead] = gram[:, dead] = 0
    grid = Grid(4, symmetric, "none")
    found, nearest = gptq(weights, gram, grid, 16), round_to_nearest(weights, grid, 16)
    steps = np.abs(found.values(grid, 16) - weights)[dead] / np.abs(found.scales[[0, 1]])
    # A symmetric grid has one step less on one side.
    assert steps.max() <= (1.0 if symmetric else 0.5) + 1e-5
    assert error(weights, found, grid, 16, gram) < error(weights, nearest, grid, 16, gram)
    assert np.isfinite(gptq(weights, np.zeros_like(gram), grid, 16).scales).all()


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_matrix_is_damped_until_it_is_none(damping: float) -> None:
    """Three rows of data for 48 inputs."""
    weights, _ = layer(3)
    few = np.random.default_rng(3).standard_normal((3, 48))
    gram, grid = few.T @ few, Grid(4, False, "mse")
    found = gptq(weights, gram, grid, 16, damping=damping)
    nearest = round_to_nearest(weights, grid, 16)
    assert error(weights, found, grid, 16, gram) < 0.5 * error(weights, nearest, grid, 16, gram)


@given(st.integers(0, 999), st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 48]))
def test_awq_is_never_worse_than_rounding_on_its_own_terms(seed: int, bits: Any, size: int) -> None:
    """A power of 0, and a share of 1, are among what is tried: float32 sums differ by 1e-3."""
    weights, gram = layer(seed, outputs=8)
    grid = Grid(bits, False, "none")
    means = np.sqrt(np.diag(gram) / 400)
    factors = input_factors([weights], gram, means, grid, [size])[:, None].astype(np.float32)
    nearest = round_to_nearest(weights, grid, size)
    scaled = round_to_nearest(weights * factors, grid, size).values(grid, size) / factors
    assert output_error(weights - scaled, gram) <= 1.001 * error(weights, nearest, grid, size, gram)
    by_block = np.zeros((2, 8))
    for which, made in enumerate((nearest, clipped(weights, gram, grid, size))):
        off = weights - made.values(grid, size)
        for start in range(0, 48, size):
            rows = slice(start, min(start + size, 48))
            by_block[which] += np.einsum("kn,kl,ln->n", off[rows], gram[rows, rows], off[rows])
    assert (by_block[1] <= 1.001 * by_block[0] + 1e-6).all()


def test_awq_protects_inputs_of_large_activations() -> None:
    """One channel a hundred times as large as the others: its weights get finer steps."""
    random = np.random.default_rng(5)
    activations = random.standard_normal((500, 48))
    activations[:, 7] *= 100
    weights = random.standard_normal((48, 24)).astype(np.float32)
    gram, grid = activations.T @ activations, Grid(4, False, "none")
    factors = input_factors([weights], gram, np.abs(activations).mean(axis=0), grid, [48])
    assert factors.argmax() == 7
    scaled = round_to_nearest(weights * factors[:, None].astype(np.float32), grid, 48)
    off = scaled.values(grid, 48) / factors[:, None] - weights
    nearest = error(weights, round_to_nearest(weights, grid, 48), grid, 48, gram)
    assert output_error(off, gram) < 0.2 * nearest


def test_an_input_that_is_always_zero_has_no_say_in_the_factors() -> None:
    random = np.random.default_rng(6)
    activations = random.standard_normal((500, 48)) * np.exp(random.standard_normal(48))
    activations[:, 9] = 0
    weights = random.standard_normal((48, 24)).astype(np.float32)
    gram, means = activations.T @ activations, np.abs(activations).mean(axis=0)
    grid = Grid(4, False, "none")
    factors = input_factors([weights], gram, means, grid, [16])
    assert factors[9] == 1
    live = np.delete(factors, 9)
    assert live.max() * live.min() == pytest.approx(1)
    assert live.max() > 1
    assert (input_factors([weights], 0 * gram, 0 * means, grid, [16]) == 1).all()


def test_scales_are_those_that_half_precision_stores() -> None:
    weights, gram = layer(6)
    half = weights.astype(np.float16)
    for made in (
        gptq(half, gram, Grid(4, False, "mse"), 16),
        clipped(half, gram, Grid(4, False, "mse"), 16),
    ):
        np.testing.assert_array_equal(made.scales, made.scales.astype(np.float16))


def test_blocks_are_clipped_where_outputs_gain() -> None:
    """In each output one weight of 8, on an input that is hardly active: it may lose a half."""
    weights = np.random.default_rng(8).standard_normal((32, 24)).astype(np.float32)
    weights[5], weights[9] = 8, -8
    gram = np.diag(np.where(np.isin(np.arange(32), [5, 9]), 1e-6, 1.0))
    grid = Grid(4, False, "none")
    nearest = error(weights, round_to_nearest(weights, grid, 32), grid, 32, gram)
    assert error(weights, clipped(weights, gram, grid, 32), grid, 32, gram) < 0.5 * nearest


def test_the_most_active_input_is_rounded_first() -> None:
    """Then no error of another one has reached it."""
    weights, gram = layer(9)
    first, grid = int(np.diag(gram).argmax()), Grid(4, False, "none")
    assert first > 0
    nearest = round_to_nearest(weights, grid, 16)
    by_activation = gptq(weights, gram, grid, 16, by_activation=True)
    np.testing.assert_array_equal(by_activation.codes[first], nearest.codes[first])
    assert (gptq(weights, gram, grid, 48).codes[first] != nearest.codes[first]).any()


def test_a_block_of_several_strips_has_the_scale_of_its_beginning() -> None:
    weights, gram = layer(10, inputs=256, outputs=4, rows=600)
    grid = Grid(4, False, "none")
    found, nearest = gptq(weights, gram, grid, 256), round_to_nearest(weights, grid, 256)
    np.testing.assert_array_equal(found.scales, nearest.scales)
    assert error(weights, found, grid, 256, gram) < error(weights, nearest, grid, 256, gram)


def test_a_short_block_of_small_weights_has_a_small_scale() -> None:
    weights = np.random.default_rng(11).uniform(-0.01, 0.01, (40, 6)).astype(np.float32)
    assert round_to_nearest(weights, Grid(4, False, "none"), 32).scales.max() < 0.002


def test_the_unit_of_activations_does_not_matter() -> None:
    """With an input that is never active, too; a power of two keeps every digit."""
    weights, gram = layer(12)
    gram[3] = gram[:, 3] = 0
    grid = Grid(4, False, "mse")
    found, small = (gptq(weights, each, grid, 16) for each in (gram, gram * 2.0**-30))
    np.testing.assert_array_equal(found.codes, small.codes)
