"""last-logits: only the positions that generation asks for reach the head of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lwc.core.dims import Dim
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.passes.attention.token_flow import LENGTH, Tokens, follow_tokens, token_inputs
from lwc.pipeline.passes import Array, Exact, Pass, PassContext, PassResult
from lwc.rewrite import Editor

__all__ = ["LastLogits"]

_ATTENTION = ("com.microsoft::GroupQueryAttention",)
_END = np.array([np.iinfo(np.int64).max], np.int64)


def _last_positions(before: Array, after: Array) -> Array:
    """Return as many of the last positions of `[batch, sequence, …]` as there are after."""
    return before[:, before.shape[1] - after.shape[1] :] if after.ndim > 1 else before


@dataclass(frozen=True)
class LastLogits(Pass):
    """Compute the logits of the last positions alone.

    What follows the last attention treats each token by itself, so all of it, not just the head,
    is left out for the other positions.

    Attributes:
        count: How many positions are kept; 0 lets an input `num_logits_to_keep` say it at run
            time, for which 0 means all.
        output: The output that has the logits; the first one by default.
        mask: The input that masks padding, of past tokens too.
    """

    count: int = 1
    output: str = ""
    mask: str = "attention_mask"

    name: ClassVar[str] = "last-logits"
    contract: ClassVar[Exact] = Exact(kept=_last_positions)

    @property
    def keeps_interface(self) -> bool:
        """The output has fewer positions."""
        return False

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Cut the tokens behind the last attention.

        Raises:
            UsageError: `count` is negative, or there is no such output.
            PassError: The output has no axis of tokens, or no attention that tells it.
        """
        if self.count < 0:
            raise UsageError("count is negative", remedy="give the number of positions to keep")
        outputs = {value.name: value for value in module.graph.outputs}
        name = self.output or next(iter(outputs), "")
        if name not in outputs:
            raise UsageError(
                f"there is no output '{name}'",
                remedy=f"the outputs are {', '.join(map(str, outputs))}",
            )
        edit = ctx.editor()
        logits = outputs[name]
        cut = _Cut(edit, logits, self.mask)
        if cut.length is None:
            ctx.note(f"output '{name}' has no axis of all tokens")
            return PassResult(False)
        ctx.limit.spend("last-logits", logits.producer())
        cut.write(self.count)
        ctx.analyses.invalidate()
        ctx.note(f"{len(cut.region)} nodes compute for the last positions only")
        return PassResult(True, rewrites={"last-logits": 1})


class _Cut:
    """Where tokens are cut: every way into the nodes that only the logits read."""

    def __init__(self, edit: Editor, logits: ir.Value, mask: str) -> None:
        self.edit = edit
        self.logits = logits
        attention = [node for node in edit.module.graph if op_name(node) in _ATTENTION]
        if not attention:
            raise PassError(
                "there is no GroupQueryAttention in the main graph",
                remedy="run fuse-attention first, and see what --explain=fuse-attention says",
            )
        query = edit.shape(attention[0].inputs[0])
        shape = edit.shape(logits)
        if query is None or shape is None or len(shape) != 3:
            raise PassError(f"output '{logits.name}' is not [batch, sequence, vocabulary]")
        self.length: Dim | None = query[1] if edit.same_dim(query[1], shape[1]) else None
        self.region: set[ir.Node] = set()
        if self.length is None:
            return
        if isinstance(self.length, int):
            raise PassError(f"the sequence has a fixed length of {self.length}")
        inputs = token_inputs(edit, self.length, mask)
        self.flows = follow_tokens(edit, self.length, inputs, set(attention)).flows
        self.region = self._grown(set(attention))

    def _grown(self, attention: set[ir.Node]) -> set[ir.Node]:
        """Return the nodes that treat tokens one by one and whose results only the logits read."""
        region: set[ir.Node] = set()
        for node in reversed(list(self.edit.module.graph)):
            leaves = [value for value in node.outputs if value.is_graph_output()]
            if node in attention or any(value is not self.logits for value in leaves):
                continue
            readers = {user for value in node.outputs for user, _ in value.uses()}
            if not (readers or leaves) or not readers <= region or not self._divides(node):
                continue
            region.add(node)
        if self.logits.producer() not in region:
            raise PassError(f"output '{self.logits.name}' is not computed token by token")
        return region

    def _divides(self, node: ir.Node) -> bool:
        """Tell whether a node computes the same for some tokens as it does for all."""
        flows = [self.flows.get(value) for value in node.inputs if value is not None]
        result = self.flows.get(node.outputs[0])
        plain = all(
            flow != LENGTH and not (isinstance(flow, Tokens) and flow.outer != 1) for flow in flows
        )
        return plain and isinstance(result, Tokens) and result.outer == 1 and not result.whole

    def write(self, count: int) -> None:
        """Cut every value that enters the region with tokens, once each."""
        self.edit.at(next(iter(self.edit.module.graph)))
        begin = self._begin(count)
        end = self.edit.constant(_END, "end")
        made: dict[ir.Value, ir.Value] = {}
        for node in self.edit.module.graph:
            if node not in self.region:
                continue
            self.edit.at(node)
            for place, value in enumerate(node.inputs):
                flow = None if value is None else self.flows.get(value)
                if value is None or value.producer() in self.region or not isinstance(flow, Tokens):
                    continue
                if value not in made:
                    axis = self.edit.constant(np.array([flow.axis], np.int64), "axis")
                    made[value] = self.edit.op("Slice", [value, begin, end, axis])
                self.edit.set_input(node, place, made[value])
        for node in self.region:
            for value in node.outputs:
                if value.shape is not None:
                    value.shape = None
        self._state(count)

    def _begin(self, count: int) -> ir.Value:
        if count:
            return self.edit.constant(np.array([-count], np.int64), "begin")
        graph = self.edit.module.graph
        asked = ir.Value(
            name="num_logits_to_keep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64)
        )
        if any(value.name == asked.name for value in graph.inputs):
            raise PassError(f"there is an input '{asked.name}' already")
        graph.inputs.append(asked)
        axes = self.edit.constant(np.array([0], np.int64), "axes")
        return self.edit.op("Unsqueeze", [self.edit.op("Neg", [asked]), axes])

    def _state(self, count: int) -> None:
        batch, _, words = self.edit.shape(self.logits) or (None, None, None)
        dims = [batch if isinstance(batch, int) else str(batch), count or "num_logits", words]
        self.logits.shape = ir.Shape(dims)
