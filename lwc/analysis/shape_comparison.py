"""Do two shape analyses of one module say the same, whatever they call what is not known?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lwc.core.diagnostics import describe
from lwc.core.dims import equal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from lwc.analysis.shape_rules.registry import Fact, SymbolicArray
    from lwc.analysis.shapes import Shapes
    from lwc.core.module import Module

__all__ = ["first_difference"]


def first_difference(a: Shapes, b: Shapes, module: Module) -> str | None:
    """Name a value of `module` of which `a` and `b` say different things, or return None."""
    matching = _Matching(a, b)
    for value in _values(module):
        mine, theirs = a.fact(value), b.fact(value)
        if not matching.facts(mine, theirs):
            return f"'{value.name}' is {_written(mine)}, built anew {_written(theirs)}"
    misfits = {node for node, _ in a.misfits} ^ {node for node, _ in b.misfits}
    for node in misfits:
        return f"only one of the two finds that the inputs of {describe(node)} do not fit"
    return None


def _values(module: Module) -> Iterator[ir.Value]:
    for graph in module.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


class _Matching:
    """Pairs the symbols that two analyses made: one for one, the same pair everywhere."""

    def __init__(self, a: Shapes, b: Shapes) -> None:
        self.a = a
        self.b = b
        self.to_b: dict[Any, Any] = {}
        self.to_a: dict[Any, Any] = {}

    def facts(self, x: Fact, y: Fact) -> bool:
        if x.dtype != y.dtype or (x.shape is None) != (y.shape is None):
            return False
        if x.shape is not None and y.shape is not None:
            if len(x.shape) != len(y.shape):
                return False
            if not all(map(self.elements, x.shape, y.shape)):
                return False
        if not self.contents(x.known, y.known):
            return False
        if x.element is None or y.element is None:
            return x.element is y.element
        return self.facts(x.element, y.element)

    def contents(self, x: SymbolicArray | None, y: SymbolicArray | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.shape == y.shape and all(map(self.elements, x.flat, y.flat))

    def elements(self, x: Any, y: Any) -> bool:
        """Compare two extents, or two elements of known content."""
        plain = isinstance(x, int | float), isinstance(y, int | float)
        if any(plain):
            return (
                all(plain) and type(x) is type(y) and (x == y or (math.isnan(x) and math.isnan(y)))
            )
        mine, theirs = self.a.own_symbols(x), self.b.own_symbols(y)
        if len(mine) != len(theirs):
            return False
        # Those that are paired first; what remains is paired in the order of its making.
        paired = [s for s in mine if s in self.to_b]
        if any(self.to_b[s] not in theirs for s in paired):
            return False
        left = [t for t in theirs if t not in self.to_a]
        new = [s for s in mine if s not in self.to_b]
        if len(left) != len(new):
            return False
        for s, t in zip(new, left, strict=True):
            self.to_b[s], self.to_a[t] = t, s
        if mine:
            x = x.xreplace({s: self.to_b[s] for s in mine})
        return bool(x == y) or equal(x, y)


def _written(fact: Fact) -> str:
    if fact.element is not None:
        return f"a sequence of {_written(fact.element)}"
    dtype = "of unknown type" if fact.dtype is None else fact.dtype.name
    shape = "[…]" if fact.shape is None else f"[{', '.join(map(str, fact.shape))}]"
    if fact.known is None:
        return f"{dtype} {shape}"
    return f"{dtype} {shape} = {{{', '.join(map(str, fact.known.ravel().tolist()[:8]))}}}"
