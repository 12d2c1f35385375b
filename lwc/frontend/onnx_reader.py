"""Read ONNX files into modules: binary or text, with weights left on disk."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import cast

import onnx
import onnx.parser
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lwc.core.collector import without_collections
from lwc.core.diagnostics import Remark, RemarkLog, describe
from lwc.core.dims import is_anonymous
from lwc.core.errors import InputError
from lwc.core.module import Module, Source
from lwc.core.walk import attribute_graphs, graph_and_subgraphs
from lwc.core.weights import DataFile, FileTensor
from lwc.frontend.external_data import DataFolder
from lwc.frontend.onnx_checks import check_model
from lwc.frontend.opset import MIN_OPSET, raise_opset, standard_opset
from lwc.frontend.outline import Outline, outline
from lwc.frontend.parse_error import parse_reason

__all__ = ["MIN_OPSET", "from_proto", "read_onnx", "read_onnx_text"]

_PROTOBUF_LIMIT = 2**31 - 1
_OUTLINE_FROM = 1 << 20
_MAX_TEXT_DEPTH = 200
_IR_WITH_CONSTANTS = 4
_NOT_A_MODEL = "check that it is an ONNX model and that it was fetched whole"


def read_onnx(
    path: str | os.PathLike[str],
    *,
    follow_symlinks: bool = False,
    remarks: RemarkLog | None = None,
) -> Module:
    """Read a binary ONNX model; its weights stay in their files, mapped on demand.

    Args:
        path: The file.
        follow_symlinks: See `DataFolder`.
        remarks: Where to report what was put right.

    Raises:
        InputError: The file is no valid model, or uses what lwc does not read.
    """
    file = os.fspath(path)
    data = _open_regular(file)
    if data.size == 0:
        raise InputError("is empty", file=file, remedy=_NOT_A_MODEL)
    if data.size > _PROTOBUF_LIMIT:
        raise InputError(
            "is larger than 2 GiB, which protobuf cannot hold in one file",
            file=file,
            remedy="export the model with external data",
        )
    mapped = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(mapped)
    outlined = outline(view) if data.size >= _OUTLINE_FROM else Outline(view)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(outlined.message)
    except (DecodeError, RecursionError):
        what = "a text file" if _looks_like_text(view) else "truncated or not an ONNX model"
        raise InputError(
            f"cannot be parsed: it is {what}", file=file, remedy=_NOT_A_MODEL
        ) from None
    return _build(
        proto,
        DataFolder(file, follow_symlinks=follow_symlinks),
        Source(path=file, format="onnx"),
        remarks or RemarkLog(),
        (data, outlined.weights),
    )


def read_onnx_text(
    path: str | os.PathLike[str],
    *,
    follow_symlinks: bool = False,
    remarks: RemarkLog | None = None,
) -> Module:
    """Read a model in ONNX's textual syntax (`.onnxtxt`); see `read_onnx`."""
    file = os.fspath(path)
    _open_regular(file)
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8", file=file, remedy=_NOT_A_MODEL) from None
    if not text.strip():
        raise InputError("is empty", file=file, remedy=_NOT_A_MODEL)
    if _nesting(text) > _MAX_TEXT_DEPTH:
        raise InputError("nests too deeply", file=file, remedy=_NOT_A_MODEL)
    try:
        proto = onnx.parser.parse_model(text)
    except (onnx.parser.ParseError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"cannot be parsed: {parse_reason(error)}", file=file) from None
    return _build(
        proto,
        DataFolder(file, follow_symlinks=follow_symlinks),
        Source(path=file, format="onnxtxt"),
        remarks or RemarkLog(),
    )


