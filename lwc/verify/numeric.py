"""Numeric verification: run a module before and after a pass on the same feeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.backends.onnxruntime.session import OnnxRuntimeBackend, OnnxRuntimeExecutable
from lwc.calibration.feeds import FeedSpec, dim_names, fixed_dims, make_feed, working_feeds
from lwc.calibration.inputs import fed_inputs
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, VerificationError
from lwc.core.walk import attribute_graphs, is_default_domain, is_random
from lwc.pipeline.passes import Approximate, Contract, Exact, Lossy

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["NumericReport", "OutputError", "compare", "depth", "exact_rtol"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutputError:
    """How far one output is off on one feed.

    Attributes:
        output: Name of the output.
        shapes: Shapes of the feed, by input.
        max_error: Largest absolute difference.
        excess: Largest ratio of a difference to its bound; up to 1 is within bounds.
        index: Where `excess` is reached.
        expected: The element there before.
        result: The element there after.
    """

    output: str
    shapes: dict[str, tuple[int, ...]]
    max_error: float
    excess: float
    index: tuple[int, ...]
    expected: float
    result: float


@dataclass(frozen=True)
class NumericReport:
    """What a comparison found.

    Attributes:
        errors: For each feed and output.
        rtol: Bound relative to an element and to its output's root mean square together.
        atol: Absolute bound added to it.
        feeds: Feeds compared, each at other extents of the free dimensions.
        skipped: Why nothing was compared, or None.
    """

    errors: tuple[OutputError, ...] = ()
    rtol: float = 0.0
    atol: float = 0.0
    feeds: int = 0
    skipped: str | None = None

    @property
    def worst(self) -> OutputError | None:
        """The output that comes nearest its bound or passes it, or None."""
        return max(self.errors, key=lambda one: (one.excess, one.max_error), default=None)


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
) -> NumericReport:
    """Run both modules on random feeds and check that the outputs differ as little as promised.

    Both run on ONNX Runtime with its graph optimisations off, at two settings at least of the
    free dimensions (one where there are none, or where the model runs at one only). An element
    `y` of an output with root mean square `s` may be off by `atol + rtol·(|y| + s)`:

    * `Exact`: rtol is `exact_rtol`, a bound on rounding that grows with the root of the depth;
      atol is that of a single operator, for outputs of saturating functions. Integer and boolean
      outputs must be equal.
    * `Approximate`: the contract's bounds on top of that.
    * `Lossy`: nothing is promised; errors are only reported, over the bound of `Exact`.

    NaN and infinities must stay where they are.

    Args:
        before: The reference.
        after: What a pass made of it. Dimensions it fixed are fixed in the feeds.
        contract: What the pass promises; `Exact()` by default.
        bindings: Extents of the free dimensions, one mapping per feed; found by trial by default.
        rtol: Replaces the relative bound.
        atol: Replaces the absolute bound.
        seed: Seed of the feeds.
        spec: What the user knows about the inputs.
        threads: Threads of one operator.

    Raises:
        VerificationError: An output is off by more than its bound, is missing, has another shape
            or type, or `after` does not run where `before` does.
        LwcError: `before` does not run.
    """
    contract = contract or Exact()
    random = _random_node(before)
    if random is not None:
        return NumericReport(skipped=f"{describe(random)} draws random numbers")
    promised = _bounds(contract, before, after)
    bounds = (promised[0] if rtol is None else rtol, promised[1] if atol is None else atol)
    spec = spec or FeedSpec()
    dims, known = {**spec.dims, **fixed_dims(before, after)}, dim_names(before)
    spec = replace(spec, dims={name: extent for name, extent in dims.items() if name in known})
    errors = []
    with _compiled(before, threads) as reference:
        if bindings:
            feeds = [
                make_feed(before, at, seed + index, spec=spec) for index, at in enumerate(bindings)
            ]
        else:
            feeds = working_feeds(before, reference, 2, seed, spec=spec)
        expected = [reference.run(feed) for feed in feeds]
    try:
        with _compiled(after, threads) as candidate:
            results = [candidate.run(_fitted(feed, after)) for feed in feeds]
    except LwcError as error:
        raise VerificationError(
            f"the module ran before the pass and does not run after it: {error.message}",
            node=error.node,
        ) from error
    for feed, wanted, result in zip(feeds, expected, results, strict=True):
        shapes = {name: np.shape(array) for name, array in feed.items()}
        for name, array in wanted.items():
            if name not in result:
                raise VerificationError(f"output '{name}' is gone after the pass")
            errors.append(_difference(name, shapes, array, result[name], bounds))
    report = NumericReport(tuple(errors), *bounds, len(feeds))
    worst = report.worst
    if worst is not None and worst.excess > 1 and not isinstance(contract, Lossy):
        raise VerificationError(_complaint(worst, report))
    return report


def exact_rtol(module: Module) -> float:
    """Bound the relative rounding error between two orders of one module's arithmetic.

    Roundings along a chain of `depth` operators are taken as independent, so that they add up as
    a random walk: `c · eps · sqrt(depth)` with the machine epsilon of the coarsest floating-point
    type computed in (Higham and Mary, "A new approach to probabilistic rounding error analysis",
    2019). The factor is 16 in float32, where it covers the length of sums within one operator
    (on fifteen exporters' files ONNX Runtime's own optimisations need 2), and 2 in the 16-bit
    types, whose sums are taken in float32 and rounded once.
    """
    return _rounding(module) * math.sqrt(max(1, depth(module)))


def depth(module: Module) -> int:
    """Count the operators on the longest path of the main graph, bodies of subgraphs included."""
    return _depth(module.graph)


def _depth(graph: ir.Graph) -> int:
    levels: dict[ir.Value | None, int] = {}
    deepest = 0
    for node in graph:
        inner = max((_depth(body) for body in attribute_graphs(node)), default=0)
        level = 1 + inner + max((levels.get(value, 0) for value in node.inputs), default=0)
        levels.update(dict.fromkeys(node.outputs, level))
        deepest = max(deepest, level)
    return deepest


_ROUNDING = {ir.DataType.BFLOAT16: 2 * 2.0**-7, ir.DataType.FLOAT16: 2 * 2.0**-10}
_ROUNDING_FLOAT32 = 16 * 2.0**-23


def _rounding(module: Module) -> float:
    """Return `c · eps` of the coarsest type computed in; see `exact_rtol`."""
    types = {value.dtype for _, value in module.initializers()}
    types.update(value.dtype for value in module.graph.inputs)
    for node in module.nodes():
        types.update(output.dtype for output in node.outputs)
        if node.op_type == "Cast" and is_default_domain(node) and "to" in node.attributes:
            types.add(ir.DataType(node.attributes.get_int("to", 1)))
    return next((size for kind, size in _ROUNDING.items() if kind in types), _ROUNDING_FLOAT32)


def _bounds(contract: Contract, before: Module, after: Module) -> tuple[float, float]:
    """Return the relative and absolute bound of an element."""
    rtol = max(exact_rtol(before), exact_rtol(after))
    atol = max(_rounding(before), _rounding(after))
    if isinstance(contract, Approximate):
        return contract.rtol + rtol, contract.atol + atol
    return rtol, atol


def _difference(
    name: str,
    shapes: dict[str, tuple[int, ...]],
    expected: Array,
    result: Array,
    bounds: tuple[float, float],
) -> OutputError:
    expected, result = np.asarray(expected), np.asarray(result)
    if expected.shape != result.shape:
        raise VerificationError(
            f"output '{name}' had shape {list(expected.shape)} before the pass and has "
            f"{list(result.shape)} after it, with {_shown(shapes)}"
        )
    if not expected.size:
        return OutputError(name, shapes, 0.0, 0.0, (), math.nan, math.nan)
    if expected.dtype.kind in "OUS":
        wanted, found = np.zeros(expected.shape), (expected != result).astype(np.float64)
        rtol = atol = 0.0
    else:
        wanted, found = expected.astype(np.float64), result.astype(np.float64)
        rtol, atol = bounds
        if expected.dtype.kind in "iub":
            rtol = 0.0
    error = _absolute_error(wanted, found)
    if expected.dtype.kind in "iu":
        # Neighbours above 2**53 are one number in float64.
        error = np.maximum(error, expected != result)
    excess = _excess(error, wanted, rtol, atol)
    index = np.unravel_index(int(excess.argmax()), expected.shape)
    return OutputError(
        name,
        shapes,
        float(error.max()),
        float(excess[index]),
        tuple(int(i) for i in index),
        float(wanted[index]),
        float(found[index]),
    )


def _absolute_error(wanted: Array, found: Array) -> Array:
    """Return |wanted - found|; infinite where just one is finite or they are not the same."""
    with np.errstate(invalid="ignore"):
        error: Array = np.asarray(np.abs(wanted - found))  # of scalars NumPy returns no array
    error[(wanted == found) | (np.isnan(wanted) & np.isnan(found))] = 0.0
    error[np.isnan(error)] = math.inf
    return error


def _excess(error: Array, wanted: Array, rtol: float, atol: float) -> Array:
    """Return the ratio of each error to its bound."""
    finite = np.isfinite(wanted)
    size = np.abs(np.where(finite, wanted, 0.0))
    scale = math.sqrt(float(np.mean(np.square(size[finite])))) if finite.any() else 0.0
    bound = atol + rtol * (size + scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess: Array = np.where(error > 0, error / bound, 0.0)
    return excess


def _complaint(worst: OutputError, report: NumericReport) -> str:
    return (
        f"output '{worst.output}' is {worst.result:.6g} at {list(worst.index)} after the pass and "
        f"was {worst.expected:.6g} before: {worst.excess:.3g} times its bound "
        f"(rtol {report.rtol:.2g}, atol {report.atol:.2g}), with {_shown(worst.shapes)}"
    )


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _random_node(module: Module) -> ir.Node | None:
    return next(filter(is_random, module.nodes()), None)


def _fitted(feed: Mapping[str, Array], module: Module) -> dict[str, Array]:
    """Give each input of `module` its array, in the element type it wants."""
    fitted = {}
    for value in fed_inputs(module):
        name = value.name or ""
        if name in feed:
            fitted[name] = feed[name]
            if value.dtype is not None and value.dtype != ir.DataType.STRING:
                fitted[name] = feed[name].astype(value.dtype.numpy(), copy=False)
    return fitted


def _compiled(module: Module, threads: int | None) -> OnnxRuntimeExecutable:
    return OnnxRuntimeBackend().compile(module, threads=threads, optimize="none")
