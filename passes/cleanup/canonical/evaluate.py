"""Evaluation of one node on constants: by numpy where it does what ONNX says, else by a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.rewrite import attribute

__all__ = ["EvaluationError", "evaluate"]

Array = np.ndarray[Any, Any]


class EvaluationError(Exception):
    """A node cannot be evaluated here; the text says why."""


def evaluate(node: ir.Node, inputs: Sequence[Array | None], imports: dict[str, int]) -> list[Array]:
    """Compute the outputs of a node.

    Args:
        node: A node without subgraphs or references to function attributes.
        inputs: Its inputs, None for absent ones.
        imports: The operator sets its graph declares.

    Raises:
        EvaluationError: The result is undefined, machine dependent or not computable here.
    """
    fast = _FAST.get(node.op_type) if not node.domain else None
    if fast is not None:
        try:
            with np.errstate(all="ignore"):
                result = fast(node, inputs)
        except (ValueError, IndexError, TypeError, OverflowError) as error:
            raise EvaluationError(str(error)) from error
        if result is not None:
            return [np.asarray(result)]
    return _run(node, inputs, imports)


def _plain(dtype: np.dtype[Any]) -> bool:
    """Return whether numpy itself has a type: those of ml_dtypes round and saturate otherwise."""
    return dtype.kind in "biuf" and dtype.type.__module__ == "numpy"


def _cast(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    (x,) = inputs
    assert x is not None
    to = ir.DataType(attribute(node, "to"))
    if to == ir.DataType.STRING or not _plain(x.dtype) or to.bitwidth < 8:
        return None
    target = to.numpy()
    if not _plain(target):
        return None
    if x.dtype.kind == "f" and target.kind in "iu":
        info = np.iinfo(target)
        whole = np.trunc(x.astype(np.float64))
        # 2**63 as float64 is above the largest int64, hence the strict upper bound.
        if not bool(np.all((whole >= float(info.min)) & (whole < float(info.max) + 1.0))):
            raise EvaluationError("a float outside the integer type's range has no defined result")
    return x.astype(target)


def _divide(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    a, b = inputs
    assert a is not None
    assert b is not None
    if a.dtype.kind == "f":
        return np.divide(a, b)
    if a.dtype.kind not in "iu":
        return None
    if not np.all(b):
        raise EvaluationError("integer division by zero")
    quotient = np.floor_divide(a, b)
    inexact = quotient * b != a
    return np.asarray(quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype))


def _numeric(function: Callable[..., Any]) -> Callable[..., Array | None]:
    def apply(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
        if any(x is None or not _plain(x.dtype) for x in inputs):
            return None
        return np.asarray(function(*inputs))

    return apply


def _reshape(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    x, shape = inputs
    assert x is not None
    assert shape is not None
    target = shape.tolist()
    if not attribute(node, "allowzero", 0):
        target = [x.shape[i] if dim == 0 else dim for i, dim in enumerate(target)]
    return x.reshape(target)


def _axes(inputs: Sequence[Array | None]) -> tuple[int, ...] | None:
    return None if len(inputs) < 2 or inputs[1] is None else tuple(inputs[1].ravel().tolist())


def _squeeze(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    assert inputs[0] is not None
    # An empty list of axes is the same as none: every extent of 1 goes.
    return np.squeeze(inputs[0], axis=_axes(inputs) or None)


def _unsqueeze(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    axes = _axes(inputs)
    assert inputs[0] is not None
    assert axes is not None
    return np.expand_dims(inputs[0], axes)


def _gather(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    x, indices = inputs
    assert x is not None
    assert indices is not None
    return np.take(x, indices, axis=attribute(node, "axis", 0))


def _concat(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    return np.concatenate([x for x in inputs if x is not None], axis=attribute(node, "axis"))


def _slice(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    x, starts, ends = inputs[:3]
    assert x is not None
    assert starts is not None
    assert ends is not None
    count = starts.size
    axes = range(count) if len(inputs) < 4 or inputs[3] is None else inputs[3].tolist()
    steps = [1] * count if len(inputs) < 5 or inputs[4] is None else inputs[4].tolist()
    if any(step <= 0 for step in steps):
        return None
    index: list[slice] = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _transpose(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    assert inputs[0] is not None
    return np.ascontiguousarray(np.transpose(inputs[0], attribute(node, "perm")))


def _expand(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    x, shape = inputs
    assert x is not None
    assert shape is not None
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist()))).copy()


def _where(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    condition, yes, no = inputs
    assert condition is not None
    assert yes is not None
    assert no is not None
    return np.where(condition, yes, no) if yes.dtype == no.dtype else None


def _filled(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    assert inputs[0] is not None
    fill = node.attributes.get("value")
    value = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
    return np.full(inputs[0].tolist(), value.reshape(()), dtype=value.dtype)


_FAST: dict[str, Callable[[ir.Node, Sequence[Array | None]], Array | None]] = {
    "Cast": _cast,
    "Div": _divide,
    "Add": _numeric(np.add),
    "Sub": _numeric(np.subtract),
    "Mul": _numeric(np.multiply),
    "Neg": _numeric(np.negative),
    "Abs": _numeric(np.abs),
    "Sqrt": _numeric(np.sqrt),
    "Not": _numeric(np.logical_not),
    "And": _numeric(np.logical_and),
    "Or": _numeric(np.logical_or),
    "Equal": _numeric(np.equal),
    "Greater": _numeric(np.greater),
    "GreaterOrEqual": _numeric(np.greater_equal),
    "Less": _numeric(np.less),
    "LessOrEqual": _numeric(np.less_equal),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Transpose": _transpose,
    "Expand": _expand,
    "Where": _where,
    "ConstantOfShape": _filled,
    "Identity": lambda node, inputs: inputs[0],
}


def _run(node: ir.Node, inputs: Sequence[Array | None], imports: dict[str, int]) -> list[Array]:
    """Evaluate the node by ONNX Runtime, as a model of its own without optimizations."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    values: list[ir.Value | None] = []
    for index, x in enumerate(inputs):
        if x is None:
            values.append(None)
            continue
        dtype = ir.DataType.from_numpy(x.dtype)
        if not _plain(x.dtype):
            raise EvaluationError(f"constants of type {dtype.name.lower()} are not evaluated")
        values.append(
            ir.Value(name=f"i{index}", type=ir.TensorType(dtype), shape=ir.Shape(x.shape))
        )
    twin = ir.Node(
        node.domain,
        node.op_type,
        values,
        list(node.attributes.values()),
        outputs=[ir.Value(name=f"o{index}") for index in range(len(node.outputs))],
    )
    graph = ir.Graph(
        [value for value in values if value is not None],
        list(twin.outputs),
        nodes=[twin],
        opset_imports=imports,
        name="constant",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    feed = {f"i{index}": x for index, x in enumerate(inputs) if x is not None}
    refusals = (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
        state.NotImplemented, state.RuntimeException, RuntimeError, ValueError,
    )  # fmt: skip
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(None, feed)
    except refusals as error:
        raise EvaluationError(str(error).splitlines()[0]) from error
    if not all(isinstance(result, np.ndarray) for result in results):
        raise EvaluationError("its result is no tensor")
    types = [output.type for output in session.get_outputs()]
    return [_typed(result, kind) for result, kind in zip(results, types, strict=True)]


def _typed(result: Array, kind: str) -> Array:
    """Give a result the type that ONNX Runtime names: it hands out float8 as uint8."""
    dtype = ir.DataType[kind.removeprefix("tensor(").removesuffix(")").upper()]
    if dtype == ir.DataType.STRING:
        return result
    wanted = dtype.numpy()
    if result.dtype == wanted:
        return result
    if result.dtype.itemsize * 8 != dtype.bitwidth:
        raise EvaluationError(f"results of type {dtype.name.lower()} are not evaluated")
    return result.view(wanted)
