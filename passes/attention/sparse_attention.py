"""sparse-attention: each query sees a window and a few other keys, not all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import onnx_ir as ir

from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.passes.attention.sparse_masks import Places, Sparsity, hide
from lwc.passes.attention.sparse_places import ATTENTION_OPS, is_causal, places_of
from lwc.pipeline.passes import Lossy, Pass, PassContext, PassResult
from lwc.pipeline.spec import to_text
from lwc.rewrite import Editor, Miss, attribute

__all__ = ["SparseAttention"]

Pattern: TypeAlias = Literal["window", "strided", "fixed"]

_GQA = "com.microsoft::GroupQueryAttention"
_DONE = "lwc.sparse-attention"
"""Where a node has noted what was done to it, so that a second run leaves it alone."""


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Let attention see a window, strides or summaries, and global tokens, instead of all keys.

    Query i sees key j, both counted from 0 with the past, and never one that it did not see
    before, such as a later one where attention is causal:

    - `window`: |i - j| < window. Longformer (Beltagy, Peters, Cohan, arXiv:2004.05150, section
      3.1) counts the width of the window over both sides, 2 · window - 1 here.
    - `strided`: i - j <= stride, or (i - j) mod stride = 0.
    - `fixed`: ⌊i / stride⌋ = ⌊j / stride⌋, or j mod stride >= stride - summary.

    The latter two are the sets of both heads of Sparse Transformers (Child, Gray, Radford,
    Sutskever, arXiv:1904.10509, sections 4.2 and 4.3) in one head, which the paper calls merged.
    With global tokens query i sees key j also where one of them is among the first ones
    (Longformer, section 3.1). It works on what `fuse-attention` makes. A window alone becomes
    `local_window_size` of a causal GroupQueryAttention; everything else is a mask made in the
    graph, one for all layers. ONNX Runtime's CPU kernels compute hidden scores too: what it
    changes there is what a model sees, not its speed.

    Attributes:
        pattern: See above.
        window: With `window`: keys seen on each side, the query's own among them.
        stride: With `strided` and `fixed`: the stride, or the extent of a block.
        summary: With `fixed`: how many keys at the end of each block all later queries see.
        global_tokens: How many tokens at the beginning see all and are seen by all.
        layers: Attention operators to change, by their order in the graph from 0; all by default.
    """

    pattern: Pattern = "window"
    window: int = 512
    stride: int = 128
    summary: int = 8
    global_tokens: int = 0
    layers: tuple[int, ...] = ()

    name: ClassVar[str] = "sparse-attention"
    contract: ClassVar[Lossy] = Lossy()

    def __post_init__(self) -> None:
        for name, number in (("window", self.window), ("stride", self.stride)):
            if number < 1:
                raise UsageError(f"{name}={number} is no number from 1")
        if self.summary < 1 or (self.pattern == "fixed" and self.summary > self.stride):
            raise UsageError(f"summary={self.summary} is no number from 1 to stride={self.stride}")
        if self.global_tokens < 0:
            raise UsageError(f"global-tokens={self.global_tokens} is no number from 0")

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Change attention.

        Raises:
            PassError: There is no such layer.
        """
        nodes = [node for node in module.graph if op_name(node) in ATTENTION_OPS]
        unknown = [layer for layer in self.layers if not 0 <= layer < len(nodes)]
        if unknown:
            raise PassError(
                f"there is no layer {unknown[0]}: the graph has {len(nodes)} attention operators",
                remedy="layers are counted from 0; fuse-attention makes the operators",
            )
        edit = ctx.editor()
        work = _Work(self._sparsity(), to_text([self]), edit)
        changed = 0
        for layer, node in enumerate(nodes):
            if (self.layers and layer not in self.layers) or ctx.limit.exhausted:
                continue
            outcome = work.change(node)
            if isinstance(outcome, Miss):
                ctx.missed(outcome.reason, outcome.node or node)
            elif outcome:
                ctx.applied(outcome, node, self.pattern)
                changed += 1
        if not changed:
            ctx.note("no attention to make sparse" if not nodes else "no attention changes")
        return PassResult(changed > 0, statistics={"layers": changed})

    def _sparsity(self) -> Sparsity:
        reach = self.window if self.pattern == "window" else self.stride
        return Sparsity(self.pattern, reach, self.summary, self.global_tokens)


class _Work:
    """A run: what is asked for, and the masks made so far."""

    def __init__(self, wanted: Sparsity, text: str, edit: Editor) -> None:
        self.wanted = wanted
        self.text = text
        self.edit = edit
        self.seen: dict[object, ir.Value] = {}
        self.biases: dict[object, ir.Value] = {}

    def change(self, node: ir.Node) -> str | Miss | None:
        """Change one operator; say what was done, or why nothing was."""
        if node.metadata_props.get(_DONE) == self.text:
            return None
        self.edit.at(node)
        places = places_of(node, self.edit)
        if isinstance(places, Miss):
            return places
        if places.longest is not None and places.longest <= self.wanted.reach:
            return Miss(f"{places.longest} keys are all seen: nothing is hidden")
        causal = is_causal(node)
        if op_name(node) == _GQA and causal and self.wanted.is_plain_window:
            return self._narrow(node)
        if attribute(node, "local_window_size", -1) > 0 and self.wanted.tokens:
            return Miss("its own window would hide global tokens")
        self.edit.limit.spend(self.wanted.pattern, node)
        self._mask(node, places, causal=causal)
        node.metadata_props[_DONE] = self.text
        return "masked"

    def _narrow(self, node: ir.Node) -> str | None:
        window = attribute(node, "local_window_size", -1)
        if 0 < window <= self.wanted.reach:
            return None
        self.edit.limit.spend(self.wanted.pattern, node)
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", self.wanted.reach)
        return f"sees {self.wanted.reach} keys"

    def _mask(self, node: ir.Node, places: Places, *, causal: bool) -> None:
        edit = self.edit
        key = (places.key, causal)
        seen = self.seen.get(key)
        if seen is None:
            seen = self.seen[key] = self.wanted.condition(places, edit, causal=causal)
        place = ATTENTION_OPS[op_name(node)]
        if len(node.inputs) <= place:
            node.resize_inputs(place + 1)
        before = node.inputs[place]
        standard = op_name(node) == "Attention"
        if standard and (before is None or edit.dtype(before) == ir.DataType.BOOL):
            after = seen if before is None else edit.op("And", [before, seen])
        else:
            dtype = edit.dtype(node.inputs[0])
            assert dtype is not None
            bias = self.biases.get((key, before, dtype))
            if bias is None:
                bias = self.biases[key, before, dtype] = hide(seen, before, dtype, edit)
            after = bias
        edit.set_input(node, place, after)
