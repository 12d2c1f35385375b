"""onnxscript's pattern matcher, made to remember how far it got and what stopped it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern as language

from lwc.core.walk import constant_tensor, op_name

__all__ = ["Matcher", "Stop"]

_SHOWN = 8
"""Elements of a constant that a reason quotes."""


@dataclass(frozen=True)
class Stop:
    """Where a match failed.

    Attributes:
        matched: Nodes of the pattern that had been found by then.
        node: The furthest node reached: the one that is not what the pattern wants, or whose
            input or attribute is not.
        raw: The condition that failed, in onnxscript's words or ours.
        involved: The nodes, values and attributes it is about.
    """

    matched: int
    node: ir.Node
    raw: str
    involved: tuple[Any, ...] = ()

    @property
    def reason(self) -> str:
        """The condition that failed, in a sentence; most stops are never read."""
        reason = " ".join(self.raw.split()).removesuffix(".")
        repeated = re.fullmatch(r"Binding failure: (.*) bound to two different values", reason)
        if repeated:
            names = [_named(each) for each in self.involved[-2:]]
            return f"'{repeated[1]}' stands for both {' and '.join(names)}"
        reason = reason.removeprefix("Mismatch: ")
        return reason[:1].lower() + reason[1:] or "it does not fit the pattern"


class Matcher(language.SimplePatternMatcher):
    """Matches one pattern; `stop` tells why the last match failed.

    Departs from onnxscript in what a constant is: a Constant node counts, an initializer that is
    also a graph input does not, because the caller may feed something else. A node whose
    attributes are a function's parameters matches nothing.
    """

    def __init__(self, pattern: Any) -> None:
        super().__init__(pattern)
        self.stop: Stop | None = None
        self._path: list[ir.Node] = []

    def match(self, *arguments: Any, **options: Any) -> Any:
        """Match as onnxscript does, from a clean state."""
        self.stop = None
        self._path = []
        return super().match(*arguments, **options)

    def _match_node(self, pattern_node: Any, node: ir.Node) -> bool:
        self._path.append(node)
        try:
            known = self._match.lookup_node(pattern_node) is not None
            found = (known or self._fits(pattern_node, node)) and super()._match_node(
                pattern_node, node
            )
            return self._noted(bool(found))
        finally:
            self._path.pop()

    def _match_value(self, pattern_value: Any, value: ir.Value | None) -> bool:
        return self._noted(bool(super()._match_value(pattern_value, value)))

    def _match_node_output(self, pattern_value: Any, value: ir.Value) -> bool:
        if value.producer() is None:
            kind = "graph input" if value.is_graph_input() else "weight"
            expected = _pattern_name(pattern_value.producer())
            return bool(self.fail(f"expected {expected}, found the {kind} '{value.name}'"))
        return bool(super()._match_node_output(pattern_value, value))

    def _match_constant(self, pattern_constant: Any, value: ir.Value) -> bool:
        wanted = pattern_constant.value
        tensor = constant_tensor(value)
        if tensor is None:
            what = "a graph input" if value.is_graph_input() else "computed"
            return bool(self.fail(f"expected the constant {wanted}, '{value.name}' is {what}"))
        expected = np.asarray(wanted, dtype=np.float64)
        if tuple(tensor.shape.numpy()) != expected.shape:
            shape = list(tensor.shape.numpy())
            return bool(
                self.fail(f"expected the constant {wanted}, '{value.name}' has the shape {shape}")
            )
        content = tensor.numpy()
        numeric = content.dtype.kind != "O"
        tolerances = {"rtol": pattern_constant._rel_tol, "atol": pattern_constant._abs_tol}
        if not numeric or not np.allclose(content.astype(np.float64), expected, **tolerances):
            shown = ", ".join(map(str, content.ravel()[:_SHOWN].tolist()))
            return bool(self.fail(f"expected the constant {wanted}, '{value.name}' is {shown}"))
        return True

    def _fits(self, pattern_node: Any, node: ir.Node) -> bool:
        """Compare operator and attributes; onnxscript would say less about it."""
        expected, found = _pattern_name(pattern_node), op_name(node)
        if not (pattern_node.op.matches(node.op_type) and pattern_node.domain.matches(node.domain)):
            return bool(self.fail(f"expected {expected}, found {found}", node))
        if any(each.is_ref() for each in node.attributes.values()):
            return bool(self.fail("its attributes are parameters of a function", node))
        for name, wanted in pattern_node.attributes.items():
            attribute = node.attributes.get(name)
            if attribute is None:
                if not wanted.can_match_none:
                    return bool(self.fail(f"expected {name}={wanted}, it has no {name}", node))
            elif not wanted.matches(attribute):
                shown = _shown_attribute(attribute)
                return bool(self.fail(f"expected {name}={wanted}, it has {name}={shown}", node))
        return True

    def _noted(self, found: bool) -> bool:
        """Remember a failure unless an earlier one got as far."""
        if not found:
            matched = self._match.num_matched_nodes()
            if self._path and (self.stop is None or matched > self.stop.matched):
                match = self._match
                involved = tuple(match.failure_nodes_and_values)
                self.stop = Stop(matched, self._path[-1], str(match.reason), involved)
        return found


def _pattern_name(pattern_node: Any) -> str:
    domain, op = str(pattern_node.domain), str(pattern_node.op)
    return f"{domain}::{op}" if domain else op


def _shown_attribute(attribute: ir.Attr) -> str:
    value = attribute.value
    return str(list(value) if isinstance(value, tuple) else value)


def _named(item: Any) -> str:
    if isinstance(item, ir.Attr):
        return _shown_attribute(item)
    name = getattr(item, "name", None)
    return f"'{name}'" if name else "nothing"
