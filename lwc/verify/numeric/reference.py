"""The float64 reference: small graphs run in double precision by onnx's reference evaluator.

Where two large numbers cancel, rounding in float32 is as large as a bug may be. In float64 what
is left of rounding is that of the constants, which a pass rounds to float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from lwc.core.errors import LwcError
from lwc.core.schemas import find_schema
from lwc.verify.numeric.running import flat

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Float64Reference", "runs_in_float64"]

Array = np.ndarray[Any, Any]

_LIMIT = 1 << 22
"""Weight elements up to which a graph is small."""

_MISTAKEN = frozenset({"Conv", "ConvTranspose"})
"""Operators whose reference implementation is wrong, here for several groups with a bias."""

_TYPE_ATTRIBUTES = frozenset({"to", "dtype"})


def runs_in_float64(module: Module) -> bool:
    """Tell whether the reference can run a module: a small one, of standard operators only."""
    elements = 0
    for _, value in module.initializers():
        if value.const_value is None or value.dtype is None or value.dtype.bitwidth < 8:
            return False
        elements += value.const_value.size
    if elements > _LIMIT:
        return False
    functions = module.model.functions
    return all(
        node.op_identifier() in functions
        or (
            node.op_type not in _MISTAKEN
            and find_schema(node.domain, node.op_type, module.opset) is not None
        )
        for node in module.nodes()
    )


class Float64Reference:
    """A module compiled for the reference evaluator, every float32 made a float64.

    Half-precision types stay: a module that computes in them rounds by design.

    Args:
        module: What to run; see `runs_in_float64`.

    Raises:
        LwcError: The evaluator does not know an operator.
    """

    def __init__(self, module: Module) -> None:
        from onnx.reference import ReferenceEvaluator

        proto = ir.to_proto(module.model)
        _widen_graph(proto.graph)
        for function in proto.functions:
            for node in function.node:
                _widen_node(node)
        self._outputs = [value.name for value in proto.graph.output]
        try:
            self._evaluator = ReferenceEvaluator(proto)
        except Exception as error:
            raise LwcError(f"the float64 reference cannot run it: {error}") from error

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch and return the outputs by name, as `flat` names them; float32 as float64.

        Raises:
            LwcError: A node fails.
        """
        wide = {
            name: array.astype(np.float64) if array.dtype == np.float32 else array
            for name, array in feed.items()
        }
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # such as a mean of nothing
                results = self._evaluator.run(None, wide)
        except Exception as error:
            raise LwcError(f"the float64 reference fails: {error}") from error
        return flat(dict(zip(self._outputs, results, strict=True)))


def _widen_graph(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        _widen_value(value)
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        _widen_node(node)


def _widen_value(value: ValueInfoProto) -> None:
    kind = value.type
    while kind.WhichOneof("value") in ("sequence_type", "optional_type"):
        kind = getattr(kind, kind.WhichOneof("value")).elem_type
    if kind.tensor_type.elem_type == TensorProto.FLOAT:
        kind.tensor_type.elem_type = TensorProto.DOUBLE


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _widen_node(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        elif attribute.type == AttributeProto.GRAPH:
            _widen_graph(attribute.g)
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            wide = numpy_helper.from_array(np.array(numbers, np.float64))
            attribute.CopyFrom(onnx.helper.make_attribute("value", wide))
