"""Constant folding, within bounds on size and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.walk import attribute_graphs, is_random
from lwc.core.weights import release
from lwc.passes.cleanup.canonical.evaluate import EvaluationError, evaluate
from lwc.rewrite import ANY, Editor, Miss, Outcome, Rule, use_count

__all__ = ["FREE_BYTES", "Folding"]

FREE_BYTES = 1024
"""A result up to this size is always folded; a larger one only if it replaces as much."""

Array = np.ndarray[Any, Any]

_MANY_USES = 1000
_BOUNDED_BY_INPUT = frozenset({"NonZero", "Unique", "Compress"})
_NEVER = frozenset({"Constant", "Identity"})


@dataclass(frozen=True)
class Folding:
    """Replaces nodes whose inputs are all constant.

    A node whose result is larger than the weights it frees waits: a later node that joins several
    such results (the slices of one weight, put together in another order) may free as much as it
    makes, and is then folded with all it is computed from.

    Attributes:
        decompress: Also fold results that are larger than the weights they replace.
        memory: Bound in bytes on the inputs and outputs of one folding.
    """

    decompress: bool
    memory: int
    _failed: dict[ir.Node, str] = field(default_factory=dict)
    _waiting: set[ir.Node] = field(default_factory=set)

    def rule(self) -> Rule:
        """Return the rule for the driver."""
        return Rule(
            "fold-constants", (ANY,), self.apply, "a node whose inputs are all constant: its result"
        )

    def apply(self, node: ir.Node, edit: Editor) -> Outcome:
        """Fold a node, or say why not."""
        if not self._foldable(node, edit):
            return None
        if node in self._failed:
            return Miss(self._failed[node])
        if sum(output.is_graph_output() for output in node.outputs) > 1:
            return Miss("several of its outputs leave the graph, where each would need a node")
        cone = self._cone(node, edit)
        reason = self._objection(node, cone, edit)
        if reason is not None:
            return Miss(reason)
        try:
            results = self._evaluate(cone, edit)
        except EvaluationError as error:
            self._failed[node] = f"not evaluated: {error}"
            return Miss(self._failed[node])
        return [
            self._constant(result, output, edit)
            for result, output in zip(results, node.outputs, strict=False)
        ]

    def _foldable(self, node: ir.Node, edit: Editor) -> bool:
        if node.op_type in _NEVER or node.domain or is_random(node):
            return False
        constants = 0
        for value in node.inputs:
            if value is None:
                continue
            if edit.tensor(value) is None and value.producer() not in self._waiting:
                return False
            constants += 1
        return bool(constants) and not any(True for _ in attribute_graphs(node))

    def _cone(self, node: ir.Node, edit: Editor) -> list[ir.Node]:
        """Return the waiting nodes that `node` is computed from, and itself, in order."""
        order: dict[ir.Node, None] = {}
        stack = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                order[current] = None
            elif current not in order:
                stack.append((current, True))
                producers = (v.producer() for v in current.inputs if v is not None)
                stack.extend((p, False) for p in producers if p in self._waiting and p is not None)
        return list(order)

    def _objection(self, node: ir.Node, cone: list[ir.Node], edit: Editor) -> str | None:
        leaves = {
            value: tensor
            for inner in cone
            for value in inner.inputs
            if value is not None and (tensor := edit.tensor(value)) is not None
        }
        given = sum(tensor.nbytes for tensor in leaves.values())
        sizes = [self._output_bytes(inner, edit) for inner in cone]
        if any(size is None for size in sizes):
            return "the size of its result is not known"
        needed = given + sum(size for size in sizes if size is not None)
        if needed > self.memory:
            return f"folding needs {needed} bytes, more than the bound of {self.memory}"
        made = sizes[-1]
        assert made is not None
        if made <= FREE_BYTES or self.decompress:
            return None
        inside = set(cone)
        freed = sum(
            tensor.nbytes
            for value, tensor in leaves.items()
            if not value.is_graph_output()
            and use_count(value) <= _MANY_USES
            and all(use.node in inside for use in value.uses())
        )
        escapes = any(
            use.node not in inside
            for inner in cone[:-1]
            for output in inner.outputs
            for use in output.uses()
        )
        if made > freed or escapes:
            self._waiting.add(node)
            return f"the result takes {made} bytes and frees {freed}: decompress=true folds it"
        return None

    def _output_bytes(self, node: ir.Node, edit: Editor) -> int | None:
        total = 0
        for output in node.outputs:
            nbytes = edit.shapes.nbytes(output)
            if isinstance(nbytes, int):
                total += nbytes
                continue
            tensor = edit.tensor(node.inputs[0])
            if node.op_type not in _BOUNDED_BY_INPUT or tensor is None:
                return None
            # Each of at most four int64 results is no longer than the input has elements and axes.
            total += 8 * tensor.size * max(len(tensor.shape), 1)
        return total

    def _evaluate(self, cone: list[ir.Node], edit: Editor) -> list[Array]:
        made: dict[ir.Value, Array] = {}
        results: list[Array] = []
        for node in cone:
            tensors = [edit.tensor(value) for value in node.inputs]
            inputs = [
                tensor.numpy() if tensor is not None else None if value is None else made[value]
                for value, tensor in zip(node.inputs, tensors, strict=True)
            ]
            results = evaluate(node, inputs, edit.imports(node))
            made.update(zip(node.outputs, results, strict=False))
            for tensor in tensors:
                release(tensor)
        return results

    def _constant(self, result: Array, output: ir.Value, edit: Editor) -> ir.Value | None:
        if not (output.uses() or output.is_graph_output()):
            return None
        if result.nbytes <= FREE_BYTES:
            return edit.constant(result)
        content = edit.module.spilled(ir.Tensor(np.ascontiguousarray(result)))
        return edit.constant(content, output.name or "folded")
