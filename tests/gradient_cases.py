"""ONNX's own cases of operators in float64, and their gradients beside differences."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from bench.backend_cases import Case, cases_of
from onnx import AttributeProto, TensorProto, numpy_helper

import lwc
from lwc.core.module import Module
from lwc.core.torch_types import tensor_of_array

__all__ = ["GradientCase", "case_of", "check_gradients", "is_float", "operator_cases"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_LARGE = 4000
_KINDS = (np.dtype(np.float16), np.dtype(np.float32), ir.DataType.BFLOAT16.numpy())


@dataclass(frozen=True)
class GradientCase:
    """A module of one node and what it is fed.

    Attributes:
        name: Unique.
        operator: `Op` or `domain::Op`.
        module: The module; its floats are float64.
        feed: Its inputs, in order: arrays, lists of them, or None.
    """

    name: str
    operator: str
    module: Module
    feed: Mapping[str, Any]


def operator_cases() -> dict[str, list[GradientCase]]:
    """Return the node cases of ONNX that are one node and read a float, by operator."""
    found: dict[str, list[GradientCase]] = {}
    for case in cases_of("node"):
        given = [each for value in case.feed.values() for each in _flat(value)]
        floats = [each for each in given if is_float(each)]
        # What is infinite has no differences, and a large case says no more than a small one.
        plain = all(np.isfinite(each.astype(np.float64)).all() for each in floats)
        small = sum(each.size for each in given if each is not None) <= _LARGE
        if len(case.model.graph.node) == 1 and floats and plain and small:
            made = _in_float64(case)
            found.setdefault(made.operator, []).append(made)
    return found


def case_of(name: str, operator: str, module: Module, feed: Mapping[str, Any]) -> GradientCase:
    """Make a case of a module; its floats are fed as float64, whatever it says."""
    wide = {
        key: np.asarray(given, np.float64) if is_float(given) else given
        for key, given in feed.items()
    }
    return GradientCase(name, operator, module, wide)


def _in_float64(case: Case) -> GradientCase:
    (node,) = case.model.graph.node
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    if _takes_double(node, model):
        _widen(model.graph)
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    feed = {name: _moved(given, random) for name, given in case.feed.items()}
    return GradientCase(case.name, operator, Module(ir.from_proto(model)), feed)


def _takes_double(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    version = next(each.version for each in model.opset_import if each.domain == node.domain)
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    kinds = [set(each.allowed_type_strs) for each in schema.type_constraints]
    return all("tensor(double)" in each for each in kinds if "tensor(float)" in each)


def _moved(given: Any, random: np.random.Generator) -> Any:
    """Return floats in float64 and a little aside: ties and zeros are where gradients jump."""
    if isinstance(given, list):
        return [_moved(each, random) for each in given]
    if not is_float(given):
        return given
    wide = np.asarray(given, np.float64)
    return wide * (1 + 1e-2 * random.random(wide.shape)) + 1e-3 * random.random(wide.shape)


def is_float(given: Any) -> bool:
    """Tell whether something is an array of floats."""
    return isinstance(given, np.ndarray) and given.dtype in (*_KINDS, np.float64)


def _flat(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _widen(graph: onnx.GraphProto) -> None:
    """Make every float of a graph a double."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type
        while not kind.HasField("tensor_type"):
            field = kind.WhichOneof("value")
            if field is None:
                break
            kind = getattr(kind, field).elem_type
        if kind.tensor_type.elem_type in _FLOATS:
            kind.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _widen(attribute.g)
            elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type in _FLOATS:
                array = numpy_helper.to_array(attribute.t).astype(np.float64)
                attribute.t.CopyFrom(numpy_helper.from_array(array))
            elif attribute.name in ("to", "dtype", "output_dtype", "softmax_precision"):
                attribute.i = TensorProto.DOUBLE if attribute.i in _FLOATS else attribute.i


def check_gradients(case: GradientCase, constant: Sequence[int] = ()) -> None:
    """Check the gradients of all floating outputs by all floating inputs.

    Differences are taken along random directions, which every derivative has a part in: a missing
    one is as wrong as a wrong one. Of tensors without elements, that gradients can be asked for.

    Args:
        case: What is checked.
        constant: Positions of inputs by which nothing is differentiated.

    Raises:
        AssertionError: An output is cut off from all inputs, or is no float64.
        torch.autograd.gradcheck.GradcheckError: A gradient is not that of the differences.
    """
    lowered = lwc.to_fx(case.module)
    names = [name for name in lowered.meta["lwc"]["inputs"] if name in case.feed]
    free: list[torch.Tensor] = []
    flat_feed = [each for name in names for each in _flat(case.feed[name])]
    full = any(is_float(each) and each.size for each in flat_feed)

    def held(given: Any, fixed: bool) -> Any:
        """Return a tensor, or the number of a free one."""
        if isinstance(given, list):
            return [held(each, fixed) for each in given]
        if given is None:
            return None
        if fixed or not is_float(given) or (full and not given.size):
            return tensor_of_array(given, ir.tensor(given).dtype)
        free.append(torch.tensor(given, requires_grad=True))
        return len(free) - 1

    places = [held(case.feed[name], index in constant) for index, name in enumerate(names)]

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def taken(place: Any) -> Any:
            if isinstance(place, list):
                return [taken(each) for each in place]
            return tensors[place] if isinstance(place, int) else place

        found = lowered.forward(*map(taken, places))  # which float64 need not be declared for
        flat = [each for item in (found if isinstance(found, tuple) else (found,))
                for each in _flat(item)]  # fmt: skip
        floats = [each for each in flat if each is not None and each.is_floating_point()]
        return tuple(torch.where(each.isfinite(), each, 0.0) for each in floats)

    results = outputs(*free)
    assert results, "there is nothing to differentiate"
    if not full:
        for result in results:
            if result.requires_grad:
                torch.autograd.grad(result.sum(), free, allow_unused=True, retain_graph=True)
        return
    for index, result in enumerate(results):
        assert result.requires_grad, f"output {index} is cut off from every input"
        assert result.dtype == torch.float64, f"output {index} is {result.dtype}"
    torch.autograd.gradcheck(outputs, free, fast_mode=True, eps=1e-6, atol=1e-5, rtol=1e-3)
