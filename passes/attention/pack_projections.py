"""pack-projections: linear operators that read one activation become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import onnx_ir as ir

from lwc.core.walk import op_name
from lwc.passes.attention.linears import LINEAR_OPS, Linear, difference, join, linear_of
from lwc.passes.attention.packing_gain import DECODE, PREFILL, Gain
from lwc.pipeline.passes import Exact, PassContext
from lwc.pipeline.rule_pass import AnyRule, RulePass
from lwc.rewrite import EDITED, Editor, Miss, Rule, attribute, producer_of
from lwc.rewrite.rules import Outcome

__all__ = ["PackProjections"]

When: TypeAlias = Literal["auto", "decode", "prefill", "always"]

_GQA = "com.microsoft::GroupQueryAttention"
_QUANTIZED_CACHE = (12, 13)

_SIZES: dict[When, tuple[int, ...]] = {
    "auto": (DECODE, PREFILL), "decode": (DECODE,), "prefill": (PREFILL,), "always": (),
}  # fmt: skip


@dataclass(frozen=True)
class PackProjections(RulePass):
    """Compute linear operators that read one activation as one, with joined weights.

    Query, key and value projections of a GroupQueryAttention go into it whole, also where they
    are one already and are cut apart before it; other results are cut apart by a Split. Biases are
    joined too, zeros where an operator has none. Weights that something else reads are left alone,
    and quantized ones must have the same bits and blocks.

    Attributes:
        when: When to pack: `auto` where it pays for one token and for a prompt of 512, `decode`
            where it pays for one token, `prefill` for a prompt, `always` in any case. The cost
            model decides: by predicted time on the measured target of a run, and without one by
            the bytes that are moved.
    """

    when: When = "auto"

    name: ClassVar[str] = "pack-projections"
    contract: ClassVar[Exact] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes"})

    def find_rules(self) -> Iterable[AnyRule]:
        """Return the rules as they are without a measured target."""
        return self._rules(None)

    def rules_under(self, ctx: PassContext) -> Iterable[AnyRule]:
        """Return the rules, which ask the context's target."""
        return self._rules(ctx)

    def _rules(self, ctx: PassContext | None) -> tuple[Rule, ...]:
        packing = _Packing(self.when, ctx)
        return (
            Rule("into-attention", (_GQA,), packing.into_attention),
            Rule("uncut-into-attention", (_GQA,), uncut_into_attention),
            Rule("with-split", LINEAR_OPS, packing.with_split),
        )


class _Packing:
    """The rules, and what they remember of a run."""

    def __init__(self, when: When, ctx: PassContext | None) -> None:
        self._tokens = _SIZES[when]
        self._ctx = ctx
        self._gain: Gain | None = None
        self._places: dict[ir.Node, int] = {}

    def into_attention(self, node: ir.Node, edit: Editor) -> Outcome:
        """Projections of query, key and value go into attention as one."""
        found = _projections(node, edit)
        if not isinstance(found, tuple):
            return found
        objection = self._objection(found, edit, cut=False)
        if objection is not None:
            return Miss(objection)
        edit.set_input(node, 0, join(found, edit))
        for place in (1, 2):
            edit.set_input(node, place, None)
        for each in found:
            _let_go(each.end, each.source, edit)
            _erase(each, edit)
        return EDITED

    def with_split(self, node: ir.Node, edit: Editor) -> Outcome:
        """Linear operators that read one activation become one and a Split."""
        own = linear_of(node, edit)
        if not isinstance(own, Linear) or _is_packed(own, edit):
            return own if isinstance(own, Miss) and _has_siblings(node) else None
        group, other = self._group(own, edit)
        if group[0].node is not node:
            return None  # the first of a group speaks for it
        if len(group) == 1:
            return other
        objection = self._objection(group, edit, cut=True)
        if objection is not None:
            return Miss(objection)
        sizes = edit.constant([each.columns for each in group], "sizes")
        packed = join(group, edit)
        parts = edit.node("Split", [packed, sizes], {"axis": -1}, outputs=len(group))
        for each, part in zip(group, parts.outputs, strict=True):
            edit.replace(each.end, part)
        for each in group:
            _erase(each, edit)
        return EDITED

    def _group(self, own: Linear, edit: Editor) -> tuple[list[Linear], Miss | None]:
        """Return the operators that can become one with `own`, in order; why others cannot."""
        group, other = [own], None
        for user in dict.fromkeys(use.node for use in own.source.uses()):
            if user is own.node or user.graph is not own.node.graph or edit.is_dead(user):
                continue
            found = linear_of(user, edit)
            if isinstance(found, Miss):
                other = found
            if not isinstance(found, Linear) or found.source is not own.source:
                continue
            if _is_packed(found, edit):
                continue
            reason = difference(own, found)
            if reason is None:
                group.append(found)
            else:
                other = Miss(f"operators that read the same differ: {reason}", user)
        return sorted(group, key=lambda each: self._place(each.node, edit)), other

    def _place(self, node: ir.Node, edit: Editor) -> int:
        """Return where a node stands among those of its graph."""
        if node not in self._places:
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            self._places.update((each, index) for index, each in enumerate(graph))
        return self._places[node]

    def _objection(self, linears: Sequence[Linear], edit: Editor, *, cut: bool) -> str | None:
        if self._gain is None:
            target = None if self._ctx is None else self._ctx.find_target()
            self._gain = Gain(target, edit.module.opset)
        return self._gain.objection(linears, self._tokens, cut=cut)


