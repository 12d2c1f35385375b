"""What the values of a module are: types and symbolic shapes by inference, contents by a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.trials import working_feeds
from lwc.core.dims import Dim, DimShape, symbol
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.walk import attribute_graphs, graph_and_subgraphs, is_random
from lwc.pipeline.passes import Feed

__all__ = ["Observation", "Observed", "observe"]

_SMALL = 64
"""Elements up to which any content is kept: shapes, axes, indices, scalars."""

_CONSTANT = 1 << 16
"""Elements up to which content computed from weights alone is kept."""

_NUMPY_LACKS = {
    ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ, ir.DataType.FLOAT8E8M0,
    ir.DataType.FLOAT4E2M1, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2,
    ir.DataType.UINT2,
}  # fmt: skip
"""Element types that ONNX Runtime does not hand out as arrays."""


@dataclass(frozen=True)
class Observation:
    """What is known of one value.

    Attributes:
        type: Its type, or None.
        shape: Its extents, symbols of the model's dimensions among them, or None.
        content: What it held in the observed run, where that is small; one tensor object for all
            who use it.
        depends: Names of the dimensions that `content` depends on; None if on anything in the
            feed.
    """

    type: ir.TypeProtocol | None
    shape: DimShape | None = None
    content: ir.TensorProtocol | None = None
    depends: frozenset[str] | None = frozenset()


@dataclass(frozen=True)
class Observed:
    """What is known of the values of a module.

    Attributes:
        values: By name; where values of sibling bodies share a name, the last of them.
        extents: What each dimension was in the observed run, by name.
        feed: What the module was run on.
        failure: Why the module could not be run, or None. Then only inference speaks.
    """

    values: Mapping[str, Observation] = field(default_factory=dict)
    extents: Mapping[str, int] = field(default_factory=dict)
    feed: Feed = field(default_factory=dict)
    failure: str | None = None

    def of(self, value: ir.Value) -> Observation:
        """Return what is known of a value, by its name; what it declares where nothing is."""
        found = self.values.get(value.name or "")
        return Observation(value.type) if found is None else found


def observe(module: Module, *, seed: int = 0, threads: int | None = None) -> Observed:
    """Infer the types and shapes of all values, and run the module once for their contents.

    Dimensions keep their names. One that only inference invented gets a name of its own, so that
    two values share it exactly where their extents are provably equal.

    Args:
        module: The module; it is not changed.
        seed: Seed of the feed.
        threads: Threads of one operator.
    """
    return _Observer(module).observe(seed, threads)


class _Observer:
    def __init__(self, module: Module) -> None:
        self.module = module
        self.shapes = Shapes.build(module)
        self.names: dict[Any, Any] = {}
        self.taken = set(re.findall(r"\w+", " ".join(_dim_texts(module))))
        self.fixed = _weights_only(module)

    def observe(self, seed: int, threads: int | None) -> Observed:
        feed: Feed = {}
        arrays: dict[str, Any] = {}
        failure = None
        exposed = [v.name for v in self._main() if v.name and self._exposable(v)]
        try:
            with OnnxRuntimeBackend().compile(
                self.module, threads=threads, expose=exposed, optimize="none"
            ) as executable:
                feed = working_feeds(self.module, executable, 1, seed)[0]
                # ONNX Runtime takes no names for all names.
                arrays = {**(executable.run(feed, exposed) if exposed else {}), **feed}
        except LwcError as error:
            failure = str(error)
        extents: dict[str, int] = {}
        values: dict[str, Observation] = {}
        for graph in reversed(list(graph_and_subgraphs(self.module.graph))):
            main = graph is self.module.graph
            for value in _values(graph):
                if value.name:
                    array = arrays.get(value.name) if main else None
                    values[value.name] = self._observation(value, array, extents)
        return Observed(values, extents, feed, failure)

    def _main(self) -> Iterator[ir.Value]:
        for node in self.module.graph:
            yield from node.outputs

    def _exposable(self, value: ir.Value) -> bool:
        fact = self.shapes.fact(value)
        return fact.element is None and fact.dtype not in _NUMPY_LACKS

    def _observation(self, value: ir.Value, array: object, extents: dict[str, int]) -> Observation:
        fact = self.shapes.fact(value)
        if fact.element is not None or (array is not None and not isinstance(array, np.ndarray)):
            return Observation(value.type)
        kind: ir.TypeProtocol | None = value.type
        if fact.dtype is not None:
            kind = ir.TensorType(fact.dtype)
        elif kind is None and array is not None and array.dtype.kind != "O":
            kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        shape = None if fact.shape is None else tuple(map(self._named, fact.shape))
        if array is None:
            return Observation(kind, shape, *self._inferred(value))
        if shape is None or len(shape) != array.ndim:
            shape = tuple(self._new_symbol(f"{value.name}_dim{a}") for a in range(array.ndim))
        for dim, size in zip(shape, array.shape, strict=True):
            if not isinstance(dim, int) and dim.is_Symbol:
                extents.setdefault(dim.name, size)
        fixed = value in self.fixed
        if array.size > (_CONSTANT if fixed else _SMALL) or array.dtype.kind in "OUS":
            return Observation(kind, shape)
        content = ir.Tensor(np.array(array), name=value.name)
        return Observation(kind, shape, content, frozenset() if fixed else self._depends(value))

    def _inferred(self, value: ir.Value) -> tuple[ir.TensorProtocol | None, frozenset[str]]:
        """Return content that inference alone is sure of."""
        known, dtype = self.shapes.known(value), self.shapes.dtype(value)
        if known is None or dtype is None or value.producer() is None:
            return None, frozenset()
        if not all(isinstance(element, int | float | bool) for element in known.flat):
            return None, frozenset()
        return ir.Tensor(known.astype(dtype.numpy()), name=value.name), frozenset()

    def _depends(self, value: ir.Value) -> frozenset[str] | None:
        known = self.shapes.known(value)
        if known is None:
            return None
        names: set[str] = set()
        for element in known.flat:
            if isinstance(element, int | float | bool):
                continue
            if any(self.shapes.is_unknown(free) for free in element.free_symbols):
                return None
            named = self._named(element)
            names.update(() if isinstance(named, int) else (s.name for s in named.free_symbols))
        return frozenset(names)

    def _named(self, dim: Dim) -> Dim:
        """Replace the symbols that inference made by named ones."""
        if isinstance(dim, int):
            return dim
        fresh = [s for s in dim.free_symbols if self.shapes.mentions_fresh(s)]
        for each in sorted(fresh, key=lambda s: int(re.sub(r"\D", "", s.name) or 0)):
            if each not in self.names:
                number = re.sub(r"\D", "", each.name)
                self.names[each] = self._new_symbol(f"dim{number}")
        return dim.subs({s: self.names[s] for s in fresh}) if fresh else dim

    def _new_symbol(self, name: str) -> Dim:
        name = re.sub(r"\W", "_", name)
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return symbol(name)


def _dim_texts(module: Module) -> Iterator[str]:
    for value in module.graph.inputs:
        yield from (d.value or "" for d in value.shape or () if not isinstance(d, int))
        yield from (f"{value.name}_dim{axis}" for axis in range(len(value.shape or ())))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _weights_only(module: Module) -> set[ir.Value]:
    """Return the values of the main graph that no feed can change."""
    found = {v for v in module.graph.initializers.values() if not v.is_graph_input()}
    for node in module.graph:
        inner = [deep for g in _bodies(node) for deep in g]
        if any(map(is_random, (node, *inner))):
            continue
        used: Sequence[ir.Value | None] = [v for n in (node, *inner) for v in n.inputs]
        if all(v is None or v in found or v.graph is not module.graph for v in used):
            found.update(node.outputs)
    return found


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for body in attribute_graphs(node):
        yield from graph_and_subgraphs(body)
