"""How far the outputs of two models agree on the same feeds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lwc.backends.base import Executable
from lwc.core.errors import LwcError
from lwc.evaluate.execution import ModelLike, executable
from lwc.pipeline.passes import Feed

__all__ = ["Agreement", "OutputAgreement", "agreement", "output_agreement"]

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20
"""Elements compared in float64 at once."""


@dataclass(frozen=True)
class OutputAgreement:
    """How far one output agrees, over all feeds.

    Errors, the relative error and the cosine are over the elements that are finite in both.

    Attributes:
        elements: Elements compared.
        max_error: Largest absolute difference.
        mean_error: Mean absolute difference.
        relative_error: Euclidean norm of the difference over that of the reference.
        cosine: Cosine of the angle between both, all elements as one vector; 1 where both are 0,
            0 where elements differ and none can be compared.
        top1: Share of rows (along the last axis) whose largest element is at the same place, and
            which hold NaN in both or neither; None where rows have one element.
        nonfinite: Elements that are NaN or infinite on one side and something else on the other.
    """

    elements: int
    max_error: float
    mean_error: float
    relative_error: float
    cosine: float
    top1: float | None
    nonfinite: int


@dataclass(frozen=True)
class Agreement:
    """Agreement of every output.

    Attributes:
        outputs: By output name.
        feeds: Feeds compared.
    """

    outputs: dict[str, OutputAgreement]
    feeds: int


def agreement(
    before: ModelLike | Executable,
    after: ModelLike | Executable,
    feeds: Iterable[Feed],
    *,
    threads: int | None = None,
    fit: Callable[[Feed], Feed] = lambda feed: feed,
) -> Agreement:
    """Run both models on every feed and compare the outputs they share.

    Args:
        before: The reference.
        after: The model compared with it.
        feeds: Read one at a time.
        threads: Threads of one operator, where a model is compiled here.
        fit: Makes of a feed what `after` is given.

    Raises:
        LwcError: An output of `before` is missing from `after` or has another shape.
    """
    sums: dict[str, _Sums] = {}
    count = 0
    with contextlib.ExitStack() as stack:
        left, right = (
            stack.enter_context(executable(model, threads=threads)) for model in (before, after)
        )
        for feed in feeds:
            count += 1
            reference, result = left.run(feed), right.run(fit(feed))
            for name, expected in reference.items():
                if name not in result:
                    raise LwcError(f"output '{name}' is missing from the second model")
                sums.setdefault(name, _Sums()).add(name, expected, result[name])
    return Agreement({name: one.result() for name, one in sums.items()}, count)


def output_agreement(expected: Array, result: Array) -> OutputAgreement:
    """Compare two arrays of one shape."""
    sums = _Sums()
    sums.add("", expected, result)
    return sums.result()


class _Sums:
    """Running sums of one output over feeds."""

    def __init__(self) -> None:
        self.elements = self.finite = self.nonfinite = 0
        self.largest = self.total = self.squares = 0.0
        self.reference = self.other = self.product = 0.0
        self.rows = self.same_top = 0

    def add(self, name: str, expected: Array, result: Array) -> None:
        expected, result = np.asarray(expected), np.asarray(result)
        if expected.shape != result.shape:
            raise LwcError(
                f"output '{name}' has shape {list(result.shape)} after and "
                f"{list(expected.shape)} before"
            )
        self.elements += expected.size
        if expected.dtype.kind in "OUS":
            self.nonfinite += int((expected != result).sum())
            return
        left, right = expected.reshape(-1), result.reshape(-1)
        for start in range(0, left.size, _BLOCK):
            self._add_block(left[start : start + _BLOCK], right[start : start + _BLOCK])
        if expected.ndim and expected.shape[-1] > 1 and expected.size:
            same = expected.argmax(axis=-1) == result.argmax(axis=-1)
            same &= np.isnan(expected.max(axis=-1)) == np.isnan(result.max(axis=-1))
            self.rows += same.size
            self.same_top += int(same.sum())

    def _add_block(self, left: Array, right: Array) -> None:
        a, b = left.astype(np.float64), right.astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        alike = finite | (a == b) | (np.isnan(a) & np.isnan(b))
        self.nonfinite += int(a.size - alike.sum())
        a, b = a[finite], b[finite]
        if not a.size:
            return
        error = np.abs(a - b)
        self.finite += a.size
        self.largest = max(self.largest, float(error.max()))
        self.total += float(error.sum())
        self.squares += float(error @ error)
        self.reference += float(a @ a)
        self.other += float(b @ b)
        self.product += float(a @ b)

    def result(self) -> OutputAgreement:
        norm, other = math.sqrt(self.reference), math.sqrt(self.other)
        distance = math.sqrt(self.squares)
        if norm and other:
            cosine = min(1.0, max(-1.0, self.product / (norm * other)))
        else:
            cosine = 1.0 if norm == other and (self.finite or not self.nonfinite) else 0.0
        relative = distance / norm if norm else (math.inf if distance else 0.0)
        return OutputAgreement(
            self.elements,
            self.largest,
            self.total / self.finite if self.finite else 0.0,
            relative,
            cosine,
            self.same_top / self.rows if self.rows else None,
            self.nonfinite,
        )
