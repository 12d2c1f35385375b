"""Whether outputs after a pass differ from those before by more than it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lwc.calibration.feeds import Edge
from lwc.core.errors import VerificationError
from lwc.pipeline.passes import Contract, Exact, Lossy
from lwc.verify.numeric.bounds import Bounds, OutputError, difference, exact_rtol, shown
from lwc.verify.numeric.choosing import TestFeed
from lwc.verify.numeric.reference import Float64Reference
from lwc.verify.numeric.running import compiled
from lwc.verify.numeric.sensitivity import ROUNDING, Sensitivity

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Judge"]

Array = np.ndarray[Any, Any]

_REFERENCE_RTOL = 4 * 2.0**-24
"""In float64 what is left is the rounding of constants to float32, 2**-24 each."""


@dataclass(frozen=True)
class Judge:
    """Judges differences.

    Attributes:
        before: The module before the pass.
        contract: What the pass promises.
        bounds: How far an output may be off.
        threads: Threads of one operator.
        limit: Seconds for one run of a module that loops.
        retyped: Outputs that may have another type than before.
    """

    before: Module
    contract: Contract
    bounds: Bounds
    threads: int | None
    limit: float
    retyped: frozenset[str]

    def errors(
        self,
        feeds: Sequence[TestFeed],
        expected: Sequence[Mapping[str, Array]],
        results: Sequence[Mapping[str, Array]],
        reference: Float64Reference | None,
    ) -> list[OutputError]:
        """Return the error of each output on each feed.

        Args:
            feeds: The feeds.
            expected: Outputs before.
            results: Outputs after.
            reference: The float64 reference of the module before, where outputs are in float64.

        Raises:
            VerificationError: One is larger than the contract and rounding allow.
        """
        bounds = self.bounds
        if reference is not None and isinstance(self.contract, Exact):
            rtol = max(bounds.rtol - exact_rtol(self.before), _REFERENCE_RTOL)
            bounds = bounds._replace(rtol=rtol, rounding=min(bounds.rounding, 2.0**-24))
        errors = []
        for feed, wanted, result in zip(feeds, expected, results, strict=True):
            sensitivity: Sensitivity | None = None
            for name, array in wanted.items():
                if name not in result:
                    raise VerificationError(f"output '{name}' is gone after the pass")
                if reference is None:
                    self._check_type(name, array, result[name])
                kept = self._kept(array, result[name])
                error = difference(name, feed.shapes, kept, result[name], bounds)
                if error.excess > 1 and not isinstance(self.contract, Lossy):
                    if kept is array:
                        sensitivity = sensitivity or self._sensitivity(feed, wanted, reference)
                        error = sensitivity.judge(error, array, result[name], bounds)
                    if error.excess > 1:
                        raise VerificationError(_complaint(error, feed, bounds, reference))
                errors.append(error)
        return errors

    def _kept(self, before: Array, after: Array) -> Array:
        """Return what an output after the pass stands for."""
        kept = self.contract.kept if isinstance(self.contract, Exact) else None
        if kept is None or before.shape == after.shape:
            return before
        return kept(before, after)

    def _check_type(self, name: str, before: Array, after: Array) -> None:
        free = self.retyped.intersection((name, name.partition("[")[0]))
        if before.dtype != after.dtype and not free:
            raise VerificationError(
                f"output '{name}' was {before.dtype} before the pass and is {after.dtype} after it"
            )

    def means_the_same(
        self, feed: TestFeed, runtime: Mapping[str, Array], reference: Mapping[str, Array]
    ) -> bool:
        """Tell whether rounding explains how the reference differs from ONNX Runtime."""
        sensitivity: Sensitivity | None = None
        for name, array in runtime.items():
            if name not in reference or reference[name].shape != array.shape:
                return False
            mine = reference[name].astype(array.dtype)
            error = difference(name, {}, array, mine, self.bounds)
            if error.excess > 1:
                sensitivity = sensitivity or self._sensitivity(feed, runtime, None)
                if sensitivity.judge(error, array, mine, self.bounds).excess > 1:
                    return False
        return True

    def _sensitivity(
        self,
        feed: TestFeed,
        wanted: Mapping[str, Array],
        reference: Float64Reference | None,
    ) -> Sensitivity:
        make = Float64Reference if reference is not None else None

        def prepared(module: Module) -> AbstractContextManager[Any]:
            if make is not None:
                return nullcontext(make(module))
            return compiled(module, self.threads, limit=self.limit)

        rounded = ROUNDING if reference is None else 2.0**-52
        return Sensitivity.measure(self.before, feed.arrays, wanted, prepared, results=rounded)


def _complaint(
    error: OutputError,
    feed: TestFeed,
    bounds: Bounds,
    reference: Float64Reference | None,
) -> str:
    filled = "" if feed.edge == "plain" else f", {_EDGE_WORDS[feed.edge]}"
    precision = "" if reference is None else ", in float64"
    return (
        f"output '{error.output}' is {error.result:.6g} at {list(error.index)} after the pass and "
        f"was {error.expected:.6g} before: {error.excess:.3g} times its bound "
        f"(rtol {bounds.rtol:.2g}, atol {bounds.atol:.2g}{precision}), "
        f"with {shown(error.shapes)}{filled}"
    )


_EDGE_WORDS: dict[Edge, str] = {
    "zeros": "numbers all 0",
    "huge": "numbers a thousand times as large",
    "tiny": "numbers a thousandth as large",
    "masked": "some rows masked as a whole",
}
