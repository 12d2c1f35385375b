"""The contract of a pass, checked in full on one module.

What the pass manager checks after every pass of every run is part of it; the rest would be too
slow there: the pass is run again, under other names, on its own result, and saved and read back.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.feeds import FeedSpec, fixed_dims
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, PassError, VerificationError
from lwc.core.walk import constant_tensor, is_random
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Lossy, Pass, PassContext, vouched
from lwc.pipeline.record import PassRecord, take_snapshot
from lwc.rewrite.limit import RewriteLimit
from lwc.verify.contract.isomorphism import renamed, structure
from lwc.verify.numeric.bounds import distance, root_mean_square, usual_size
from lwc.verify.numeric.choosing import TestFeed
from lwc.verify.numeric.comparer import Comparer
from lwc.verify.numeric.running import LOOP_SECONDS, compiled, fitted
from lwc.verify.numeric.sensitivity import Sensitivity

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Clause", "ContractOutcome", "ContractSettings", "ContractViolation", "check_contract"]

Array = np.ndarray[Any, Any]

Clause: TypeAlias = Literal[
    "crash", "structure", "weights", "outputs", "noise", "repetition", "names",
    "idempotence", "round trip", "cost",
]  # fmt: skip
"""What a pass may break:

* `crash`: it raises something else than an `LwcError`, or returns no `PassResult`.
* `structure`: what the pass manager checks: the module is well formed, types and shapes are as
  inferred, inputs and outputs are kept, `changed` is true, preserved analyses are. And that the
  free dimensions of the inputs stay free, unless an assumption says otherwise.
