"""From a pattern rule, the graphs that it should rewrite, and their near misses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from hypothesis import strategies as st

from lwc.core.dims import equal, parse_dim
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.rewrite.patterns import PatternRule, pattern_rule
from lwc.verify.generate.choices import Choices, even_source
from lwc.verify.generate.leaves import Leaf
from lwc.verify.generate.near_misses import with_near_misses
from lwc.verify.generate.pattern_search import Plan, Searcher, plainly
from lwc.verify.generate.sketch import OPSETS, Motif, Sketch
from lwc.verify.generate.validity import is_valid

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["is_matchable", "matching", "pattern_motif"]

FLOAT = ir.DataType.FLOAT


def matching(
    rule: PatternRule | type[PatternRule],
    *,
    near_misses: int = 2,
    opset: int | None = None,
    evenly: bool = False,
) -> SearchStrategy[Module]:
    """Return a strategy of graphs in which a rule's pattern is found, and of near misses.

    What stands for the pattern's variables is searched for: a graph input, a weight or a number
    of some shape and type, such that every operator takes it and ONNX Runtime runs the graph.
    Those that the rule's `check` accepts come first. The match may stand behind other nodes, in
    front of others, and twice in one graph.

    Args:
        rule: The rule, or its class.
        near_misses: The largest number of small changes to a graph; 0 gives matches only.
        opset: Version of the standard operator set; drawn by default.
        evenly: See `sketches`.

    Raises:
        LwcError: No graph is found, when the strategy is drawn from.
    """
    strategy = _matches(_Found(rule), opset, evenly)
    if not near_misses:
        return strategy
    return with_near_misses(strategy, most=near_misses, evenly=evenly)


def is_matchable(rule: PatternRule) -> bool:
    """Tell whether `matching` finds a graph for a rule."""
    try:
        _Found(rule).opset(OPSETS[0], OPSETS)
    except LwcError:
        return False
    return True


def pattern_motif(rule: PatternRule | type[PatternRule]) -> Motif:
    """Return a motif that adds what a rule's pattern matches; see `matching`."""
    found = _Found(rule)
    return Motif(found.rule.name, found.grow)


class _Found:
    """The plans of a rule, searched for at each opset when they are first needed."""

    def __init__(self, rule: PatternRule | type[PatternRule]) -> None:
        pattern_rule(rule)  # Says what is wrong with a class that is no rule.
        self.rule = rule() if isinstance(rule, type) else rule
        self._searchers: dict[int, Searcher] = {}
        self._plans: dict[int, tuple[list[Plan], list[Plan]]] = {}

    def at(self, opset: int) -> tuple[list[Plan], list[Plan]]:
        """Return the plans for an opset: those that the rule rewrites, and others."""
        if opset not in self._plans:
            searcher = self._searchers[opset] = Searcher(self.rule, opset)
            known = [p for legal, others in self._plans.values() for p in (*legal, *others)]
            self._plans[opset] = searcher.find(known)
        return self._plans[opset]

    def grow(self, sketch: Sketch) -> list[ir.Value]:
        """Add the graph of a plan, seldom of one that the rule does not rewrite."""
        legal, others = self.at(sketch.opset)
        if not legal and not others:
            sketch.drop()  # Its operators are those of another opset.
        plans = others if not legal or (others and sketch.rarely()) else legal
        return self._searchers[sketch.opset].build(sketch.choose(*plans), sketch, _placed)

    def opset(self, wished: int, others: tuple[int, ...]) -> int:
        """Return the opset wished for, or another one that has plans."""
        for opset in (wished, *others):
            if any(self.at(opset)):
                return opset
        raise LwcError(
            f"no graph was found that the pattern of rule '{self.rule.name}' matches",
            remedy="give graphs= a strategy, made with lwc.verify.sketches and a Motif of your own",
        )


def _matches(found: _Found, opset: int | None, evenly: bool) -> SearchStrategy[Module]:
    @st.composite
    def grow(draw: DrawFn) -> Module:
        source = even_source(draw, evenly)
        if opset is None:
            chosen = found.opset(Choices(draw, source).choose(*OPSETS), OPSETS)
        else:
            chosen = found.opset(opset, ())
        sketch = Sketch(draw, chosen, source)
        motif = Motif(found.rule.name, found.grow)
        results = motif(sketch)
        if sketch.flip():
            _after(sketch, results)
        if sketch.flip():
            results = motif(sketch)
            if sketch.flip():
                _after(sketch, results)
        module = sketch.finish()
        if not is_valid(module):
            sketch.drop()  # Such as the root of what another node made negative.
        return module

    return grow()


def _placed(sketch: Sketch, leaf: Leaf) -> ir.Value:
    """Add a leaf; what stands for an input may be a value that is there, or made by a node."""
    if leaf.content is not None or not sketch.flip():
        return plainly(sketch, leaf)
    wanted = [extent if isinstance(extent, int) else parse_dim(extent) for extent in leaf.shape]
    found = [
        value
        for value in sketch.values
        if sketch.dtype(value) == leaf.dtype
        and (shape := sketch.shapes.shape(value)) is not None
        and len(shape) == len(wanted)
        and all(map(equal, shape, wanted))
    ]
    source = sketch.choose(*reversed(found)) if found else plainly(sketch, leaf)
    if leaf.dtype == FLOAT and sketch.flip():
        return sketch.emit(sketch.choose("Tanh", "Neg", "Relu"), source)
    return source


def _after(sketch: Sketch, results: list[ir.Value]) -> None:
    """Let something read the results."""
    for value in results:
        if sketch.dtype(value) == FLOAT:
            form = sketch.choose("unary", "twice")
            if form == "unary":
                sketch.keep(sketch.emit(sketch.choose("Tanh", "Relu", "Neg"), value))
            else:
                sketch.keep(sketch.emit("Add", value, value))
        else:
            sketch.keep(sketch.emit("Identity", value))
