"""The module: one ONNX graph with its weights, names, provenance and symbolic dimensions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lwc.core.diagnostics import RemarkLog
from lwc.core.errors import PassError
from lwc.core.walk import all_graphs, all_nodes
from lwc.core.weights import WeightStore

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Fingerprint", "Module", "Source"]

_SPILLED = 1 << 16
"""Bytes from which a new weight goes to the spill file."""


@dataclass(frozen=True)
class Source:
    """Where a module came from.

    Attributes:
        path: The file or folder it was read from, or None.
        format: `onnx`, `onnxtxt`, `gguf`, `huggingface`, `torch` or `memory`.
        companions: Files that belong beside the model (config, tokenizer, chat template), by
            the name they get in an output folder.
    """

    path: str | None = None
    format: str = "memory"
    companions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A module as a file would show it, weights by identity: equal exactly when nothing changed.

    It keeps the tensors alive, so that a new tensor cannot take an old one's identity.
    """

    key: tuple[Any, ...]
    tensors: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.key == other.key

    __hash__ = None  # type: ignore[assignment]


class Module:
    """A model under compilation.

    Nodes are plain `onnx_ir` nodes. The module owns naming: every new value and initializer gets
    its name here, because two initializers of one name silently overwrite each other. Weights
    are replaced, never written into: clones share them.

    Args:
        model: The graph. The module takes it over.
        source: Where it came from.
        remarks: Where passes and front ends report.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        source: Source | None = None,
        remarks: RemarkLog | None = None,
    ) -> None:
        self.model = model
        self.source = source or Source()
        self.remarks = remarks or RemarkLog()
        self._names: set[str] | None = None
        self._counters: dict[str, int] = {}
        self._store: WeightStore | None = None
        self.spill_directory: str | None = None

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        imports = self.model.graph.opset_imports
        return imports.get("", imports.get("ai.onnx", 1))

    def graphs(self) -> Iterator[ir.Graph]:
        """Yield the main graph, subgraphs and function bodies, outer before inner."""
        return all_graphs(self.model)

    def nodes(self) -> Iterator[ir.Node]:
        """Yield every node, those of subgraphs and functions included."""
        return all_nodes(self.model)

    def initializers(self) -> Iterator[tuple[ir.Graph, ir.Value]]:
        """Yield every initializer with the graph that holds it."""
        for graph in self.graphs():
            for value in list(graph.initializers.values()):
                yield graph, value

    # Names

    def fresh_name(self, base: str) -> str:
        """Return a name that nothing in the module has, `base` itself if it is free."""
        names = self._known_names()
        if base not in names:
            names.add(base)
            return base
        stem = re.sub(r"_lwc\d+$", "", base)
        count = self._counters.get(stem, 0)
        while True:
            count += 1
            name = f"{stem}_lwc{count}"
            if name not in names:
                break
        self._counters[stem] = count
        names.add(name)
        return name

    def forget_names(self) -> None:
        """Read the names anew next time; needed after a rewrite that did not ask for names."""
        self._names = None

    def _known_names(self) -> set[str]:
        if self._names is None:
            names: set[str] = set()
            for graph in self.graphs():
                names.update(value.name for value in graph.inputs if value.name)
                names.update(graph.initializers)
                for node in graph:
                    names.update(value.name for value in node.outputs if value.name)
                    if node.name:
                        names.add(node.name)
            self._names = names
        return self._names

    # Weights

    def add_initializer(
        self,
        name: str,
        tensor: ir.TensorProtocol | np.ndarray[Any, Any],
        *,
        graph: ir.Graph | None = None,
    ) -> ir.Value:
        """Add a weight under a unique name derived from `name` and return its value.

        Args:
            name: The wished name.
            tensor: The content.
            graph: The graph that gets it; the main graph by default, which every subgraph sees.
                A function body has no initializers in ONNX: give Constant nodes there.
        """
        unique = self.fresh_name(name)
        if not isinstance(tensor, ir.TensorProtocol):
            tensor = ir.Tensor(tensor, name=unique)
        tensor.name = unique
        value = ir.Value(
            name=unique,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        (graph or self.graph).register_initializer(value)
        return value

    def replace_initializer(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Give an initializer another content, with its type and shape."""
        tensor.name = value.name
        value.const_value = tensor
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())

    def spilled(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Return a new weight as it is to be held: in the spill file, unless it is small."""
        return tensor if tensor.nbytes < _SPILLED else self.store.put_tensor(tensor)

    def update_weights(self, graph_module: Any) -> list[str]:
        """Take over weights that were trained in PyTorch; the graph stays as it is.

        Args:
            graph_module: What `lwc.to_fx` made of this module, or a copy of that.

        Returns:
            Names of the initializers and constants whose content changed.

        Raises:
            LwcError: A weight has another type or shape, or is not there, or a number in it became
                NaN or infinite; nothing changed then.
            MissingExtraError: PyTorch is not installed.
        """
        from lwc.core.trained import update_weights

        return update_weights(self, graph_module)

    @property
    def store(self) -> WeightStore:
        """The spill file of this module; made on first use in `spill_directory`."""
        if self._store is None:
            self._store = WeightStore(self.spill_directory)
        return self._store

    # Opsets

    def import_opset(self, domain: str, version: int) -> None:
        """Declare an operator domain where it is not declared yet.

        Raises:
            PassError: The domain is declared at another version.
        """
        imports = self.model.graph.opset_imports
        have = imports.setdefault(domain, version)
        if have < version:
            raise PassError(
                f"operator domain '{domain or 'ai.onnx'}' is declared at version {have}, "
                f"but version {version} is needed"
            )
        for function in self.model.functions.values():
            function.opset_imports.setdefault(domain, version)

    # Whole-module operations

    def clone(self) -> Module:
        """Copy the graph; weights are shared."""
        twin = Module(self.model.clone(), source=self.source, remarks=RemarkLog())
        twin.model.ir_version = self.model.ir_version
        twin.spill_directory = self.spill_directory
        twin._store = self._store
        return twin

    def adopt(self, other: Module) -> None:
        """Become `other`'s graph, keeping this module's identity (used to roll back)."""
        self.model = other.model
        self._names = None

    def fingerprint(self) -> Fingerprint:
        """Capture all that a file would show, weights by identity: structure, types, names, notes.

        A copy has the fingerprint of its original.
        """
        model = self.model
        tensors: list[Any] = []
        parts: list[Any] = [
            (model.ir_version, model.producer_name, model.producer_version, model.domain),
            (model.model_version, model.doc_string, _sorted(model._metadata_props)),
            _sorted(model.graph.opset_imports),
            _graph_key(model.graph, tensors),
        ]
        for key, function in model.functions.items():
            attributes = tuple(
                (name, attribute.type.value, _attribute_key(attribute, tensors))
                for name, attribute in function.attributes.items()
            )
            imports = _sorted(function.opset_imports)
            parts.append((key, attributes, imports, _graph_key(function.graph, tensors)))
        return Fingerprint(tuple(parts), tuple(tensors))

    def with_source(self, **changes: Any) -> Module:
        """Replace fields of `source` in place and return the module."""
        self.source = replace(self.source, **changes)
        return self

    def __str__(self) -> str:
        from lwc.core.printer import print_module

        return print_module(self)


_QUANTIZATION = "quant_parameter_tensor_names"
"""Where onnx_ir keeps what ONNX's quantization annotations say of a value."""


def _sorted(table: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(table.items())) if table else ()


def _notes(item: ir.Value | ir.Node | ir.Graph) -> Any:
    """Return what is written beside a value, node or graph: None nearly always.

    The properties of these names would make an empty table for every value asked.
    """
    meta = item._metadata
    annotation = meta.get(_QUANTIZATION) if meta and isinstance(item, ir.Value) else None
    if not (item._metadata_props or item.doc_string or annotation):
        return None
    return (_sorted(item._metadata_props), item.doc_string or "", _sorted(annotation))


def _value_key(value: ir.Value | None) -> Any:
    if value is None:
        return None
    shape = value.shape
    dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
    kind = value.type
    return (value.name, None if kind is None else repr(kind), dims, _notes(value))


def _graph_key(graph: ir.Graph, tensors: list[Any]) -> tuple[Any, ...]:
    weights = []
    for name, value in graph.initializers.items():
        tensors.append(value.const_value)
        weights.append((name, id(value.const_value), _value_key(value)))
    nodes = []
    for node in graph:
        attributes = tuple(
            (name, attribute.type.value, _attribute_key(attribute, tensors))
            for name, attribute in node.attributes.items()
        )
        nodes.append(
            (
                node.domain,
                node.op_type,
                node.overload,
                node.name,
                tuple(None if v is None else v.name for v in node.inputs),
                tuple(_value_key(v) for v in node.outputs),
                attributes,
                _notes(node),
            )
        )
    return (
        graph.name,
        _notes(graph),
        tuple(_value_key(v) for v in graph.inputs),
        tuple(_value_key(v) for v in graph.outputs),
        tuple(weights),
        tuple(nodes),
    )


def _attribute_key(attribute: ir.Attr, tensors: list[Any]) -> Any:
    if attribute.is_ref():
        return ("ref", attribute.ref_attr_name)
    value = attribute.value
    if attribute.type == ir.AttributeType.GRAPH:
        return _graph_key(value, tensors)
    if attribute.type == ir.AttributeType.GRAPHS:
        return tuple(_graph_key(graph, tensors) for graph in value)
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.SPARSE_TENSOR):
        tensors.append(value)
        return id(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(value)
    return value if isinstance(value, int | float | str | bytes) else repr(value)
