"""Numeric verification: run a module before and after a pass on the same feeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lwc.calibration.feeds import FeedSpec, dim_names, fixed_dims
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, VerificationError
from lwc.core.walk import is_random
from lwc.pipeline.passes import Contract, Exact, Lossy
from lwc.verify.numeric.bounds import (
    ROUNDING_FLOAT32,
    Bounds,
    OutputError,
    contract_bounds,
    depth,
    exact_rtol,
    rounding,
)
from lwc.verify.numeric.choosing import TestFeed, choose_feeds, is_small
from lwc.verify.numeric.judging import Judge
from lwc.verify.numeric.reference import Float64Reference, runs_in_float64
from lwc.verify.numeric.running import LOOP_SECONDS, Running, compiled, fits, fitted, limit_after

if TYPE_CHECKING:
    from lwc.core.module import Fingerprint, Module

__all__ = [
    "Comparer",
    "NumericReport",
    "OutputError",
    "compare",
    "compiled",
    "depth",
    "exact_rtol",
    "fitted",
]

Array = np.ndarray[Any, Any]

_LOSSY_FEEDS = 2

_BRIEF = 0.1
"""Seconds of ONNX Runtime up to which loops run in float64 too; the reference takes far longer."""


@dataclass(frozen=True)
class NumericReport:
    """What a comparison found.

    Attributes:
        errors: For each feed and output.
        rtol: Bound relative to an element and to its output's root mean square together.
        atol: Absolute bound added to it, for outputs of the order of one.
        feeds: Feeds compared.
        float64: Whether they were compared in float64 too.
        skipped: Why nothing was compared, or None.
    """

    errors: tuple[OutputError, ...] = ()
    rtol: float = 0.0
    atol: float = 0.0
    feeds: int = 0
    float64: bool = False
    skipped: str | None = None

    @property
    def worst(self) -> OutputError | None:
        """The output that comes nearest its bound or passes it, or None."""
        return max(self.errors, key=lambda one: (one.excess, one.max_error), default=None)


class Comparer:
    """Compares modules on feeds, and remembers the last one it ran.

    In a pipeline the result of one pass is the reference of the next, so each module is compiled
    and run once.

    Args:
        bindings: Extents of the free dimensions, one mapping per feed; found by trial by default.
        rtol: Replaces the relative bound.
        atol: Replaces the absolute bound.
        seed: Seed of the feeds.
        spec: What the user knows about the inputs.
        threads: Threads of one operator.
        limit: Seconds for one run of a reference that loops. What a pass made of one gets a
            second, or twenty times what the reference takes.
    """

    def __init__(
        self,
        *,
        bindings: Sequence[Mapping[str, int]] = (),
        rtol: float | None = None,
        atol: float | None = None,
        seed: int = 0,
        spec: FeedSpec | None = None,
        threads: int | None = None,
        limit: float = LOOP_SECONDS,
    ) -> None:
        self._bindings = bindings
        self._rtol = rtol
        self._atol = atol
        self._seed = seed
        self._spec = spec or FeedSpec()
        self._threads = threads
        self._limit = limit
        self._memory = _Memory()

    def __call__(
        self, before: Module, after: Module, contract: Contract | None = None
    ) -> NumericReport:
        """Run both modules on random feeds and check that outputs differ as little as promised.

        Both run on ONNX Runtime with its graph optimisations off, at three settings of the free
        dimensions where the model allows it: a usual one, an odd one and one. Feeds at the edges
        follow: numbers that are 0, huge or tiny, masks that hide whole rows. An element of an
        output may be off by what `Bounds` says:

        * `Exact`: rtol is `exact_rtol`, a bound on rounding that grows with the root of the
          depth; `rounding` is that of a single operator, for outputs of saturating functions.
          Integer and boolean outputs must be equal. A larger difference passes where rounding
          explains it: where relative changes of 2**-23 in weights and inputs move the output as
          far.
        * `Approximate`: the contract's bounds on top of that.
        * `Lossy`: nothing is promised; errors are only reported, over the bound of `Exact`.

        Small graphs of standard operators run in float64 as well, where cancellation hides
        nothing. NaN and infinities must stay where they are, and element types what they are,
        unless the pass is not exact and states another. Sequences are compared by element.

        Args:
            before: The reference.
            after: What a pass made of it. Dimensions it fixed are fixed in the feeds.
            contract: What the pass promises; `Exact()` by default.

        Raises:
            VerificationError: An output is off by more than its bound, is missing, has another
                shape or type, or `after` does not run where `before` does.
            LwcError: `before` does not run.
        """
        contract = contract or Exact()
        random = next(filter(is_random, before.nodes()), None)
        if random is not None:
            return NumericReport(skipped=f"{describe(random)} draws random numbers")
        if isinstance(contract, Lossy) and (recoded := _recoded(before, after)) is not None:
            return NumericReport(skipped=f"input '{recoded}' takes codes in place of numbers")
        feeds, expected, seconds = self._memory.recall(before, after) or self._reference(
            before, after, contract
        )
        if isinstance(contract, Lossy) and not is_small(before):
            # Nothing can fail: two feeds say how far a lossy pass is off.
            feeds, expected = feeds[:_LOSSY_FEEDS], expected[:_LOSSY_FEEDS]
        if contract.assumptions:
            # What they say of masks does not hold for masks of any kind.
            held = [
                (feed, outputs)
                for feed, outputs in zip(feeds, expected, strict=True)
                if feed.edge != "masked" and fits(feed.arrays, after)
            ]
            if not held:
                return NumericReport(skipped="no feed has the extents that the pass assumes")
            feeds, expected = [feed for feed, _ in held], [outputs for _, outputs in held]
        bounds = self._bounds(contract, before)
        limit = limit_after(seconds)
        results, seconds_after = self._run_after(after, feeds, limit)
        retyped = frozenset() if isinstance(contract, Exact) else _retyped(before, after)
        judge = Judge(before, contract, bounds, self._threads, limit, retyped)
        errors = judge.errors(feeds, expected, results, None)
        again: list[OutputError] = []
        # In 16 bits rounding is part of what is computed.
        wide = (
            _runs_in_float64(before)
            and _runs_in_float64(after)
            and rounding(before) <= ROUNDING_FLOAT32
            and max(seconds, seconds_after) <= _BRIEF
        )
        if wide and not isinstance(contract, Lossy):
            again = self._in_float64(before, after, feeds, judge, (expected, results))
        self._memory.keep(after, feeds, results, seconds_after)
        return NumericReport(
            tuple(errors + again), bounds.rtol, bounds.atol, len(feeds), bool(again)
        )

    def prime(self, module: Module) -> None:
        """Run a module now; it is the reference of the next comparison.

        Raises:
            LwcError: It does not run.
        """
        self._memory.keep(module, *self._reference(module, module, Exact()))

    @property
    def limit(self) -> float:
        """Seconds for one run of what a pass makes of the last module."""
        return limit_after(self._memory.seconds)

    @property
    def last(self) -> tuple[list[TestFeed], list[dict[str, Array]]]:
        """The feeds of the last run, and what the last module gave on them."""
        return self._memory.feeds, self._memory.outputs

    def _bounds(self, contract: Contract, before: Module) -> Bounds:
        bounds = contract_bounds(contract, before)
        if self._rtol is not None:
            bounds = bounds._replace(rtol=self._rtol)
        if self._atol is not None:
            bounds = bounds._replace(rounding=0.0, promised=self._atol)
        return bounds

    def _reference(self, before: Module, after: Module, contract: Contract) -> _Outputs:
        dims, known = {**self._spec.dims, **fixed_dims(before, after)}, dim_names(before)
        spec = replace(self._spec, dims={k: v for k, v in dims.items() if k in known})
        with compiled(before, self._threads, limit=self._limit) as runner:
            edges = not isinstance(contract, Lossy)
            chosen = choose_feeds(
                before, runner, self._bindings, seed=self._seed, spec=spec, edges=edges
            )
        return _Outputs(
            [feed for feed, _ in chosen], [outputs for _, outputs in chosen], _looping(runner)
        )

    def _run_after(
        self, after: Module, feeds: Sequence[TestFeed], limit: float
    ) -> tuple[list[dict[str, Array]], float]:
        try:
            with compiled(after, self._threads, limit=limit) as candidate:
                results = [candidate.run(fitted(feed.arrays, after)) for feed in feeds]
        except LwcError as error:
            raise VerificationError(
                f"the module ran before the pass and does not run after it: {error.message}",
                node=error.node,
            ) from error
        return results, _looping(candidate)

    def _in_float64(
        self,
        before: Module,
        after: Module,
        feeds: Sequence[TestFeed],
        judge: Judge,
        runtime: tuple[Sequence[Mapping[str, Array]], Sequence[Mapping[str, Array]]],
    ) -> list[OutputError]:
        """Compare in float64.

        The reference has errors of its own. It is believed only where both modules mean to it
        what they mean to ONNX Runtime, whose outputs before and after are given.
        """
        try:
            reference, candidate = Float64Reference(before), Float64Reference(after)
            wanted = [reference.run(feed.arrays) for feed in feeds]
        except LwcError:
            return []  # not every operator has a reference implementation
        errors: list[OutputError] = []
        for feed, ours, *theirs in zip(feeds, wanted, *runtime, strict=True):
            try:
                result = candidate.run(fitted(feed.arrays, after))
            except LwcError:
                continue  # ONNX Runtime ran it
            try:
                errors += judge.errors([feed], [ours], [result], reference)
            except VerificationError:
                pairs = zip(theirs, (ours, result), strict=True)
                if all(judge.means_the_same(feed, *pair) for pair in pairs):
                    raise
        return errors


def compare(
    before: Module,
    after: Module,
    *,
    contract: Contract | None = None,
    bindings: Sequence[Mapping[str, int]] = (),
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    spec: FeedSpec | None = None,
    threads: int | None = None,
    limit: float = LOOP_SECONDS,
) -> NumericReport:
    """Compare two modules once; see `Comparer`.

    Raises:
        VerificationError: They differ by more than `contract` allows.
        LwcError: `before` does not run.
    """
    comparer = Comparer(
        bindings=bindings,
        rtol=rtol,
        atol=atol,
        seed=seed,
        spec=spec,
        threads=threads,
        limit=limit,
    )
    return comparer(before, after, contract)


class _Outputs(NamedTuple):
    """Feeds, what a module gives on each, and the seconds of the longest run if it loops."""

    feeds: list[TestFeed]
    outputs: list[dict[str, Array]]
    seconds: float


def _looping(runner: Running) -> float:
    """Return the seconds of the longest run of a module that loops, 0 of one that does not."""
    return 0.0 if runner.limit is None else runner.longest


class _Memory:
    """What the last module gave on the feeds of a run."""

    def __init__(self) -> None:
        self._fingerprint: Fingerprint | None = None
        self.feeds: list[TestFeed] = []
        self.outputs: list[dict[str, Array]] = []
        self.seconds = 0.0

    def keep(
        self,
        module: Module,
        feeds: list[TestFeed],
        outputs: list[dict[str, Array]],
        seconds: float,
    ) -> None:
        self._fingerprint, self.seconds = module.fingerprint(), seconds
        self.feeds, self.outputs = feeds, outputs

    def recall(self, before: Module, after: Module) -> _Outputs | None:
        """Return what `before` gave if it was run last, and `after` fixed no dimension."""
        if self._fingerprint is None or fixed_dims(before, after):
            return None
        if self._fingerprint != before.fingerprint():
            return None
        return _Outputs(self.feeds, self.outputs, self.seconds)


def _recoded(before: Module, after: Module) -> str | None:
    """Return an input that took floating-point numbers and takes integers, such as a cache."""
    types = {value.name: value.dtype for value in before.graph.inputs}
    for value in after.graph.inputs:
        was, now = types.get(value.name), value.dtype
        if was is None or now is None:
            continue
        if was.is_floating_point() and not now.is_floating_point():
            return value.name
    return None


def _retyped(before: Module, after: Module) -> frozenset[str]:
    """Return the names of the graph outputs that state another type than before."""
    stated = {value.name: value.type for value in after.graph.outputs}
    return frozenset(
        value.name
        for value in before.graph.outputs
        if value.name and value.name in stated and stated[value.name] != value.type
    )


def _runs_in_float64(module: Module) -> bool:
    return is_small(module) and runs_in_float64(module)
