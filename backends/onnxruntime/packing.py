"""How a module reaches ONNX Runtime: a small protobuf of the graph, and weights it maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from lwc.core.errors import LwcError
from lwc.core.walk import constant_tensor
from lwc.core.weights import named_in, stored_bytes

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

    from lwc.core.module import Module

__all__ = ["PackedModule", "pack"]

_INLINE_BYTES = 1024
"""Smaller tensors stay in the protobuf, where ONNX Runtime's shape inference reads them."""

_SHARED_TABLE_BYTES = 1 << 20


@dataclass(frozen=True)
class PackedModule:
    """A serialized graph and the weights it names.

    Attributes:
        graph: A ModelProto whose big initializers are external data in files named by `weights`.
        weights: The tensor behind each such file name.
        disabled_optimizers: Graph optimizers that would do harm to this graph.
    """

    graph: bytes
    weights: dict[str, ir.TensorProtocol]
    disabled_optimizers: tuple[str, ...]

    def attach(self, options: ort.SessionOptions) -> list[object]:
        """Hand the weights to session options; keep what is returned until the session exists.

        ONNX Runtime takes each file's content from the given memory, which for weights on disk
        is a mapping: the only copy made is the one it packs for its kernels.
        """
        buffers = [stored_bytes(tensor) for tensor in self.weights.values()]
        if buffers:
            options.add_external_initializers_from_files_in_memory(
                list(self.weights), buffers, [buffer.nbytes for buffer in buffers]
            )
        return list(buffers)


def pack(module: Module, expose: Sequence[str] = ()) -> PackedModule:
    """Serialize `module` without its big weights, with the values in `expose` as outputs too.

    Nodes without a name get their first output's, so that errors and profiles can name them.

    Raises:
        LwcError: A value to expose is not in the main graph, or the graph without the main
            graph's weights is over protobuf's 2 GiB.
    """
    weights: dict[str, ir.TensorProtocol] = {}
    try:
        with named_in(_big_weights(module, weights)):
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
    return PackedModule(graph, weights, _harmful_optimizers(module))


def _big_weights(
    module: Module, weights: dict[str, ir.TensorProtocol]
) -> Iterator[tuple[ir.Value, str, int]]:
    """Yield each big initializer with a file name of its own, under which `weights` keeps it."""
    for value in module.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < _INLINE_BYTES:
            continue
        file = f"weight_{len(weights)}"
        weights[file] = tensor
        yield value, file, 0


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
