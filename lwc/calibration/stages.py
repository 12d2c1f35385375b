"""Calibration data going through a model in stages, with weights replaced in between."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.calibration.collect import (
    check_any,
    check_finite,
    check_rows,
    checked_feeds,
    has_rows,
    on_feed,
)
from lwc.calibration.inputs import fed_inputs
from lwc.core.module import Module
from lwc.core.walk import values_read

if TYPE_CHECKING:
    from lwc.pipeline.passes import Feed, PassContext

__all__ = ["Stages", "between", "data_values", "filed", "leading_to", "varying"]

Array = np.ndarray[Any, Any]


class Stages:
    """Brings calibration data to one value of a model after the other.

    A node runs once per feed. What later nodes read of it is kept for all feeds, so that it stays
    as it was computed when weights are replaced, and what comes after sees the new ones. Nodes that
    no input reaches are constants, and run with whatever reads them.

    Args:
        module: The model; only the contents of initializers may change while this is in use.
        stops: Values of the main graph, in an order in which they can be computed.
        ctx: Gives the feeds and the runner. Where it bounds memory, what is kept lies in files
            without a name.

    Raises:
        UsageError: There is no calibration data.
        InputError: The data has no feeds, or one that does not fit the model's inputs.
    """

    def __init__(self, module: Module, stops: Sequence[ir.Value], ctx: PassContext) -> None:
        self._module = module
        self._ctx = ctx
        self._pending = set(stops)
        self._put = filed if ctx.max_memory is not None else lambda array: array
        self._kept = [self._given(feed) for feed in checked_feeds(module, ctx)]
        check_any(len(self._kept), module)
        self._varying = varying(module, self._kept[0])
        self._waiting = leading_to(module, stops, self._varying, self._kept[0])

    def _given(self, feed: Feed) -> dict[ir.Value, Array]:
        inputs = {value.name: value for value in self._module.graph.inputs}
        return {inputs[name]: self._put(array) for name, array in feed.items()}

    @property
    def feeds(self) -> int:
        """Number of feeds."""
        return len(self._kept)

    def fed(self) -> Iterator[dict[str, Array]]:
        """Yield the feeds; only before the first stop is asked for."""
        for kept in self._kept:
            yield {value.name or "": array for value, array in kept.items()}

    def activations(self, stop: ir.Value) -> Iterator[Array]:
        """Yield one of the stops for each feed, computed with the weights as they are now.

        All of them must be taken before the next stop is asked for.

        Raises:
            InputError: One is not finite, or none of them has a row.
            LwcError: The backend cannot run the nodes before it.
        """
        name = stop.name or ""
        seen = False
        for count, array in enumerate(self._reached(stop), 1):
            check_finite(array, name, count, self._module)
            seen = seen or has_rows(array)
            yield array
        check_rows([name], [name] if seen else [], self._module)

    def _reached(self, stop: ir.Value) -> Iterator[Array]:
        name = stop.name or ""
        ahead = leading_to(self._module, [stop], self._varying, self._kept[0])
        running = set(ahead)
        self._waiting = [node for node in self._waiting if node not in running]
        self._pending.discard(stop)
        later = {value for node in self._waiting for value in values_read(node)} | self._pending
        made = [v for node in ahead for v in node.outputs if v in later or v is stop]
        if not ahead:
            yield from (kept[stop] for kept in self._kept)
            return
        given = sorted(
            {value for node in ahead for value in values_read(node)} & set(self._kept[0]),
            key=lambda value: value.name or "",
        )
        stage = between(self._module, {v: self._kept[0][v] for v in given}, made)
        names = [value.name or "" for value in made]
        with self._ctx.runner(stage) as runner:
            for count, kept in enumerate(self._kept, 1):
                with on_feed(count):
                    results = runner.run({v.name or "": kept[v] for v in given}, names)
                for value in [value for value in kept if value not in later]:
                    del kept[value]
                for value in later.intersection(made):
                    kept[value] = self._put(results[value.name or ""])
                yield results[name]

    def divide(self, value: ir.Value, factors: Array) -> None:
        """Divide the channels of a value that is kept, as a change before it would have done."""
        for kept in self._kept:
            if value in kept:
                kept[value] = self._put((kept[value] / factors).astype(kept[value].dtype))


def data_values(module: Module) -> set[ir.Value]:
    """Return the values of the main graph that calibration data decides about.

    Those of inputs with defaults are none: data need not have them.
    """
    return varying(module, fed_inputs(module))


def varying(module: Module, fed: Container[ir.Value]) -> set[ir.Value]:
    """Return the values of the main graph that depend on what is fed."""
    found = {value for value in module.graph.inputs if value in fed}
    for node in module.graph:
        if any(value in found for value in values_read(node)):
            found.update(node.outputs)
    return found


def leading_to(
    module: Module,
    values: Iterable[ir.Value],
    reached: Container[ir.Value],
    known: Container[ir.Value] = (),
) -> list[ir.Node]:
    """Return the nodes that have to run for some values, in the order of the graph.

    Args:
        module: The model.
        values: Values of the main graph.
        reached: Values that depend on what is fed; what makes others is left out.
        known: Values that are there already.
    """
    found: set[ir.Node] = set()
    unknown = list(values)
    while unknown:
        value = unknown.pop()
        node = value.producer()
        if node is None or node in found or value in known or value not in reached:
            continue
        found.add(node)
        unknown.extend(values_read(node))
    return [node for node in module.graph if node in found]


def between(module: Module, given: dict[ir.Value, Array], made: Sequence[ir.Value]) -> Module:
    """Return a module of the nodes between some values and others."""
    graph = ir.convenience.extract(module.graph, list(given), list(made))
    for value, array in zip(graph.inputs, given.values(), strict=True):
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape([f"{value.name}_{axis}" for axis in range(array.ndim)])
    stage = Module(
        ir.Model(
            graph,
            ir_version=module.model.ir_version,
            functions=list(module.model.functions.values()),
        ),
        source=module.source,
    )
    for value in graph.outputs:
        value.shape = None
    return stage


_SPILLED = 1 << 16
"""Bytes from which an array is kept in a file, where memory is bounded."""


def filed(array: Array) -> Array:
    """Return the array mapped from a file without a name, which goes when nothing maps it."""
    if array.nbytes < _SPILLED:
        return array
    with tempfile.TemporaryFile() as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)
