"""The structure of a module without its names: what must not depend on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.module import Module
from lwc.core.walk import attribute_graphs, graph_and_subgraphs

__all__ = ["renamed", "structure"]


def structure(module: Module) -> Hashable:
    """Describe what a module computes with, whatever its values and nodes are called.

    Two modules that differ in names and in the order of independent nodes only have equal
    structures. Graph inputs and outputs count by name, weights by content.
    """
    seen: dict[ir.Value, Hashable] = {}
    for value in module.graph.inputs:
        seen[value] = ("input", value.name)
    outputs, nodes = _graph(module.graph, seen)
    functions = tuple(
        (key, _graph(function.graph, {v: ("parameter", i) for i, v in enumerate(function.inputs)}))
        for key, function in sorted(module.model.functions.items())
    )
    names = tuple(value.name for value in module.graph.outputs)
    return (names, outputs, nodes, functions)


def _graph(graph: ir.Graph, seen: dict[ir.Value, Hashable]) -> tuple[Hashable, Hashable]:
    """Return the keys of the outputs and how often each node key occurs."""
    for value in graph.initializers.values():
        seen.setdefault(value, _tensor(value.const_value))
    nodes: Counter[int] = Counter()
    for node in graph:
        # Hashed, or keys would grow with the depth of the graph.
        key = hash((
            node.domain,
            node.op_type,
            node.overload,
            tuple(None if value is None else seen.get(value) for value in node.inputs),
            len(node.outputs),
            tuple(sorted((name, _attribute(a, seen)) for name, a in node.attributes.items())),
        ))  # fmt: skip
        nodes[key] += 1
        for index, value in enumerate(node.outputs):
            seen[value] = (key, index)
    outputs = tuple(seen.get(value) for value in graph.outputs)
    return outputs, tuple(sorted(nodes.items()))


def _attribute(attribute: ir.Attr, seen: dict[ir.Value, Hashable]) -> int:
    if attribute.is_ref():
        return hash(("ref", attribute.ref_attr_name))
    value = attribute.value
    if attribute.type == ir.AttributeType.GRAPH:
        inner = dict(seen)
        inner.update((v, ("parameter", i)) for i, v in enumerate(value.inputs))
        return hash(_graph(value, inner))
    if attribute.type == ir.AttributeType.TENSOR:
        return hash(_tensor(value))
    return hash((str(attribute.type), repr(value)))


def _tensor(tensor: ir.TensorProtocol | None) -> Hashable:
    if tensor is None:
        return None
    if tensor.dtype == ir.DataType.STRING:
        content = repr(tensor.numpy().tolist()).encode()
    else:
        content = tensor.tobytes()
    return ("weight", int(tensor.dtype), tuple(tensor.shape), hashlib.sha1(content).hexdigest())


def renamed(module: Module, seed: int = 0) -> Module:
    """Copy a module under other names; graph inputs and outputs keep theirs.

    The new names sort and hash in another order than the old ones.
    """
    twin = module.clone()
    kept = {value.name for value in (*twin.graph.inputs, *twin.graph.outputs)}
    rng = np.random.default_rng(seed)
    taken: set[str] = {name for name in kept if name is not None}

    def fresh() -> str:
        while (name := f"r{rng.integers(1 << 40):x}") in taken:
            pass
        taken.add(name)
        return name

    graphs = [twin.graph, *(f.graph for f in twin.model.functions.values())]
    for outer in graphs:
        for graph in graph_and_subgraphs(outer):
            _rename_graph(graph, kept if outer is twin.graph else set(), fresh)
    twin.forget_names()
    return twin


def _rename_graph(graph: ir.Graph, kept: Sequence[Any] | set[Any], fresh: Any) -> None:
    for value in list(graph.initializers.values()):
        if value.name not in kept:
            value.name = fresh()
    for value in graph.inputs:
        if value.name not in kept:
            value.name = fresh()
    for node in graph:
        if node.name:
            node.name = fresh()
        for value in node.outputs:
            if value.name and value.name not in kept:
                value.name = fresh()
        assert all(body is not graph for body in attribute_graphs(node))
