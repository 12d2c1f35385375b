"""Is a made-up graph a valid one? What generators ask before they hand one out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lwc.analysis.shapes import Shapes
from lwc.calibration.feeds import dim_names, make_feed
from lwc.core.dims import Dim, DimShape
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.walk import graph_and_subgraphs
from lwc.verify.structure.well_formed import verify_structure

__all__ = ["is_valid", "restate", "runs", "stated_shape"]

_EXTENTS = ((2, 3, 4, 5, 7), (1, 1, 1, 1, 1), (5, 7, 2, 3, 4))
"""Extents of the free dimensions: different ones, so that no two agree by accident, and 1."""


def restate(module: Module) -> Shapes:
    """Give every value of the main graph the type and shape that inference finds.

    A graph that was changed states what held before. Values of subgraphs lose their shapes.
    Extents that are no plain name of an input's dimension are left open.
    """
    for value in _values(module):
        value.shape = None
    shapes = Shapes.build(module)
    for value in _values(module):
        fact = shapes.fact(value)
        if fact.dtype is not None:
            value.type = ir.TensorType(fact.dtype)
        elif fact.element is None:
            value.type = None
        if value.is_graph_output() and value.graph is module.graph:
            value.shape = stated_shape(module, shapes, value)
    return shapes


def stated_shape(module: Module, shapes: Shapes, value: ir.Value) -> ir.Shape | None:
    """Return the inferred shape as a graph states it, in the names of its inputs."""
    shape = shapes.shape(value)
    if shape is None:
        return None
    names = set(dim_names(module))

    def stated(dim: Dim) -> int | str | None:
        return dim if isinstance(dim, int) else str(dim) if str(dim) in names else None

    return ir.Shape([stated(dim) for dim in shape])


def is_valid(module: Module) -> bool:
    """Tell whether a module is well formed, its operators fit their inputs, and it runs.

    ONNX wants graph outputs of a known rank. A value without elements is none of ours: ONNX
    Runtime joins it with anything and leaves the result to chance.
    """
    try:
        verify_structure(module)
    except LwcError:
        return False
    shapes = Shapes.build(module)
    if shapes.misfits or any(shapes.rank(value) is None for value in module.graph.outputs):
        return False
    if any(_is_empty(shapes.shape(value)) for node in module.nodes() for value in node.outputs):
        return False
    return runs(module)


def _is_empty(shape: DimShape | None) -> bool:
    return shape is not None and any(isinstance(dim, int) and dim == 0 for dim in shape)


def runs(module: Module) -> bool:
    """Tell whether ONNX Runtime runs a module, as it is written, at several extents.

    Neither may an output be NaN: what such a graph computes is seldom worth comparing.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            ir.to_proto(module.model).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        for feed in _feeds(module):
            if any(map(_has_nan, _run(session, feed))):
                return False
    except LwcError:
        return False
    except Exception as error:
        if type(error).__module__.startswith(("onnxruntime.", "onnx_ir.")):
            return False
        raise
    return True


def _run(session: ort.InferenceSession, feed: dict[str, Any]) -> list[Any]:
    """Run a session, for a second at most: a loop may have lost what ends it."""
    settings = ort.RunOptions()
    timer = threading.Timer(1.0, setattr, (settings, "terminate", True))
    timer.start()
    try:
        return list(session.run(None, feed, settings))
    finally:
        timer.cancel()


def _has_nan(output: Any) -> bool:
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f":
        return False
    return bool(np.isnan(output).any())


def _feeds(module: Module) -> Iterator[dict[str, Any]]:
    names = list(dim_names(module))
    for extents in _EXTENTS if names else _EXTENTS[:1]:
        bound = {name: extents[i % len(extents)] for i, name in enumerate(names)}
        yield make_feed(module, bound)


def _values(module: Module) -> Iterator[ir.Value]:
    for graph in graph_and_subgraphs(module.graph):
        for node in graph:
            yield from node.outputs
