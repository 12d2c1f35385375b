"""Raise models of old opsets to the oldest one that lwc's passes know."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx
import onnx.shape_inference
import onnx.version_converter

from lwc.core.errors import InputError
from lwc.frontend.batched_scan import BatchedScans

__all__ = ["MIN_OPSET", "raise_opset", "standard_opset"]

MIN_OPSET = 13
"""Oldest version of the standard operator set inside lwc."""

_BIG = 1024
_WITH_BATCHED_SCAN = 8
_WITH_PLAIN_RESIZE = 10
_PLAIN_RESIZE = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
"""How Resize and, before it, Upsample computed up to that version, without these attributes."""


def standard_opset(proto: onnx.ModelProto) -> int | None:
    """Return the version of the standard operator set that a model imports, or None."""
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    return None


def raise_opset(proto: onnx.ModelProto, file: str | None) -> onnx.ModelProto:
    """Return the model at `MIN_OPSET`, converted by onnx's version converter.

    Big tensors do not pass through the converter: it would copy them several times, and it
    looks at small ones only.

    Raises:
        InputError: The converter cannot do it.
    """
    version = standard_opset(proto)
    if proto.functions:
        raise InputError(
            f"has opset {version} and functions, which the version converter does not raise",
            file=file,
            remedy=f"export it with opset {MIN_OPSET} or newer",
        )
    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants = {
        node.output[0]: attribute.t
        for node in proto.graph.node
        if node.op_type == "Constant" and node.output
        for attribute in node.attribute
        if attribute.name == "value"
    }
    for tensor in shell.graph.initializer:
        _strip(tensor)
    for node in shell.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                _strip(attribute.t)
    scans = BatchedScans()
    try:
        if version == _WITH_BATCHED_SCAN:
            scans.shield(shell.graph)
        raised = onnx.version_converter.convert_version(shell, MIN_OPSET)
    except (
        RuntimeError,
        ValueError,
        onnx.shape_inference.InferenceError,
        onnx.version_converter.ConvertError,
    ) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise InputError(
            f"has opset {version}, and onnx's version converter cannot raise it: {reason[:200]}",
            file=file,
            remedy=f"export it with opset {MIN_OPSET} or newer",
        ) from error
    scans.restore(raised.graph)
    for graph in _graphs(raised.graph):
        _keep_meaning(graph, version or 1)
    described = {value.name for graph in _graphs(proto.graph) for value in graph.value_info}
    for graph in _graphs(raised.graph):
        kept = [value for value in graph.value_info if value.name in described]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    _check_interface(proto.graph, raised.graph, file)
    for tensor in raised.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    for node in raised.graph.node:
        if node.op_type == "Constant" and node.output and node.output[0] in constants:
            for attribute in node.attribute:
                if attribute.name == "value":
                    attribute.t.CopyFrom(constants[node.output[0]])
    for entry in proto.opset_import:
        if entry.domain not in ("", "ai.onnx") and entry.domain not in {
            other.domain for other in raised.opset_import
        }:
            raised.opset_import.add(domain=entry.domain, version=entry.version)
    return raised


def _keep_meaning(graph: onnx.GraphProto, version: int) -> None:
    """Say what operators meant in an old version, where the converter leaves it out."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Resize" and version <= _WITH_PLAIN_RESIZE:
            for name, value in _PLAIN_RESIZE.items():
                node.attribute.append(onnx.helper.make_attribute(name, value))
        nodes += _flat_hardmax(node) if node.op_type == "Hardmax" else [node]
    if len(nodes) > len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _flat_hardmax(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return what computes a Hardmax of before version 13, over all axes from one on."""
    axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
    (x,), (y,) = node.input, node.output
    flat, shape, chosen = (f"{y}_{part}" for part in ("flat", "shape", "chosen"))
    make = onnx.helper.make_node
    return [
        make("Flatten", [x], [flat], name=f"{node.name}_flatten", axis=axis),
        make("Shape", [x], [shape], name=f"{node.name}_shape"),
        make("Hardmax", [flat], [chosen], name=node.name, axis=-1),
        make("Reshape", [chosen, shape], [y], name=f"{node.name}_reshape"),
    ]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all graphs nested in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _check_interface(before: onnx.GraphProto, after: onnx.GraphProto, file: str | None) -> None:
    """Refuse a conversion that gave the graph other inputs or outputs, as some adapters do."""
    for old, new in ((before.input, after.input), (before.output, after.output)):
        for value, raised in itertools.zip_longest(old, new):
            if value is None or raised is None or not _alike(value, raised):
                name = (value or raised).name
                raise InputError(
                    f"cannot be raised to opset {MIN_OPSET}: onnx's version converter changes the "
                    f"graph's input or output '{name}'",
                    file=file,
                    remedy=f"export it with opset {MIN_OPSET} or newer",
                )


def _alike(value: onnx.ValueInfoProto, raised: onnx.ValueInfoProto) -> bool:
    a, b = value.type.tensor_type, raised.type.tensor_type
    if value.name != raised.name or a.elem_type != b.elem_type:
        return False
    if not (a.HasField("shape") and b.HasField("shape")):
        return True
    return len(a.shape.dim) == len(b.shape.dim) and all(
        d.dim_value == e.dim_value
        for d, e in zip(a.shape.dim, b.shape.dim, strict=True)
        if d.HasField("dim_value") and e.HasField("dim_value")
    )


def _strip(tensor: onnx.TensorProto) -> None:
    elements = 1
    for dim in tensor.dims:
        elements *= dim
    if elements * 4 < _BIG or tensor.data_type == onnx.TensorProto.STRING:
        return
    kept = (tensor.name, tensor.data_type, tuple(tensor.dims))
    tensor.Clear()
    tensor.name, tensor.data_type = kept[:2]
    tensor.dims.extend(kept[2])
