"""Operators without a rule here: onnx's schema inference for one node, or the file's hint."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from lwc.analysis.shape_rules.registry import Fact, Outcome, Site
from lwc.core.walk import attribute_graphs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lwc.core.dims import Dim

__all__ = ["infer"]


def infer(site: Site) -> Outcome:
    """Describe the outputs of an operator that has no rule.

    Where onnx knows the operator its inference is asked; what that leaves open comes from the
    type and shape the file declares. Extents that neither gives are fresh symbols.
    """
    hints = [site.shapes.hint(value) for value in site.node.outputs]
    schema = _schema(site.node.domain, site.node.op_type, _version(site))
    refers = any(attribute.is_ref() for attribute in site.node.attributes.values())
    if schema is None or refers or any(True for _ in attribute_graphs(site.node)):
        return hints
    inferred = _from_schema(site, schema)
    return [
        hint if fact is None else _refined(fact, hint)
        for fact, hint in zip(inferred, hints, strict=True)
    ]


def _refined(fact: Fact, hint: Fact) -> Fact:
    return fact if fact.shape is not None else Fact(fact.dtype or hint.dtype, hint.shape)


def _version(site: Site) -> int:
    graph = site.node.graph
    imports = {} if graph is None else graph.opset_imports
    return imports.get(site.node.domain, imports.get("ai.onnx", site.shapes.opset))


@functools.cache
def _schema(domain: str, op: str, version: int) -> onnx.defs.OpSchema | None:
    domain = "" if domain == "ai.onnx" else domain
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:  # also of operators that came after this version
        return None


def _from_schema(site: Site, schema: onnx.defs.OpSchema) -> Sequence[Fact | None]:
    proto = ir.to_proto(site.node)
    names: dict[str, Dim] = {}
    types: dict[str, onnx.TypeProto] = {}
    constants: dict[str, onnx.TensorProto] = {}
    for index, value in enumerate(site.node.inputs):
        if value is None:
            continue
        fact = site.fact(index)
        if fact.dtype is None:
            return [None] * site.outputs
        types[proto.input[index]] = _type_proto(fact, names)
        ints = site.ints(index)
        if ints is not None and fact.shape is not None:
            tensor = onnx.helper.make_tensor(
                proto.input[index], int(fact.dtype), [int(d) for d in fact.shape], ints
            )
            constants[proto.input[index]] = tensor
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, constants)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return [None] * site.outputs
    return [
        _fact_of(site, found[value.name], names) if value.name in found else None
        for value in site.node.outputs
    ]


def _type_proto(fact: Fact, names: dict[str, Dim]) -> onnx.TypeProto:
    shape: list[int | str] | None = None
    if fact.shape is not None:
        shape = []
        for dim in fact.shape:
            if not isinstance(dim, int):
                names[str(dim)] = dim
            shape.append(dim if isinstance(dim, int) else str(dim))
    return onnx.helper.make_tensor_type_proto(int(fact.dtype or 0), shape)


def _fact_of(site: Site, proto: onnx.TypeProto, names: dict[str, Dim]) -> Fact | None:
    if not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return None
    kind = proto.tensor_type
    shape = None
    if kind.HasField("shape"):
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else names.get(dim.dim_param) or site.fresh()
            for dim in kind.shape.dim
        )
    return Fact(ir.DataType(kind.elem_type), shape)
