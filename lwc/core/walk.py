"""Walking a model: every graph, node and value, subgraphs and functions included."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = [
    "all_graphs",
    "all_nodes",
    "attribute_graphs",
    "constant_tensor",
    "graph_and_subgraphs",
    "is_default_domain",
    "is_random",
    "op_name",
    "runtime_values",
    "values_read",
]


def is_default_domain(node: ir.Node) -> bool:
    """Tell whether `node` is an operator of the standard ONNX domain."""
    return node.domain in ("", "ai.onnx")


_RANDOM_OPS = frozenset({
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
})  # fmt: skip


def is_random(node: ir.Node) -> bool:
    """Tell whether a standard operator may give another result on every run."""
    if not is_default_domain(node):
        return False
    if node.op_type == "Dropout":
        return len(node.inputs) > 2 and node.inputs[2] is not None
    return node.op_type in _RANDOM_OPS


def op_name(node: ir.Node) -> str:
    """Return `Op` for standard operators, `domain::Op` for all others."""
    return node.op_type if is_default_domain(node) else f"{node.domain}::{node.op_type}"


def attribute_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the subgraphs directly held by the attributes of `node`."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values a node reads, those that its subgraphs read included."""
    yield from (value for value in node.inputs if value is not None)
    for graph in attribute_graphs(node):
        for inner in graph:
            yield from values_read(inner)
        yield from graph.outputs


def runtime_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the inputs of a graph, and what its nodes make, without those of subgraphs."""
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def graph_and_subgraphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yield `graph`, then every graph nested in it, outer before inner."""
    stack = [graph]
    while stack:
        current = stack.pop()
        yield current
        nested = [sub for node in current if node.attributes for sub in attribute_graphs(node)]
        stack.extend(reversed(nested))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph, the function bodies, and every graph nested in them."""
    yield from graph_and_subgraphs(model.graph)
    for function in model.functions.values():
        yield from graph_and_subgraphs(function.graph)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of the model, graph by graph, each graph in its own order."""
    for graph in all_graphs(model):
        yield from graph


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor a value always holds: an initializer's or a Constant node's.

    An initializer that is also a graph input can be overridden by a feed, so it has none.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or not is_default_domain(producer):
        return None
    attribute = producer.attributes.get("value")
    if attribute is not None and not attribute.is_ref():
        # as_tensor() checks a run-time protocol, which takes longer than all the rest here.
        tensor: ir.TensorProtocol = attribute.value
        return tensor
    return ir.convenience.get_const_tensor(value)
