"""AWQ: scaling up the inputs that see large activations before rounding, and clipping blocks.

Lin et al. 2024. Errors are those of the layer's outputs on calibration data, by H = X·Xᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from lwc.passes.quantization.gptq import (
    Rounded,
    empty,
    output_error,
    round_block,
    round_to_nearest,
)
from lwc.passes.quantization.rounding import Grid

__all__ = ["clipped", "input_factors"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_POWERS = np.arange(20) / 20
_CLIPS = np.linspace(1.0, 0.5, 11)
_LEAST = 1e-4
"""Mean magnitudes count as at least this."""


def input_factors(
    weights: Sequence[Array], gram: Array, means: Array, grid: Grid, block_sizes: Sequence[int]
) -> Array:
    """Return what to multiply each input of some layers by before they are rounded.

    A factor is `mean|x|^r`, divided by the geometric mean of the largest and least of them; that
    of an input which is always zero is 1. Of 20 powers r in `[0, 1)` the one of least error is
    taken; r = 0 leaves the weights alone.

    Args:
        weights: Those of all layers that read the activation, `[inputs, outputs]` each.
        gram: X·Xᵀ, `[inputs, inputs]`.
        means: Mean |x| of each input.
        grid: What the weights will be rounded to.
        block_sizes: Inputs that share a scale, for each weight.
    """
    best, least = np.ones(len(means)), np.inf
    live = means > 0
    if not live.any():
        return best
    base = np.maximum(means[live].astype(np.float64), _LEAST)
    base /= np.sqrt(base.max() * base.min())
    for power in _POWERS:
        factors = np.ones(len(means))
        factors[live] = base**power
        along = factors[:, None].astype(np.float32)
        error = 0.0
        for weight, size in zip(weights, block_sizes, strict=True):
            scaled = weight.astype(np.float32) * along
            rounded = round_to_nearest(scaled, grid, size).values(grid, size)
            error += output_error(weight - rounded / along, gram)
        if error < least:
            best, least = factors, error
    return best


def clipped(weights: Array, gram: Array, grid: Grid, block_size: int) -> Rounded:
    """Round weights, each block within the share of its range that keeps its outputs best.

    Shares from 1 down to one half are tried; a block's error counts without its correlation with
    other blocks.
    """
    inputs, outputs = weights.shape
    made = empty(inputs, outputs, -(-inputs // block_size))
    for block in range(len(made.scales)):
        rows = slice(block * block_size, min((block + 1) * block_size, inputs))
        part, inner = weights[rows], gram[rows, rows].astype(np.float32)
        low, high = part.min(axis=0), part.max(axis=0)
        least = np.full(outputs, np.inf, np.float32)
        for share in _CLIPS.astype(weights.dtype):
            within = np.clip(part, low * share, high * share)
            codes, scales, zeros = round_block(within, grid, block_size, weights.dtype)
            difference = part - grid.points(codes, zeros) * scales
            errors = np.einsum("kn,kn->n", inner @ difference, difference)
            better = errors < least
            least[better] = errors[better]
            made.codes[rows, better] = codes[:, better]
            made.scales[block, better] = scales[better]
            made.zeros[block, better] = zeros[better]
    return made
