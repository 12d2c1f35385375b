"""What int8 products make of activations and weights, in numpy: rounded and read back as floats."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

__all__ = ["per_channel", "per_tensor", "per_token", "relative_error", "static"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def per_token(x: Array) -> Array:
    """Round each row of `[rows, channels]` to ±127 steps of its largest magnitude."""
    return _evenly(x, 1)


def per_channel(weights: Array) -> Array:
    """Round each column of weights `[inputs, outputs]` to ±127 steps of its largest magnitude."""
    return _evenly(weights, 0)


def _evenly(array: Array, axis: int) -> Array:
    steps = np.abs(array).max(axis=axis, keepdims=True) / np.float32(127)
    steps[steps == 0] = 1
    rounded: Array = np.rint(array / steps)
    rounded *= steps
    return rounded


def per_tensor(x: Array) -> Array:
    """Round to 256 steps between the least and the largest number and zero.

    As DynamicQuantizeLinear does it.
    """
    low, high = min(float(x.min(initial=0)), 0.0), max(float(x.max(initial=0)), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / step), 0, 255)
    rounded: Array = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    return rounded.astype(np.float32)


def static(x: Array, step: float) -> Array:
    """Round to -128 to 127 steps of a given size."""
    rounded: Array = np.clip(np.rint(x / step), -128, 127) * step
    return rounded.astype(np.float32)


def relative_error(found: Array, wanted: Array) -> float:
    """Return the Frobenius norm of a difference over that of what was wanted; 0 where that is 0."""
    wide = wanted.astype(np.float64)
    whole = float(np.linalg.norm(wide))
    return float(np.linalg.norm(found - wide)) / whole if whole else 0.0
