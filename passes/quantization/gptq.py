"""GPTQ: rounding a layer's weights one input at a time, the rest making up for each error.

Frantar et al. 2023. With H = X·Xᵀ over calibration data, the error of rounding input i of an output
is spread over the inputs that are not rounded yet in the way that changes the output least:
`w[j] -= (w[i] - q[i]) * U[i, j] / U[i, i]`, where U is the upper Cholesky factor of the inverse of
H.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lwc.passes.quantization.rounding import Grid, TileRounder

__all__ = ["Rounded", "empty", "gptq", "output_error", "round_block", "round_to_nearest"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_STRIP = 128
"""Inputs that are rounded before the errors of all of them go to the rest in one product."""


class Rounded(NamedTuple):
    """A weight on its grid.

    Attributes:
        codes: uint8 `[inputs, outputs]`.
        scales: float32 `[blocks, outputs]`.
        zeros: uint8 `[blocks, outputs]`.
    """

    codes: Array
    scales: Array
    zeros: Array

    def values(self, grid: Grid, block_size: int) -> Array:
        """Return the weights that the codes stand for, float32 `[inputs, outputs]`."""
        which = np.arange(len(self.codes)) // block_size
        wide = grid.points(self.codes, self.zeros[which])
        wide *= self.scales[which]
        return wide


def round_to_nearest(weights: Array, grid: Grid, block_size: int) -> Rounded:
    """Round weights `[inputs, outputs]`, each to the nearest point of its block's grid.

    Scales are such as the weights' type can store; that holds for the other functions too.
    """
    inputs, outputs = weights.shape
    blocks = -(-inputs // block_size)
    made = empty(inputs, outputs, blocks)
    for block in range(blocks):
        rows = slice(block * block_size, min((block + 1) * block_size, inputs))
        codes, made.scales[block], made.zeros[block] = round_block(
            weights[rows], grid, block_size, weights.dtype
        )
        made.codes[rows] = codes
    return made


def gptq(
    weights: Array,
    gram: Array,
    grid: Grid,
    block_size: int,
    *,
    damping: float = 0.01,
    by_activation: bool = False,
) -> Rounded:
    """Round weights so that the layer's outputs on the calibration data change little.

    Args:
        weights: `[inputs, outputs]`.
        gram: X·Xᵀ, float64 `[inputs, inputs]`. An input that is always zero keeps its
            nearest rounding.
        grid: What to round to.
        block_size: Inputs that share a scale.
        damping: Added to the diagonal, as a share of its mean; ten times as much, as often as
            need be, where the matrix is singular all the same.
        by_activation: Round the inputs of the largest activations first (act-order). Scales are
            then those of the weights before any of them is rounded.
    """
    inputs, outputs = weights.shape
    order = np.arange(inputs)
    if by_activation:
        order = np.argsort(-np.diag(gram), kind="stable")
    work = weights[order].astype(np.float32)
    factor = _inverse_factor(gram[np.ix_(order, order)], damping)
    if by_activation:
        made = round_to_nearest(weights, grid, block_size)
    else:
        made = empty(inputs, outputs, -(-inputs // block_size))
    strip = min(block_size, _STRIP)
    for start in range(0, inputs, strip):
        stop = min(start + strip, inputs)
        if not by_activation and start % block_size == 0:
            block = start // block_size
            _, made.scales[block], made.zeros[block] = round_block(
                work[start : start + block_size], grid, block_size, weights.dtype
            )
        errors = np.empty((stop - start, outputs), np.float32)
        for row in range(start, stop):
            block = order[row] // block_size
            scale, zero = made.scales[block], made.zeros[block].astype(np.float32)
            codes = grid.codes(work[row] / scale, zero).astype(np.uint8)
            made.codes[order[row]] = codes
            error = (work[row] - grid.points(codes, zero) * scale) / factor[row, row]
            errors[row - start] = error
            work[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], error)
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return made


def output_error(difference: Array, gram: Array) -> float:
    """Return the squared error of a layer's outputs: the trace of dᵀ·H·d."""
    return float(np.einsum("kn,kn->", gram.astype(np.float32) @ difference, difference))


def empty(inputs: int, outputs: int, blocks: int) -> Rounded:
    """Return a weight to be filled in."""
    return Rounded(
        np.empty((inputs, outputs), np.uint8),
        np.empty((blocks, outputs), np.float32),
        np.empty((blocks, outputs), np.uint8),
    )


def round_block(
    weights: Array, grid: Grid, block_size: int, scale_dtype: Any
) -> tuple[Array, Array, Array]:
    """Round one block of every output: codes, scales and zero points; it may be a short one."""
    rows, outputs = weights.shape
    rounder = TileRounder(grid, block_size, outputs, scale_dtype)
    tile = rounder.weights(outputs)
    tile[:rows] = weights
    tile[rows:] = 0
    found = rounder.round(tile)
    assert found is not None, "weights are finite"
    return found.codes[:rows], found.scales, found.zero_points


def _inverse_factor(gram: Array, damping: float) -> Array:
    """Return the upper Cholesky factor U of the inverse of the damped matrix, float32.

    With rows and columns in reverse order, the lower factor of H is an upper one: H = R·Rᵀ, and
    U = R⁻¹. The inverse of H itself is not needed.
    """
    matrix = gram.astype(np.float64)
    diagonal = np.diag(matrix)
    active = diagonal[diagonal > 0]
    mean = float(active.mean()) if active.size else 1.0
    np.fill_diagonal(matrix, diagonal + damping * mean)
    while True:
        try:
            upper = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
            return np.linalg.inv(upper).astype(np.float32)
        except np.linalg.LinAlgError:
            damping = max(damping * 10, 1e-6)
            matrix[np.diag_indices_from(matrix)] += damping * mean
