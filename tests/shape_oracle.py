"""What ONNX Runtime computes, beside what shape inference claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from support import plain_session

from lwc.analysis.shapes import Shapes
from lwc.core.dims import bind
from lwc.core.module import Module

Feed = Mapping[str, Any]


@dataclass
class Comparison:
    """Differences between claims and truth, and how much was claimed.

    Attributes:
        wrong: One line for each false claim.
        values: Number of values that the runtime produced.
        complete: Of these, how many had a wholly known shape and type.
        contents: How many had content that was compared.
    """

    wrong: list[str] = field(default_factory=list)
    values: int = 0
    complete: int = 0
    contents: int = 0


def run_everything(module: Module, shapes: Shapes, feed: Feed) -> dict[str, np.ndarray[Any, Any]]:
    """Run the main graph without optimisation and return each of its tensors by name."""
    proto = ir.to_proto(module.model)
    present = {value.name for value in proto.graph.output}
    for node in module.graph:
        for value in node.outputs:
            if not value.name or value.name in present:
                continue
            dtype = shapes.dtype(value)
            assert dtype is not None or shapes.fact(value).element is not None, value.name
            if dtype is not None:
                kind = onnx.helper.make_tensor_value_info(value.name, int(dtype), None)
                proto.graph.output.append(kind)
                present.add(value.name)
    session = plain_session(proto)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def compare(module: Module, feed: Feed) -> Comparison:
    """Bind the dimensions of the inputs to those of `feed` and check every claim."""
    shapes = Shapes.build(module)
    bindings: dict[str, int] = {}
    for value in module.graph.inputs:
        given = feed.get(value.name or "")
        if given is None:
            continue
        for dim, size in zip(shapes.shape(value) or (), given.shape, strict=True):
            if not isinstance(dim, int) and dim.is_Symbol:
                assert bindings.setdefault(dim.name, size) == size
    found = run_everything(module, shapes, feed)
    result = Comparison()
    for node in module.graph:
        for value in node.outputs:
            truth = found.get(value.name or "")
            if truth is not None and not isinstance(truth, list | dict):
                check(shapes, value, np.asarray(truth), bindings, result)
    return result


def check(
    shapes: Shapes,
    value: ir.Value,
    truth: np.ndarray[Any, Any],
    bindings: dict[str, int],
    result: Comparison,
) -> None:
    """Check what is claimed of one value against what it truly is."""
    node = value.producer()
    place = f"{node.op_type if node else '?'} {value.name}"
    result.values += 1
    dtype, claimed = shapes.dtype(value), shapes.shape(value)
    is_text = truth.dtype.kind in "OUS"
    if dtype is not None and not is_text and dtype.numpy() != truth.dtype:
        result.wrong.append(f"{place}: type {dtype}, truly {truth.dtype}")
    if claimed is None:
        return
    result.complete += dtype is not None and not any(map(shapes.mentions_fresh, claimed))
    if len(claimed) != truth.ndim:
        result.wrong.append(f"{place}: shape {claimed}, truly {truth.shape}")
        return
    for claim, size in zip(claimed, truth.shape, strict=True):
        if not _agrees(shapes, claim, size, bindings):
            result.wrong.append(f"{place}: shape {claimed}, truly {truth.shape} at {bindings}")
    known = shapes.known(value)
    if known is None:
        return
    result.contents += 1
    assert known.shape == truth.shape
    for claim, element in zip(known.flat, truth.ravel().tolist(), strict=True):
        if isinstance(claim, float) and isinstance(element, float):
            same = claim == element or (np.isnan(claim) and np.isnan(element))
            if not same:
                result.wrong.append(f"{place}: content {claim}, truly {element}")
        elif isinstance(claim, bool) or isinstance(element, bool):
            if isinstance(claim, bool) and claim is not element:
                result.wrong.append(f"{place}: content {claim}, truly {element}")
        elif not _agrees(shapes, claim, element, bindings):
            result.wrong.append(f"{place}: content {known}, truly {truth} at {bindings}")


def _agrees(shapes: Shapes, claim: Any, truth: float, bindings: dict[str, int]) -> bool:
    """Check a claim; a symbol that says "not known" is bound by the first value it meets."""
    bound = claim if isinstance(claim, float) else bind(claim, bindings)
    if not isinstance(bound, int | float) and shapes.mentions_fresh(bound):
        if bound.is_Symbol:
            bindings[bound.name] = int(truth)
        return True
    return bool(bound == truth)