def _projections(node: ir.Node, edit: Editor) -> tuple[Linear, ...] | Miss | None:
    """Return the projections of query, key and value that attention can take as one."""
    if len(node.inputs) < 3 or any(value is None for value in node.inputs[:3]):
        return None
    found = [_projection(value, edit) for value in node.inputs[:3]]
    missed = next((each for each in found if isinstance(each, Miss)), None)
    linears = tuple(each for each in found if isinstance(each, Linear))
    if missed is not None or len(linears) < 3:
        return missed
    query, key, value = linears
    if not query.source is key.source is value.source:
        return None
    if not all(_is_read_once(each.end, each.source, edit) for each in linears):
        return Miss("something else reads its query, key or value too")
    if any(each.node.graph is not node.graph for each in linears):
        return Miss("its projections belong to another graph")
    for each in (key, value):
        reason = difference(query, each)
        if reason is not None:
            return Miss(f"its projections differ: {reason}", each.node)
    if _has_quantized_cache(node):
        return Miss("its cache is quantized")
    heads, groups = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    if heads == 0 or key.columns != value.columns or query.columns * groups != key.columns * heads:
        return Miss("its heads differ in size")
    return linears


def _projection(value: ir.Value | None, edit: Editor) -> Linear | Miss | None:
    """Read the linear operator, and the sum with its bias, that a value comes from."""
    node = producer_of(value, "Add")
    steps = [value] if node is None else [value, *node.inputs]
    for each in steps:
        made = None if each is None else each.producer()
        found = None if made is None else linear_of(made, edit)
        if isinstance(found, Linear):
            return found if found.end is value else None
        if found is not None:
            return found
    return None


def _is_packed(linear: Linear, edit: Editor) -> bool:
    """Tell whether an operator gives several results already, or will go into attention."""
    uses = _readers(linear.end, linear.source, edit)
    if len(uses) != 1 or linear.end.is_graph_output():
        return False
    user, place = uses[0]
    if op_name(user) == _GQA:
        whole = place == 0 and (len(user.inputs) < 2 or user.inputs[1] is None)
        return whole or isinstance(_projections(user, edit), tuple)
    rank = edit.rank(linear.end)
    axis = attribute(user, "axis", 0)
    return op_name(user) == "Split" and place == 0 and axis in (-1, (rank or 0) - 1)


def uncut_into_attention(node: ir.Node, edit: Editor) -> Outcome:
    """Query, key and value that are cut out of one value go into attention as one."""
    if len(node.inputs) < 3 or any(value is None for value in node.inputs[:3]):
        return None
    cut = producer_of(node.inputs[0], "Split")
    if cut is None or tuple(cut.outputs) != tuple(node.inputs[:3]):
        return None
    whole, rank = cut.inputs[0], edit.rank(cut.inputs[0])
    if whole is None or rank is None or attribute(cut, "axis", 0) not in (-1, rank - 1):
        return None
    if not all(_is_read_once(part, whole, edit) for part in cut.outputs):
        return Miss("something else reads its query, key or value too", cut)
    if _has_quantized_cache(node):
        return Miss("its cache is quantized")
    edit.set_input(node, 0, whole)
    for place in (1, 2):
        edit.set_input(node, place, None)
    for part in cut.outputs:
        _let_go(part, whole, edit)
    edit.erase(cut)
    return EDITED


def _has_quantized_cache(node: ir.Node) -> bool:
    return any(place < len(node.inputs) and node.inputs[place] for place in _QUANTIZED_CACHE)


def _is_read_once(value: ir.Value, source: ir.Value, edit: Editor) -> bool:
    return len(_readers(value, source, edit)) == 1 and not value.is_graph_output()


def _let_go(value: ir.Value, source: ir.Value, edit: Editor) -> None:
    """Let what asks for the length of a value ask its source."""
    for user, place in list(value.uses()):
        edit.set_input(user, place, source)


def _readers(value: ir.Value, source: ir.Value, edit: Editor) -> list[tuple[ir.Node, int]]:
    """Return what reads a value, but for what asks for extents that its source has too."""
    rank = edit.rank(value) if edit.rank(value) == edit.rank(source) else None
    return [
        (use.node, use.idx)
        for use in value.uses()
        if rank is None or not _asks_for_lengths(use.node, rank, edit)
    ]


def _asks_for_lengths(node: ir.Node, rank: int, edit: Editor) -> bool:
    """Tell whether a node is a Shape of which nothing takes the last extent."""
    if op_name(node) != "Shape" or node.outputs[0].is_graph_output():
        return False
    if attribute(node, "start", 0) or "end" in node.attributes:
        return False
    for user, place in node.outputs[0].uses():
        picked = edit.ints(user.inputs[1]) if op_name(user) == "Gather" and place == 0 else None
        if picked is None or not all(0 <= axis < rank - 1 for axis in picked):
            return False
    return True


def _has_siblings(node: ir.Node) -> bool:
    source = node.inputs[0]
    users = [] if source is None else [use.node for use in source.uses()]
    return any(user is not node and op_name(user) in LINEAR_OPS for user in users)


def _erase(linear: Linear, edit: Editor) -> None:
    """Remove an operator and the sum with its bias, which nothing reads any more."""
    made = linear.end.producer()
    if made is not None and made.graph is not None and edit.is_dead(made):
        edit.erase(made)
