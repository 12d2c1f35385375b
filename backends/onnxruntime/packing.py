"""How a module reaches ONNX Runtime: a small protobuf of the graph, and weights it maps."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lwc.core.errors import LwcError
from lwc.core.walk import constant_tensor
from lwc.core.weights import DataFile, data_file, named_in, stored_bytes

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

    from lwc.core.module import Module

__all__ = ["PackedModule", "pack"]

_INLINE_BYTES = 1024
"""Smaller tensors stay in the protobuf, where ONNX Runtime's shape inference reads them."""

_SHARED_TABLE_BYTES = 1 << 20


_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class PackedModule:
    """A serialized graph and the weights it names.

    Attributes:
        graph: A ModelProto whose big initializers are external data.
        weights: Tensors that are not in files, behind the file names that the graph has for them.
        files: Data files of the model, all of one folder, by their names in it.
        disabled_optimizers: Graph optimizers that would do harm to this graph.
    """

    graph: bytes
    weights: dict[str, ir.TensorProtocol]
    files: dict[str, DataFile]
    disabled_optimizers: tuple[str, ...]

    def attach(self, options: ort.SessionOptions) -> list[object]:
        """Hand the weights to session options; keep what is returned until the session exists.

        Where all of them are in files, ONNX Runtime maps these itself, one weight at a time, and
        lets go of what it packs for its kernels. It takes no files besides memory: otherwise it is
        given a mapping of each file.
        """
        if not self.weights and all(map(_still_there, self.files.values())):
            for file in self.files.values():
                options.add_session_config_entry(_FOLDER, os.path.dirname(file.location))
            return []
        buffers = {name: stored_bytes(tensor) for name, tensor in self.weights.items()}
        for name, file in self.files.items():
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            buffers[name] = np.frombuffer(whole, np.uint8)
        options.add_external_initializers_from_files_in_memory(
            list(buffers), list(buffers.values()), [each.nbytes for each in buffers.values()]
        )
        return list(buffers.values())


def _still_there(file: DataFile) -> bool:
    """Tell whether the path names the file that was opened."""
    try:
        return os.path.samestat(os.stat(file.location), os.fstat(file.fileno()))
    except OSError:
        return False


def pack(module: Module, expose: Sequence[str] = ()) -> PackedModule:
    """Serialize `module` without its big weights, with the values in `expose` as outputs too.

    Nodes without a name get their first output's, so that errors and profiles can name them.

    Raises:
        LwcError: A value to expose is not in the main graph, or the graph without the main
            graph's weights is over protobuf's 2 GiB.
    """
    weights: dict[str, ir.TensorProtocol] = {}
    files: dict[str, DataFile] = {}
    try:
        with named_in(_big_weights(module, weights, files)):
            proto = ir.to_proto(module.model)
        _expose(proto.graph, module.graph, expose)
        _name_nodes(proto.graph)
        graph = proto.SerializeToString()
    except ValueError as error:
        raise LwcError(
            f"the graph without its weights does not fit into a protobuf: {error}",
            file=module.source.path,
            remedy="move big constants of nodes and subgraphs into initializers of the main graph",
        ) from error
    return PackedModule(graph, weights, files, _harmful_optimizers(module))


def _big_weights(
    module: Module, weights: dict[str, ir.TensorProtocol], files: dict[str, DataFile]
) -> Iterator[tuple[ir.Value, str, int]]:
    """Yield each big initializer with a file and an offset in it.

    That is its data file, which goes into `files`, or a name of its own in `weights`.
    """
    for value in module.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < _INLINE_BYTES:
            continue
        file, offset = data_file(tensor) or (None, 0)
        if file is not None and (held := _hold(file, files)):
            yield value, held, offset
            continue
        name = f"weight_{len(weights)}"
        weights[name] = tensor
        yield value, name, 0


def _hold(file: DataFile, files: dict[str, DataFile]) -> str | None:
    """Put a file into `files`; return its name, or None if it does not lie where the others do."""
    folder, name = os.path.split(file.location)
    others = (os.path.dirname(each.location) != folder for each in files.values())
    if files.get(name, file) is not file or any(others):
        return None
    files[name] = file
    return name


def _name_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = node.name or next(filter(None, node.output), "")
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _name_nodes(body)


def _expose(proto: onnx.GraphProto, graph: ir.Graph, names: Sequence[str]) -> None:
    present = {value.name for value in graph.outputs}
    wanted = [name for name in dict.fromkeys(names) if name not in present]
    if not wanted:
        return
    values = {value.name: value for value in graph.inputs}
    values.update(graph.initializers)
    values.update((output.name, output) for node in graph for output in node.outputs)
    for name in wanted:
        if name not in values:
            raise LwcError(
                f"there is no value '{name}' in the main graph to expose",
                remedy="expose values of the main graph only",
            )
        proto.output.append(ir.serde.serialize_value(values[name]))


def _harmful_optimizers(module: Module) -> tuple[str, ...]:
    """Name constant folding where it would copy a big table that several nodes share.

    A packed table used by GatherBlockQuantized and, through a Reshape, by MatMulNBits is stored
    twice once the Reshape is folded.
    """
    for node in module.graph:
        table = node.inputs[0] if node.op_type == "Reshape" and node.inputs else None
        tensor = constant_tensor(table)
        if (
            table is not None
            and tensor is not None
            and tensor.nbytes >= _SHARED_TABLE_BYTES
            and len(table.uses()) > 1
        ):
            return ("ConstantFolding",)
    return ()