* `weights`: no weight is written into, and one of unchanged content stays the same object.
* `outputs`: the module computes the same, as the contract has it.
* `noise`: of a lossy pass, the outputs move no more than by the stated change of the weights.
* `repetition`: a second run on an equal module gives the same result.
* `names`: the result does not depend on what nodes and values are called.
* `idempotence`: a run on its own result changes nothing, or `changes_again` says why.
* `round trip`: the result survives being written and read.
* `cost`: what the pass says it never increases does not increase.
"""

_NOISE_FEEDS = 2
_NOISE_MARGIN = 3.0
"""An output may move this many times as far as under the stated noise: it is drawn a few times,
and rounding errors are less alike than the draws."""

_WIDE = 4.0
"""Before a report, this many times the stated noise is drawn. What a few draws seldom do, and the
pass may do, shows there: an element that becomes or ceases to be finite, or an output that moves
out of proportion, since a condition turns."""

_SKEW = 5.0
"""Next to a pole, too, a few elements move far, under the noise and in the pass. Where the root
mean square is more than this many times the median (1.5 of normal numbers), the tenth of the
elements that moves farthest tells nothing."""


class ContractViolation(VerificationError):
    """A pass broke a clause of its contract.

    Attributes:
        clause: Which one.
        rewrites: The rewrites of the run that broke it, by rule.
    """

    def __init__(self, clause: Clause, message: str, rewrites: Mapping[str, int]) -> None:
        super().__init__(message)
        self.clause: Clause = clause
        self.rewrites = dict(rewrites)


@dataclass(frozen=True)
class ContractSettings:
    """How to check.

    Attributes:
        feeds: What is known of the inputs, and what the contract's assumptions ask of them.
        granted: Assumptions to grant; see `PassContext`. With none granted the pass must do
            without, or refuse.
        seed: Seed of feeds and names.
        thorough: Tells from the rewrites of a run whether the clauses that run the pass again
            (`repetition`, `names`, `idempotence`, `round trip`, `cost`) are checked too.
        limit: Seconds for one run of the module where it has loops; one that needs more is
            malformed.
    """

    feeds: FeedSpec = field(default_factory=FeedSpec)
    granted: frozenset[str] = frozenset()
    seed: int = 0
    thorough: Callable[[Mapping[str, int]], bool] = lambda rewrites: True
    limit: float = LOOP_SECONDS


@dataclass(frozen=True)
class ContractOutcome:
    """What a check that found no violation did.

    Attributes:
        changed: Whether the pass changed the module.
        refused: Why the pass refused, or None.
        record: What the pass did, unless it refused.
        feeds: Feeds compared.
        float64: Whether they were compared in float64 too.
        skipped: Why the outputs of a changed module were not compared, or None.
    """

    changed: bool = False
    refused: str | None = None
    record: PassRecord | None = None
    feeds: int = 0
    float64: bool = False
    skipped: str | None = None


def check_contract(
    pass_: Pass, module: Module, settings: ContractSettings | None = None
) -> ContractOutcome:
    """Run a pass on copies of a module and check every clause of its contract.

    Args:
        pass_: The pass.
        module: A well-formed module; it is not changed.
        settings: How to check.

    Raises:
        ContractViolation: The pass broke a clause.
        LwcError: The module is malformed, or does not run.
    """
    return _Check(pass_, module, settings or ContractSettings()).run()


class _Check:
    def __init__(self, pass_: Pass, module: Module, settings: ContractSettings) -> None:
        self.pass_ = pass_
        self.module = module
        self.settings = settings
        self.rewrites: dict[str, int] = {}
        self.applied = False
        self.comparer = Comparer(
            seed=settings.seed,
            spec=settings.feeds,
            threads=1,
            limit=settings.limit,
        )

    def run(self) -> ContractOutcome:
        """Check every clause; a result that cannot be serialized is malformed."""
        try:
            return self._run()
        except LwcError:
            raise
        except Exception as error:
            if not self.applied:
                raise
            self._fail("structure", f"its result breaks lwc: {type(error).__name__}: {error}")
            raise

    def _run(self) -> ContractOutcome:
        module = self.module
        random = next(filter(is_random, module.nodes()), None)
        deterministic = random is None
        if deterministic:
            self.comparer.prime(module)
        digests = _digests(module)
        after = module.clone()
        try:
            record = self._apply(after, module)
        finally:
            # Whatever else is wrong: the reference of every other check may be spoilt.
            if _digests(module) != digests:
                self._fail("weights", "it writes into a weight that other modules share")
        self.applied = True
        if isinstance(record, str):
            return ContractOutcome(refused=record)
        if not record.changed:
            return ContractOutcome(record=record)
        self._check_untouched_weights(after)
        self._check_free_dimensions(after)
        outcome = ContractOutcome(changed=True, record=record)
        if random is None:
            outcome = self._check_outputs(after, outcome)
        else:
            outcome = replace(outcome, skipped=f"{describe(random)} draws random numbers")
        if not self.settings.thorough(record.rewrites):
            return outcome
        self._check_repetition(after)
        self._check_names(after)
        self._check_idempotence(after)
        self._check_cost(after)
        if deterministic:
            self._check_round_trip(after)
        return outcome

    def _fail(self, clause: Clause, message: str) -> None:
        raise ContractViolation(clause, message, self.rewrites)

    # Running

    def _apply(self, module: Module, before: Module, *, again: bool = False) -> PassRecord | str:
        """Run the pass under the manager; return what it did, or why it refused.

        A run that only repeats another (`again`) is not verified a second time.
        """
        limit = RewriteLimit(record=True)
        ctx = PassContext(
            AnalysisManager(module),
            make_runner=make_runner,
            seed=self.settings.seed,
            granted=self.settings.granted,
            limit=limit,
        )
        try:
            manager = PassManager(
                [self.pass_], verify="none" if again else "structural", rollback=not again
            )
            record = manager.run(module, ctx).passes[0]
        except VerificationError as error:
            self.rewrites = _by_rule(limit)
            raise ContractViolation("structure", error.message, self.rewrites) from error
        except LwcError as error:
            cause = error.__cause__
            if isinstance(error, PassError) and cause and not isinstance(cause, LwcError):
                raise ContractViolation("crash", error.message, _by_rule(limit)) from error
            return error.message
        except Exception as error:
            raise ContractViolation(
                "crash", f"{type(error).__name__}: {error}", self.rewrites
            ) from error
        if not again:
            self.rewrites = dict(record.rewrites)
        return record

    # Clauses

    def _check_untouched_weights(self, after: Module) -> None:
        kept = {value.name: value.const_value for _, value in after.initializers()}
        for _, value in self.module.initializers():
            old, new = value.const_value, kept.get(value.name)
            if old is None or new is None or old is new:
                continue
            if _digest(old) == _digest(new):
                self._fail(
                    "weights", f"it makes a new tensor of '{value.name}', which is unchanged"
                )

    def _check_free_dimensions(self, after: Module) -> None:
        """Look at extents that callers may feed no longer: the outputs at the others may agree."""
        if self.pass_.contract.assumptions or not self.pass_.keeps_interface:
            return
        for name, extent in fixed_dims(self.module, after).items():
            self._fail(
                "structure",
                f"its inputs bind '{name}' to {extent}, which no assumption of its contract says",
            )

    def _check_outputs(self, after: Module, outcome: ContractOutcome) -> ContractOutcome:
        contract = vouched(self.pass_.contract, self.settings.granted)
        feeds, expected = self.comparer.last
        try:
            report = self.comparer(self.module, after, contract)
        except VerificationError as error:
            raise ContractViolation("outputs", error.message, self.rewrites) from error
        if isinstance(contract, Lossy) and contract.noise is not None:
            self._check_noise(feeds, expected, contract.noise)
        return replace(outcome, feeds=report.feeds, float64=report.float64)

    def _check_noise(
        self, feeds: list[TestFeed], expected: list[dict[str, Array]], noise: float
    ) -> None:
        """Compare how far outputs moved with how far the stated noise moves them."""
        _, results = self.comparer.last
        prepared = functools.partial(compiled, limit=self.comparer.limit)

        def movements(feed: TestFeed, wanted: dict[str, Array], size: float) -> Mapping[str, Array]:
            return Sensitivity.measure(
                self.module, feed.arrays, wanted, prepared, size=size, results=size, twice=False
            ).movement

        # Each feed takes a model per draw; the first is plain, at odd extents.
        for feed, wanted, result in list(zip(feeds, expected, results, strict=True))[:_NOISE_FEEDS]:
            for name, movement in movements(feed, wanted, noise).items():
                error = distance(wanted[name], result[name])
                burst = bool(np.any(np.isinf(error) & np.isfinite(movement)))
                finite = np.isfinite(error) & np.isfinite(movement)
                far, usual = root_mean_square(error[finite]), root_mean_square(movement[finite])
                least = 1e-5 * usual_size(wanted[name])
                if not burst and far <= _NOISE_MARGIN * usual + least:
                    continue
                wide = movements(feed, wanted, _WIDE * noise)[name]
                if burst and np.all(np.isfinite(wide)):
                    self._fail("noise", f"output '{name}' becomes or ceases to be finite")
                if _is_skewed(movement[finite]):
                    far, usual = _without_largest(error[finite]), _without_largest(movement[finite])
                jump = root_mean_square(wide[np.isfinite(wide)])
                usual = jump if jump > 2.0 * _WIDE * usual else usual
                if far > _NOISE_MARGIN * usual + least:
                    self._fail(
                        "noise",
                        f"output '{name}' moves by {far:.3g} (root mean square); a relative "
                        f"change of {noise:g} in every weight moves it by {usual:.3g}",
                    )

    def _check_repetition(self, after: Module) -> None:
        again = self.module.clone()
        self._apply(again, self.module, again=True)
        if _serialized(again) != _serialized(after):
            self._fail("repetition", "a second run on an equal module gives another result")

    def _check_names(self, after: Module) -> None:
        other = renamed(self.module, self.settings.seed)
        self._apply(other, self.module, again=True)
        if structure(other) != structure(after):
            self._fail("names", "the result depends on the names of nodes or values")

    def _check_idempotence(self, after: Module) -> None:
        if self.pass_.changes_again is not None:
            return
        again = after.clone()
        record = self._apply(again, after, again=True)
        if not isinstance(record, str) and record.changed:
            rules = ", ".join(record.rewrites) or "it names no rule"
            self._fail("idempotence", f"a second run on its own result changes it again ({rules})")

    def _check_cost(self, after: Module) -> None:
        for measure in sorted(self.pass_.never_more):
            before, now = _MEASURES[measure](self.module), _MEASURES[measure](after)
            if before is not None and now is not None and now > before:
                self._fail("cost", f"{measure} grow from {before:g} to {now:g}")

    def _check_round_trip(self, after: Module) -> None:
        from lwc.frontend.onnx_reader import from_proto

        feeds, results = self.comparer.last
        try:
            back = from_proto(ir.to_proto(after.model))
            with compiled(back, limit=self.comparer.limit) as runner:
                again = runner.run(fitted(feeds[0].arrays, back))
        except LwcError as error:
            raise ContractViolation(
                "round trip", f"read back, the result does not run: {error.message}", self.rewrites
            ) from error
        for name, array in results[0].items():
            same = name in again and np.array_equal(again[name], array, equal_nan=_is_float(array))
            if not same:
                self._fail("round trip", f"written and read back, output '{name}' is another")


def _by_rule(limit: RewriteLimit) -> dict[str, int]:
    return dict(Counter(step.rule for step in limit.steps))


def _digest(tensor: ir.TensorProtocol) -> str:
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist())
    head = f"{tensor.dtype} {tuple(tensor.shape)} "
    return head + hashlib.sha1(tensor.tobytes()).hexdigest()


def _digests(module: Module) -> list[str]:
    """Digest every weight, in initializers and Constant nodes."""
    tensors = [value.const_value for _, value in module.initializers()]
    tensors += [
        constant_tensor(node.outputs[0]) for node in module.nodes() if node.op_type == "Constant"
    ]
    return [_digest(tensor) for tensor in tensors if tensor is not None]


def _serialized(module: Module) -> bytes:
    content: bytes = ir.to_proto(module.model).SerializeToString(deterministic=True)
    return content


def _is_skewed(movement: Array) -> bool:
    return root_mean_square(movement) > _SKEW * float(np.median(movement))


def _without_largest(array: Array) -> float:
    """Return the root mean square of all but the largest tenth of the elements, at least one."""
    kept = np.sort(array, axis=None)[: array.size - max(1, array.size // 10)]
    return root_mean_square(kept)


def _is_float(array: Array) -> bool:
    return np.asarray(array).dtype.kind == "f"


def _nodes(module: Module) -> float | None:
    return take_snapshot(module).nodes


def _parameter_bytes(module: Module) -> float | None:
    return take_snapshot(module).parameter_bytes


def _flops(module: Module) -> float | None:
    """Return the FLOPs at an extent of 64 for every name; None where an operator has no rule."""
    from lwc.analysis.cost import Cost
    from lwc.core.dims import bind

    cost = AnalysisManager(module).get(Cost)
    flops = cost.total.flops
    if cost.uncounted:
        return None
    if isinstance(flops, int):
        return flops
    bound = bind(flops, {symbol.name: 64 for symbol in flops.free_symbols})
    return float(bound)


_MEASURES: dict[str, Callable[[Module], float | None]] = {
    "nodes": _nodes,
    "flops": _flops,
    "parameter-bytes": _parameter_bytes,
}
