"""Checks of a model just parsed, before anything is built from it: input is hostile until then."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx
import onnx_ir as ir

from lwc.core.errors import InputError
from lwc.core.schemas import STANDARD_DOMAINS, newest_opset, signature_problem
from lwc.frontend.external_data import tensor_nbytes

__all__ = ["Findings", "check_model"]

_RUNTIME_DOMAINS = frozenset({"com.microsoft", "lwc"})
"""Custom domains whose operators lwc knows: they are carried without a remark."""

_TYPED_FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
}
"""Field that holds the elements of a tensor without raw bytes, and numbers per element."""

_AGAIN = "export the model again"
_MAX_DEPTH = 64
_MAX_ELEMENTS = 2**57
"""Elements, empty extents counted as 1, up to which numpy makes an array of any type."""

_Documented: TypeAlias = (
    onnx.ModelProto
    | onnx.GraphProto
    | onnx.NodeProto
    | onnx.ValueInfoProto
    | onnx.FunctionProto
    | onnx.TensorProto
)


@dataclass
class Findings:
    """What reading must still put right or tell.

    Attributes:
        unsorted: Some node stands before one it depends on.
        nested: There are subgraphs.
        custom_operators: Uses of each operator of an unknown domain.
        external: There are tensors in data files.
    """

    unsorted: bool = False
    nested: bool = False
    custom_operators: Counter[str] = field(default_factory=Counter)
    external: bool = False


@dataclass
class _Scope:
    """Names of one graph: those defined so far, and all that its nodes define anywhere."""

    defined: set[str]
    eventually: set[str]


def check_model(
    proto: onnx.ModelProto, file: str | None, outlined: dict[int, int] | None = None
) -> Findings:
    """Check names, types, tensors, operators and nesting of a parsed model.

    Args:
        proto: The model.
        file: Its path, for messages.
        outlined: Bytes of initializers whose content was left in the file, by their position.

    Raises:
        InputError: The first thing that is wrong, with node or tensor.
    """
    return _Checker(proto, file, outlined or {}).run()


class _Checker:
    def __init__(self, proto: onnx.ModelProto, file: str | None, outlined: dict[int, int]) -> None:
        self.proto = proto
        self.file = file
        self.outlined = outlined
        self.findings = Findings()
        self.imports: dict[str, int] = {}
        self.functions = {(f.domain, f.name) for f in proto.functions}
        self.caller = ("", "")
        self.calls: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)

    def run(self) -> Findings:
        proto = self.proto
        if not proto.HasField("graph"):
            raise self._error("holds no graph: this is not an ONNX model", "check the file")
        if proto.ir_version < 1:
            raise self._error("has no IR version: this is not an ONNX model", "check the file")
        names = (proto.producer_name, proto.producer_version, proto.domain)
        self._texts_of(proto, "model", *names)
        self.imports = self._read_imports(proto.opset_import)
        if not self.imports and (proto.graph.node or proto.functions):
            raise self._error("imports no opset", "add an opset import or export the model again")
        if not proto.graph.output:
            raise self._error("has no graph outputs", _AGAIN)
        self._graph(proto.graph, [], top=True)
        for value in (*proto.graph.input, *proto.graph.output):
            which = value.type.WhichOneof("value")
            if which is None or (which == "tensor_type" and not value.type.tensor_type.elem_type):
                raise self._error(f"graph input or output '{value.name}' has no type", _AGAIN)
        identifiers = set()
        for function in proto.functions:
            key = (function.domain, function.name, function.overload)
            if key in identifiers:
                raise self._error(f"function '{function.name}' is defined twice", _AGAIN)
            identifiers.add(key)
            self._function(function)
        self._refuse_recursion()
        return self.findings

    def _read_imports(self, entries: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
        imports: dict[str, int] = {}
        for entry in entries:
            self._text(entry.domain, where="opset import")
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if imports.setdefault(domain, entry.version) != entry.version:
                raise self._error(
                    f"imports domain '{domain or 'ai.onnx'}' at two versions", "remove one of them"
                )
            if entry.version < 1:
                raise self._error(
                    f"imports domain '{domain or 'ai.onnx'}' at version {entry.version}", _AGAIN
                )
            if domain in STANDARD_DOMAINS and entry.version > newest_opset(domain):
                raise self._error(
                    f"imports opset {entry.version} of '{domain or 'ai.onnx'}', newer than "
                    f"{newest_opset(domain)}, the newest that the installed onnx package knows",
                    "upgrade onnx",
                )
        return imports

    def _graph(self, graph: onnx.GraphProto, outer: list[_Scope], *, top: bool = False) -> None:
        if len(outer) > _MAX_DEPTH:
            raise self._error(f"nests subgraphs deeper than {_MAX_DEPTH}", "check the file")
        if graph.sparse_initializer:
            raise self._error(
                f"graph '{graph.name}' has sparse initializers, which lwc does not read",
                "store them dense",
            )
        self._texts_of(graph, "graph", graph.name)
        defined: set[str] = set()
        for value in graph.input:
            self._value_type(value)
            self._define(value.name, defined, f"graph input '{value.name}'")
        initialized: set[str] = set()
        inputs = {value.name: value.type for value in graph.input}
        for position, tensor in enumerate(graph.initializer):
            if not tensor.name:
                raise self._error("an initializer has no name", _AGAIN)
            self._define(tensor.name, initialized, f"initializer '{tensor.name}'")
            self._tensor(
                tensor,
                f"initializer '{tensor.name}'",
                self.outlined.get(position) if top else None,
            )
            if tensor.name in inputs:
                self._default(tensor, inputs[tensor.name])
        defined |= initialized
        for value in (*graph.value_info, *graph.output):
            self._value_type(value)
        self._nodes(graph.node, defined, outer)
        for value in graph.output:
            if value.name not in defined:
                raise self._error(
                    f"graph output '{value.name}' is produced by no node", "remove or connect it"
                )

    def _default(self, tensor: onnx.TensorProto, declared: onnx.TypeProto) -> None:
        """Check that an input's default value is what the input takes."""
        kind = declared.tensor_type
        if declared.WhichOneof("value") != "tensor_type" or kind.elem_type != tensor.data_type:
            wanted = ir.DataType(kind.elem_type).name
            raise self._error(
                f"input '{tensor.name}' is {wanted}, but its initializer is "
                f"{ir.DataType(tensor.data_type).name}",
                _AGAIN,
            )
        if not kind.HasField("shape"):
            return
        have = list(tensor.dims)
        extents = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if len(extents) != len(have) or any(
            extent not in (None, size) for extent, size in zip(extents, have, strict=True)
        ):
            raise self._error(
                f"input '{tensor.name}' has shape {extents}, but its initializer has {have}",
                _AGAIN,
            )

    def _function(self, function: onnx.FunctionProto) -> None:
        names = (function.name, function.domain, function.overload, *function.attribute)
        self._texts_of(function, "function", *names)
        saved, self.imports = self.imports, self._read_imports(function.opset_import)
        self.caller = (function.domain, function.name)
        defined: set[str] = set()
        for name in function.input:
            self._define(name, defined, f"input '{name}' of function '{function.name}'")
        self._nodes(function.node, defined, [])
        for name in function.output:
            if name not in defined:
                raise self._error(
                    f"output '{name}' of function '{function.name}' is produced by no node", _AGAIN
                )
        for attribute in function.attribute_proto:
            self._attribute(attribute, [], f"function '{function.name}'")
        for value in function.value_info:
            self._value_type(value)
        self.imports = saved

    def _nodes(
        self, nodes: Collection[onnx.NodeProto], defined: set[str], outer: list[_Scope]
    ) -> None:
        eventually = {name for node in nodes for name in node.output}
        scopes = [*outer, _Scope(defined, eventually)]
        for node in nodes:
            self._text(
                node.op_type, node.domain, node.overload, node.name, node.doc_string, where="node"
            )
            if node.metadata_props:
                self._texts_of(node, _describe(node))
            self._operator(node)
            for name in node.input:
                if name and name not in defined:
                    self._find_outside(name, node, scopes)
            for attribute in node.attribute:
                self._text(
                    attribute.name,
                    attribute.ref_attr_name,
                    attribute.doc_string,
                    where=node.op_type,
                )
                if attribute.type in (
                    onnx.AttributeProto.INT,
                    onnx.AttributeProto.INTS,
                    onnx.AttributeProto.FLOAT,
                ):
                    continue
                self._attribute(attribute, scopes, _describe(node))
            for name in node.output:
                if name:
                    self._define(name, defined, f"output '{name}'", _describe(node))

    def _find_outside(self, name: str, node: onnx.NodeProto, scopes: list[_Scope]) -> None:
        if any(name in scope.defined for scope in scopes):
            return
        self._text(name, where="value")
        if any(name in scope.eventually for scope in scopes):
            self.findings.unsorted = True
            return
        raise self._error(
            f"input '{name}' is produced by no node, input or initializer",
            "the model is incomplete: export it again",
            _describe(node),
        )

    def _operator(self, node: onnx.NodeProto) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        op_type = node.op_type
        if not op_type:
            raise self._error("a node has no operator", _AGAIN, _describe(node))
        if (node.domain, op_type) in self.functions:
            self.calls[self.caller].add((node.domain, op_type))
            return
        version = self.imports.get(domain)
        if version is None:
            raise self._error(
                f"uses domain '{domain or 'ai.onnx'}', which the model does not import",
                "add the opset import",
                _describe(node),
            )
        if domain in STANDARD_DOMAINS:
            problem = signature_problem(
                domain,
                op_type,
                version,
                inputs=len(node.input),
                outputs=len(node.output),
                attributes={attribute.name: attribute.type for attribute in node.attribute},
            )
            if problem is not None:
                raise self._error(problem, f"the model says opset {version}", _describe(node))
        elif domain not in _RUNTIME_DOMAINS:
            self.findings.custom_operators[f"{domain}::{op_type}"] += 1

    def _attribute(self, attribute: onnx.AttributeProto, scopes: list[_Scope], where: str) -> None:
        if attribute.ref_attr_name:
            return
        kind, kinds = attribute.type, onnx.AttributeProto
        if kind == kinds.TENSOR:
            self._tensor(attribute.t, f"attribute '{attribute.name}' of {where}")
        elif kind == kinds.TENSORS:
            for tensor in attribute.tensors:
                self._tensor(tensor, f"attribute '{attribute.name}' of {where}")
        elif kind == kinds.GRAPH:
            self.findings.nested = True
            self._graph(attribute.g, scopes)
        elif kind == kinds.GRAPHS:
            self.findings.nested = True
            for graph in attribute.graphs:
                self._graph(graph, scopes)
        elif kind in (kinds.SPARSE_TENSOR, kinds.SPARSE_TENSORS):
            raise self._error(
                f"attribute '{attribute.name}' is a sparse tensor, which lwc does not read",
                "store it dense",
                where,
            )
        elif kind == kinds.UNDEFINED or kind not in kinds.AttributeType.values():
            raise self._error(
                f"attribute '{attribute.name}' has unknown type {kind}", _AGAIN, where
            )

    def _tensor(self, tensor: onnx.TensorProto, where: str, stored: int | None = None) -> None:
        self._texts_of(tensor, "tensor", tensor.name)
        try:
            dtype = ir.DataType(tensor.data_type)
        except ValueError:
            dtype = ir.DataType.UNDEFINED
        if dtype == ir.DataType.UNDEFINED:
            raise self._error(f"{where} has unknown element type {tensor.data_type}", _AGAIN)
        dims = tuple(tensor.dims)
        if any(dim < 0 for dim in dims):
            raise self._error(f"{where} has a negative extent in its shape {list(dims)}", _AGAIN)
        if 0 in dims and math.prod(dim or 1 for dim in dims) > _MAX_ELEMENTS:
            raise self._error(f"{where} has the absurd shape {list(dims)}", _AGAIN)
        if tensor.HasField("segment"):
            raise self._error(f"{where} is stored in segments, which lwc does not read", _AGAIN)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if dtype == ir.DataType.STRING:
                raise self._error(f"{where} holds strings, which cannot lie in a data file", _AGAIN)
            for entry in tensor.external_data:
                self._text(entry.key, entry.value, where="tensor")
            self.findings.external = True
            return
        if dtype == ir.DataType.STRING:
            if stored is not None or tensor.HasField("raw_data"):
                raise self._error(f"{where} holds strings as raw bytes", _AGAIN)
            expected, have, unit = math.prod(dims), len(tensor.string_data), "strings"
        elif stored is not None or tensor.HasField("raw_data"):
            expected, unit = tensor_nbytes(dims, dtype), "bytes"
            have = len(tensor.raw_data) if stored is None else stored
        else:
            name, per_element = _TYPED_FIELDS.get(dtype, ("int32_data", 1))
            packed = dtype.bitwidth in (2, 4)
            expected = tensor_nbytes(dims, dtype) if packed else math.prod(dims) * per_element
            have, unit = len(getattr(tensor, name)), "numbers"
        if have != expected:
            raise self._error(
                f"{where} of type {dtype.name} and shape {list(dims)} needs {expected} {unit} "
                f"but has {have}",
                "the file is damaged: fetch or export it again",
            )

    def _value_type(self, value: onnx.ValueInfoProto) -> None:
        self._texts_of(value, "value", value.name, value.type.denotation)
        kind, depth = value.type, 0
        while True:
            which = kind.WhichOneof("value")
            if which in ("sequence_type", "optional_type"):
                kind, depth = getattr(kind, which).elem_type, depth + 1
                if kind.WhichOneof("value") is None or depth > _MAX_DEPTH:
                    raise self._error(f"value '{value.name}' has a malformed type", _AGAIN)
                continue
            if which in ("map_type", "opaque_type"):
                raise self._error(
                    f"value '{value.name}' is a {which.removesuffix('_type')}, a type that lwc "
                    "does not read",
                    "cut the model before it",
                )
            if which is None:
                return
            number = getattr(kind, which).elem_type
            for dim in getattr(kind, which).shape.dim:
                self._text(dim.dim_param, dim.denotation, where=f"shape of '{value.name}'")
            try:
                ir.DataType(number)
            except ValueError:
                raise self._error(
                    f"value '{value.name}' has unknown element type {number}", _AGAIN
                ) from None
            return

    def _define(self, name: str, defined: set[str], what: str, node: str | None = None) -> None:
        if not name:
            raise self._error("a graph input has no name", _AGAIN, node)
        self._text(name, where="value")
        if name in defined:
            raise self._error(
                f"{what} is defined twice", "names must be unique: export the model again", node
            )
        defined.add(name)

    def _text(self, *texts: str, where: str) -> None:
        """Refuse what is not UTF-8: protobuf hands such names out as bytes."""
        for text in texts:
            if type(text) is not str:
                raise self._error(f"a {where} has a name or text that is not UTF-8", _AGAIN)

    def _texts_of(self, holder: _Documented, where: str, *names: str) -> None:
        """Refuse names, documentation and metadata that are not UTF-8."""
        self._text(*names, holder.doc_string, where=where)
        for entry in holder.metadata_props:
            self._text(entry.key, entry.value, where=where)

    def _refuse_recursion(self) -> None:
        calls = self.calls
        done: set[tuple[str, str]] = set()
        for start, callees in list(calls.items()):
            path: list[tuple[tuple[str, str], list[tuple[str, str]]]] = [(start, sorted(callees))]
            open_: set[tuple[str, str]] = {start}
            while path:
                key, rest = path[-1]
                if not rest:
                    path.pop()
                    open_.discard(key)
                    done.add(key)
                    continue
                callee = rest.pop()
                if callee in open_:
                    raise self._error(f"function '{callee[1]}' calls itself", _AGAIN)
                if callee not in done:
                    path.append((callee, sorted(calls.get(callee, ()))))
                    open_.add(callee)

    def _error(self, message: str, remedy: str, node: str | None = None) -> InputError:
        return InputError(message, file=self.file, node=node, remedy=remedy)


def _describe(node: onnx.NodeProto) -> str:
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    if node.name:
        return f"{op} '{node.name}'"
    return f"{op} -> '{node.output[0]}'" if node.output else op
