"""Constant folding, within bounds on size and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.walk import attribute_graphs
from lwc.core.weights import release
from lwc.passes.cleanup.canonical.duplicates import RANDOM_OPS
from lwc.passes.cleanup.canonical.evaluate import EvaluationError, evaluate
from lwc.rewrite import ANY, Editor, Miss, Outcome, Rule, use_count

__all__ = ["FREE_BYTES", "Folding"]

FREE_BYTES = 1024
"""A result up to this size is always folded; a larger one only if it replaces as much."""

_SPILL_BYTES = 4 << 20
_BOUNDED_BY_INPUT = frozenset({"NonZero", "Unique", "Compress"})
_NEVER = frozenset({"Constant", "Identity", *RANDOM_OPS})


@dataclass(frozen=True)
class Folding:
    """Replaces nodes whose inputs are all constant.

    Attributes:
        decompress: Also fold results that are larger than the weights they replace.
        memory: Bound in bytes on the inputs and outputs of one evaluation.
    """

    decompress: bool
    memory: int
    _failed: dict[ir.Node, str] = field(default_factory=dict)

    def rule(self) -> Rule:
        """Return the rule for the driver."""
        return Rule("fold-constants", (ANY,), self.apply)

    def apply(self, node: ir.Node, edit: Editor) -> Outcome:
        """Fold a node, or say why not."""
        tensors: list[ir.TensorProtocol | None] = []
        for value in node.inputs:
            tensor = edit.tensor(value)
            if tensor is None and value is not None:
                return None
            tensors.append(tensor)
        if node.op_type in _NEVER or node.domain or not any(tensors):
            return None
        if any(True for _ in attribute_graphs(node)):
            return None
        if node in self._failed:
            return Miss(self._failed[node])
        reason = self._objection(node, edit, tensors)
        if reason is not None:
            return Miss(reason)
        assert node.graph is not None
        imports = node.graph.opset_imports or edit.module.graph.opset_imports
        try:
            inputs = [None if tensor is None else tensor.numpy() for tensor in tensors]
            results = evaluate(node, inputs, dict(imports))
        except EvaluationError as error:
            self._failed[node] = f"not evaluated: {error}"
            return Miss(self._failed[node])
        values = [
            self._constant(result, output, edit)
            for result, output in zip(results, node.outputs, strict=False)
        ]
        del inputs
        for tensor in tensors:
            release(tensor)
        return values

    def _objection(
        self, node: ir.Node, edit: Editor, tensors: list[ir.TensorProtocol | None]
    ) -> str | None:
        given = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        made = 0
        for output in node.outputs:
            nbytes = edit.shapes.nbytes(output)
            if not isinstance(nbytes, int):
                if node.op_type not in _BOUNDED_BY_INPUT:
                    return "the size of its result is not known"
                nbytes = (
                    8 * given * max((len(t.shape) for t in tensors if t is not None), default=1)
                )
            made += nbytes
        if given + made > self.memory:
            return f"folding needs {given + made} bytes, more than the bound of {self.memory}"
        if made <= FREE_BYTES or self.decompress:
            return None
        freed = sum(
            tensor.nbytes
            for value, tensor in zip(node.inputs, tensors, strict=True)
            if value is not None and tensor is not None and use_count(value) == 1
        )
        if made > freed:
            return f"the result takes {made} bytes and frees {freed}: decompress=true folds it"
        return None

    def _constant(
        self, result: np.ndarray[Any, Any], output: ir.Value, edit: Editor
    ) -> ir.Value | None:
        if not (output.uses() or output.is_graph_output()):
            return None
        if result.nbytes <= FREE_BYTES:
            return edit.constant(result)
        result = np.ascontiguousarray(result)
        large = result.nbytes > _SPILL_BYTES
        content = edit.module.store.put(result) if large else result
        return edit.constant(content, output.name or "folded")
