"""Scan as opset 8 has it, with a batch axis, carried through onnx's version converter.

The converter makes the later Scan of it by taking the batch axis off the shapes declared around it,
those of the graph's inputs too, whatever its extent. So copies are put around each Scan before the
conversion; after it they go, and the Scan becomes the body of another one, which scans the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import helper

__all__ = ["BatchedScans"]


class BatchedScans:
    """The Scans of one model, between `shield` and `restore`."""

    def __init__(self) -> None:
        self._number = 0
        self._taken: set[str] = set()
        self._made: set[str] = set()

    def shield(self, graph: onnx.GraphProto) -> None:
        """Put an Identity before and after each Scan of an opset 8 graph, in place.

        Raises:
            ValueError: A Scan has sequence lengths, for which later Scans have no place.
        """
        self._taken = set(_names(graph))
        self._shield(graph)

    def restore(self, graph: onnx.GraphProto) -> None:
        """Take the copies away again and put each Scan into one over the batch, in place."""
        if self._made:
            self._restore(graph)

    def _shield(self, graph: onnx.GraphProto) -> None:
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for inner in _subgraphs(node):
                self._shield(inner)
            if not _is_scan(node):
                nodes.append(node)
                continue
            lengths, *inputs = node.input
            if lengths:
                raise ValueError("Scan with sequence lengths has no later form")
            outputs = list(node.output)
            node.input[1:] = [self._fresh() for _ in inputs]
            node.output[:] = [self._fresh() for _ in outputs]
            nodes += map(_copy, inputs, node.input[1:])
            nodes.append(node)
            pairs = zip(node.output, outputs, strict=True)
            nodes += [_copy(inside, outside) for inside, outside in pairs if outside]
        _replace_nodes(graph, nodes)

    def _restore(self, graph: onnx.GraphProto) -> None:
        outside: dict[str, str] = {}
        for node in graph.node:
            if node.op_type == "Identity":
                outside |= {node.output[0]: node.input[0], node.input[0]: node.output[0]}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for inner in _subgraphs(node):
                self._restore(inner)
            if _is_scan(node):
                nodes.append(_over_batch(node, outside))
            elif node.op_type != "Identity" or self._made.isdisjoint([*node.input, *node.output]):
                nodes.append(node)
        _replace_nodes(graph, nodes)

    def _fresh(self) -> str:
        while (name := f"batched_scan_{self._number}") in self._taken:
            self._number += 1
        self._taken.add(name)
        self._made.add(name)
        return name


def _over_batch(scan: onnx.NodeProto, outside: dict[str, str]) -> onnx.NodeProto:
    """Return a Scan over axis 0 of all inputs and outputs, whose body is `scan`."""
    (step,) = _subgraphs(scan)
    body = helper.make_graph(
        [scan],
        "batch",
        [_typed(name, like) for name, like in zip(scan.input, step.input, strict=True)],
        [_typed(name, like) for name, like in zip(scan.output, step.output, strict=True)],
    )
    return helper.make_node(
        "Scan",
        [outside[name] for name in scan.input],
        [outside.get(name, "") for name in scan.output],
        name=scan.name,
        body=body,
        num_scan_inputs=len(scan.input),
    )


def _typed(name: str, like: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    kind = like.type.tensor_type.elem_type
    if not kind:
        return helper.make_empty_tensor_value_info(name)
    return helper.make_tensor_value_info(name, kind, None)


def _copy(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [source], [target])


def _is_scan(node: onnx.NodeProto) -> bool:
    return node.op_type == "Scan" and node.domain in ("", "ai.onnx")


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.input
        yield from node.output
        for inner in _subgraphs(node):
            yield from _names(inner)


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
