"""Orthogonal matrices that spread outliers: randomized Hadamard matrices and random ones.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. They are known for 1, 2 and, by Paley's
two constructions over the integers modulo a prime, for many multiples of 4; the Kronecker product
of two is one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, Literal, TypeAlias

import numpy as np

__all__ = ["Kind", "Rotation", "hadamard_matrix", "hadamard_orders", "known_orders", "rotation"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Kind: TypeAlias = Literal["hadamard", "orthogonal"]

_MERGED = 64
"""Factors are multiplied out up to this order: a product with a tiny matrix costs a pass over the
rows all the same."""

_CHUNK = 1 << 21
"""Elements that are held in float64 at a time."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix diag(signs) · (F1 ⊗ F2 ⊗ …) · scale.

    Attributes:
        signs: 1 and -1, `[width]`.
        factors: Square matrices, the product of whose orders is the width.
        scale: The number that makes the matrix orthogonal.
    """

    signs: Array
    factors: tuple[Array, ...]
    scale: float

    @property
    def width(self) -> int:
        """The order of the matrix."""
        return len(self.signs)

    def turn(self, rows: Array) -> Array:
        """Return `rows @ Q` for rows `[count, width]` in float64."""
        turned: Array = rows * (self.signs * self.scale)
        behind = self.width
        for factor in self.factors:
            order = len(factor)
            behind //= order
            # Axes: what lies before the factor's, the factor's own, what lies behind it.
            parts = turned.reshape(-1, order, behind)
            turned = parts.reshape(-1, order) @ factor if behind == 1 else factor.T @ parts
        return turned.reshape(rows.shape)

    def apply(
        self,
        array: Array,
        axis: int,
        factors: Array | None,
        *,
        centered: bool,
        dtype: np.dtype[Any],
    ) -> Array:
        """Turn one axis of a constant, after scaling and centering it.

        What is held besides the result are some rows in float64.

        Args:
            array: The constant.
            axis: Its axis of `width` channels.
            factors: A number for each channel; None for ones.
            centered: Whether the mean over the channels is subtracted.
            dtype: The type of the result.

        Raises:
            OverflowError: A number of the result is not finite.
        """
        result = np.empty(array.shape, dtype)
        before, after = (np.atleast_2d(np.moveaxis(each, axis, -1)) for each in (array, result))
        step = max(1, _CHUNK // self.width)
        for place in np.ndindex(before.shape[:-2]):
            rows, target = before[place], after[place]
            for start in range(0, len(rows), step):
                part = rows[start : start + step].astype(np.float64)
                if factors is not None:
                    part *= factors
                if centered:
                    part -= part.mean(axis=-1, keepdims=True)
                with np.errstate(over="ignore", invalid="ignore"):
                    turned = self.turn(part).astype(dtype)
                if not np.isfinite(turned).all():
                    raise OverflowError
                target[start : start + step] = turned
        return result


def rotation(kind: Kind, width: int, seed: int) -> Rotation | None:
    """Return a random orthogonal matrix, the same for the same arguments.

    Args:
        kind: `hadamard` is a Hadamard matrix with random signs of its rows, `orthogonal` is drawn
            from all orthogonal matrices alike.
        width: Its order.
        seed: Of the random numbers.

    Returns:
        None where no Hadamard matrix of this order is known here.
    """
    random = np.random.default_rng(seed)
    if kind == "orthogonal":
        turned, triangle = np.linalg.qr(random.standard_normal((width, width)))
        # Without the signs it would depend on how the decomposition is computed.
        turned *= np.where(np.diag(triangle) < 0, -1.0, 1.0)
        return Rotation(np.ones(width), (turned,), 1.0)
    orders = hadamard_orders(width)
    if orders is None:
        return None
    signs = random.choice(np.array([-1.0, 1.0]), width)
    factors = _merged([hadamard_matrix(order) for order in orders])
    return Rotation(signs, tuple(each.astype(np.float64) for each in factors), width**-0.5)


def _merged(matrices: Sequence[Array]) -> list[Array]:
    made: list[Array] = []
    for matrix in matrices:
        if made and len(made[-1]) * len(matrix) <= _MERGED:
            made[-1] = np.kron(made[-1], matrix)
        else:
            made.append(matrix)
    return made or [np.ones((1, 1), np.int64)]


@lru_cache(maxsize=1024)
def hadamard_orders(width: int) -> tuple[int, ...] | None:
    """Return orders of `hadamard_matrix` whose product is `width`, of the least sum; or None."""
    if width < 1:
        return None
    if width == 1:
        return ()
    found: list[tuple[int, ...]] = [(width,)] if _construction(width) else []
    for order in range(2, width // 2 + 1):
        if width % order == 0 and _construction(order):
            rest = hadamard_orders(width // order)
            if rest is not None:
                found.append((*rest, order))
    best = min(found, key=lambda orders: (sum(orders), orders), default=None)
    return None if best is None else tuple(sorted(best, reverse=True))


def hadamard_matrix(order: int) -> Array:
    """Return a Hadamard matrix that is no Kronecker product, int64 `[order, order]`.

    Raises:
        ValueError: None is known here.
    """
    kind = _construction(order)
    if kind is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known")
    if kind == "plain":
        return np.array([[1, 1], [1, -1]], np.int64)[:order, :order]
    prime = order - 1 if kind == "first" else order // 2 - 1
    frame = _bordered(prime, -1 if kind == "first" else 1)
    unit = np.eye(prime + 1, dtype=np.int64)
    if kind == "first":
        return frame + unit
    first, second = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(frame, first) + np.kron(unit, second)


def _construction(order: int) -> Literal["plain", "first", "second"] | None:
    """Say how a matrix of this order is made."""
    if order in (1, 2):
        return "plain"
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _is_prime(order - 1):
        return "first"
    half = order // 2 - 1
    return "second" if half % 4 == 1 and _is_prime(half) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, isqrt(number) + 1))


def _bordered(prime: int, corner: int) -> Array:
    """Return the matrix of quadratic residues' differences, with a border: a conference matrix.

    It is antisymmetric for a corner of -1 (primes that leave 3 when divided by 4), else symmetric.
    """
    residues = np.full(prime, -1, np.int64)
    residues[np.unique(np.arange(1, prime) ** 2 % prime)] = 1
    residues[0] = 0
    places = np.arange(prime)
    made = np.zeros((prime + 1, prime + 1), np.int64)
    made[0, 1:] = 1
    made[1:, 0] = corner
    made[1:, 1:] = residues[(places[:, None] - places) % prime]
    return made


def known_orders(limit: int) -> list[int]:
    """Return every order up to a limit that `rotation` knows a Hadamard matrix of."""
    return [width for width in range(1, limit + 1) if hadamard_orders(width) is not None]
