"""Raise models of old opsets to the oldest one that lwc's passes know."""

from __future__ import annotations

import onnx
import onnx.shape_inference
import onnx.version_converter

from lwc.core.errors import InputError

__all__ = ["MIN_OPSET", "raise_opset", "standard_opset"]

MIN_OPSET = 13
"""Oldest version of the standard operator set inside lwc."""

_BIG = 1024


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
    try:
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
    described = {value.name for value in proto.graph.value_info}
    kept = [value for value in raised.graph.value_info if value.name in described]
    del raised.graph.value_info[:]
    raised.graph.value_info.extend(kept)
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