def from_proto(proto: onnx.ModelProto, *, remarks: RemarkLog | None = None) -> Module:
    """Make a module of a parsed model, which is copied.

    Raises:
        InputError: See `read_onnx`; external data is refused, since the model has no folder.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return _build(copy, DataFolder(None), Source(), remarks or RemarkLog())


def _open_regular(file: str) -> DataFile:
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"is {what}", file=file, remedy="give the path of a model file")
        return DataFile(file)
    except FileNotFoundError:
        raise InputError("does not exist", file=file, remedy="check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read: {reason}", file=file, remedy="check the path") from None


def _build(
    proto: onnx.ModelProto,
    folder: DataFolder,
    source: Source,
    remarks: RemarkLog,
    inline: tuple[DataFile, dict[int, tuple[int, int]]] | None = None,
) -> Module:
    file = source.path
    weights = inline[1] if inline else {}
    findings = check_model(proto, file, {k: length for k, (_, length) in weights.items()})
    outlined = {
        proto.graph.initializer[position].name: place for position, place in weights.items()
    }
    for imports in (proto.opset_import, *(f.opset_import for f in proto.functions)):
        for entry in imports:
            if entry.domain == "ai.onnx":
                entry.domain = ""
    _drop_default_inputs(proto)
    opset = standard_opset(proto)
    if opset is not None and opset < MIN_OPSET:
        proto = raise_opset(proto, file)
        lengths = {
            position: outlined[tensor.name][1]
            for position, tensor in enumerate(proto.graph.initializer)
            if tensor.name in outlined
        }
        findings = check_model(proto, file, lengths)
        _note(remarks, f"raised from opset {opset} to {MIN_OPSET}")
    _settle_dims(proto, remarks, nested=findings.nested)
    if proto.training_info:
        _note(remarks, "training information is not kept", kind="warning")
    tensors = {
        tensor.name: folder.tensor(tensor)
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    model = _deserialize(proto, file)
    if inline:
        for name, (offset, _) in outlined.items():
            tensor = model.graph.initializers[name].const_value
            assert tensor is not None
            tensors[name] = FileTensor(inline[0], offset, tensor.dtype, tensor.shape, name)
    for name, stored in tensors.items():
        model.graph.initializers[name].const_value = cast(ir.TensorProtocol, stored)
    if findings.external:
        _open_nested(model, folder)
    if findings.unsorted:
        _sort(model, file)
        _note(remarks, "nodes were not in topological order and were sorted")
    if findings.nested:
        _separate_scopes(model, remarks)
    for operator, count in sorted(findings.custom_operators.items()):
        _note(
            remarks, f"{operator} ({count} uses) is unknown to lwc and is carried through as it is"
        )
    return Module(model, source=source, remarks=remarks)


def _drop_default_inputs(proto: onnx.ModelProto) -> None:
    """Make initializers constants in models of IR versions that list all of them as inputs."""
    if proto.ir_version >= _IR_WITH_CONSTANTS:
        return
    initialized = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.input if value.name not in initialized]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.ir_version = _IR_WITH_CONSTANTS


def _deserialize(proto: onnx.ModelProto, file: str | None) -> ir.Model:
    try:
        with without_collections():
            return ir.serde.deserialize_model(proto)
    except (ir.serde.SerdeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(
            f"cannot be read: {_root_cause(error)}", file=file, remedy="export the model again"
        ) from error


def _note(remarks: RemarkLog, message: str, kind: str = "note") -> None:
    remarks.emit(Remark("warning" if kind == "warning" else "note", "read-onnx", message))


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__


def _looks_like_text(view: memoryview) -> bool:
    head = bytes(view[:512])
    try:
        return head.decode("utf-8", errors="strict").isprintable() or b"\n" in head
    except UnicodeDecodeError:
        return False


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "({[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")}]":
            depth -= 1
    return deepest


def _settle_dims(proto: onnx.ModelProto, remarks: RemarkLog, *, nested: bool) -> None:
    """Give each unknown extent of a graph input its own name, and clear all others.

    Equal names mean equal extents inside lwc, but `?` and its like say nothing.
    """
    graph = proto.graph
    initialized = {tensor.name for tensor in graph.initializer}
    taken = {dim.dim_param for value in (*graph.input, *graph.output) for dim in _dims(value.type)}
    odd: list[str] = []
    for value in graph.input:
        if value.name in initialized:
            continue
        for axis, dim in enumerate(_dims(value.type)):
            number = dim.dim_value if dim.HasField("dim_value") else None
            if number is not None and number > 0:
                continue
            if number is None and not is_anonymous(dim.dim_param):
                continue
            name = f"{value.name}_d{axis}"
            while name in taken:
                name += "_"
            taken.add(name)
            dim.dim_param = name
            if number is not None:
                odd.append(f"{value.name}[{axis}] = {number}")
    if odd:
        _note(remarks, f"extents that are no sizes were taken as unknown: {', '.join(odd)}")
    inner = [graph]
    while inner:
        current = inner.pop()
        if current is not graph:
            for value in current.input:
                _clear_anonymous(value.type)
        for values in (current.output, current.value_info):
            for value in values:
                _clear_anonymous(value.type)
        if nested:
            inner.extend(g for node in current.node for g in _subgraphs(node))
    for function in proto.functions:
        for value in function.value_info:
            _clear_anonymous(value.type)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _dims(kind: onnx.TypeProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    which = kind.WhichOneof("value")
    while which in ("sequence_type", "optional_type"):
        kind = getattr(kind, which).elem_type
        which = kind.WhichOneof("value")
    if which == "tensor_type":
        yield from kind.tensor_type.shape.dim
    elif which == "sparse_tensor_type":
        yield from kind.sparse_tensor_type.shape.dim


def _clear_anonymous(kind: onnx.TypeProto) -> None:
    for dim in _dims(kind):
        if dim.dim_value > 0:
            continue
        if dim.dim_value < 0 or (dim.dim_param and is_anonymous(dim.dim_param)):
            dim.Clear()


def _open_nested(model: ir.Model, folder: DataFolder) -> None:
    """Replace the external tensors of subgraphs and attributes, which onnx_ir would open itself."""

    def opened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        proto = ir.serde.serialize_tensor(tensor)
        return cast(ir.TensorProtocol, folder.tensor(proto))

    roots = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in (graph for root in roots for graph in graph_and_subgraphs(root)):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = opened(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, opened(attribute.as_tensor()))
                elif attribute.type == ir.AttributeType.TENSORS:
                    node.attributes[name] = ir.AttrTensors(
                        name, [opened(tensor) for tensor in attribute.as_tensors()]
                    )


def _sort(model: ir.Model, file: str | None) -> None:
    try:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    except ValueError:
        roots = (model.graph, *(function.graph for function in model.functions.values()))
        graphs = (graph for root in roots for graph in graph_and_subgraphs(root))
        node = next(filter(None, map(_node_in_cycle, graphs)), None)
        raise InputError(
            "the graph has a cycle",
            file=file,
            node=None if node is None else describe(node),
            remedy="export the model again",
        ) from None


def _node_in_cycle(graph: ir.Graph) -> ir.Node | None:
    """Return the first node of a cycle among the nodes of `graph`, their bodies included."""
    inner = {
        node: [
            deep
            for body in attribute_graphs(node)
            for nested in graph_and_subgraphs(body)
            for deep in nested
        ]
        for node in graph
    }
    owner = {deep: node for node, nodes in inner.items() for deep in (node, *nodes)}
    needs: dict[ir.Node, list[ir.Node]] = {}
    for node, nodes in inner.items():
        makers = [
            (deep, value.producer()) for deep in (node, *nodes) for value in deep.inputs if value
        ]
        # What a body takes from itself is the body's own order.
        needs[node] = [
            owner[maker]
            for deep, maker in makers
            if maker in owner and (deep is node or owner[maker] is not node)
        ]
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        cycle = set(error.args[1])
        return next(node for node in graph if node in cycle)
    return None


def _separate_scopes(model: ir.Model, remarks: RemarkLog) -> None:
    """Make names unique across a graph and everything nested in it.

    Branches that reuse each other's names are valid, but moving a node out of its branch would
    then join two values; a name that hides an outer one is invalid.
    """
    renamed = 0
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        graphs = list(graph_and_subgraphs(root))
        everything = {value.name for graph in graphs for value in _own_values(graph)}
        seen: set[str | None] = set()
        for graph in graphs:
            for value in list(_own_values(graph)):
                name = value.name
                if not name:
                    continue
                if name in seen:
                    suffix = 1
                    while f"{name}_{suffix}" in everything:
                        suffix += 1
                    value.name = f"{name}_{suffix}"
                    everything.add(value.name)
                    renamed += 1
                seen.add(value.name)
    if renamed:
        _note(remarks, f"{renamed} values in subgraphs shared a name with another and were renamed")


def _own_values(graph: ir.Graph) -> Iterator[ir.Value]:
    inputs = list(graph.inputs)
    yield from inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        yield from node.outputs
