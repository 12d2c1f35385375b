"""Shape inference: element types, symbolic shapes, and the content of small integer tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.shape_rules import control_flow, fallback
from lwc.analysis.shape_rules.registry import (
    RULES,
    UNKNOWN,
    Fact,
    Misfit,
    Site,
    SymbolicArray,
    is_clipped,
    not_one,
    tensor_fact,
)
from lwc.core import dims
from lwc.core.dims import Dim, DimShape, is_anonymous, parse_dim, symbol
from lwc.core.module import Module
from lwc.core.walk import constant_tensor, is_default_domain, op_name

__all__ = ["Fact", "Shapes", "SymbolicArray"]

_BROKEN = (Misfit, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError)
"""What a rule raises where a malformed node breaks its expectations."""


class Shapes(Analysis):
    """What is known of every value of a module.

    Facts hold for every feed that the model accepts under these readings:

    - a dimension name of a graph input is one non-negative integer wherever it appears;
    - extents an operator requires to be equal are equal, and windows fit their padded input;
    - extents that the graph computes with in float32 stay exact, below 2**24;
    - a symbolic extent given to Reshape as a target stands for itself; were it 0 at run time,
      Reshape would copy the input's extent instead.

    What is not known is a fresh symbol of its own. Two values share it only where their extents
    are provably equal. In a Loop or Scan body a fact holds in each iteration, and its fresh
    symbols are that iteration's. A function body is inferred at each call; the facts kept for
    its values are those all calls agree on.

    Args:
        module: The module to describe; it is not changed.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._facts: dict[ir.Value, Fact] = {}
        self._functions = module.model.functions
        self._fresh_count = 0
        self._numbers: dict[Any, int] = {}
        self._fresh_symbols: set[Any] = set()
        self._unknown_integers: set[Any] = set()
        self._broadcasts: dict[tuple[Dim, Dim], Dim] = {}
        self._calls: list[dict[str, ir.Attr]] = []
        self._called: set[Any] = set()
        self._taken = _declared_names(module)
        self.misfits: list[tuple[ir.Node, str]] = []
        """Nodes whose inputs cannot belong to their operator, with the reason."""

    @classmethod
    def build(cls, module: Module, analyses: AnalysisManager | None = None) -> Shapes:
        """Infer the whole module."""
        shapes = cls(module)
        for value in module.graph.inputs:
            shapes._facts[value] = shapes._declared_input(value)
        shapes.visit(module.graph)
        control_flow.visit_uncalled_functions(shapes, module)
        return shapes

    # Questions

    def fact(self, value: ir.Value) -> Fact:
        """Return everything known of a value; it is inferred now if it is new."""
        found = self._facts.get(value)
        return found if found is not None else self._missing(value)

    def shape(self, value: ir.Value) -> DimShape | None:
        """Return the shape, or None if not even the rank is known."""
        return self.fact(value).shape

    def rank(self, value: ir.Value) -> int | None:
        """Return the number of axes, or None."""
        shape = self.fact(value).shape
        return None if shape is None else len(shape)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return the element type of a tensor, or None."""
        return self.fact(value).dtype

    def known(self, value: ir.Value) -> SymbolicArray | None:
        """Return the content of a small tensor, or None.

        The array has the value's shape. An element is an int, a bool, a float (short
        floating-point tensors only) or a sympy expression; a symbol for which `is_unknown` holds
        stands for content that is not known. Do not write to it.
        """
        return self.fact(value).known

    def nbytes(self, value: ir.Value) -> Dim | None:
        """Return the number of bytes of a tensor, or None.

        Types under eight bits are packed; a symbolic number of elements is not rounded up.
        """
        fact = self.fact(value)
        if fact.shape is None or fact.dtype is None or fact.dtype == ir.DataType.STRING:
            return None
        bits = dims.multiply(dims.product(fact.shape), fact.dtype.bitwidth)
        return -(-bits // 8) if isinstance(bits, int) else dims.quotient(bits, 8)

    def equal(self, a: Dim, b: Dim) -> bool:
        """Tell whether two extents are provably equal."""
        return dims.equal(a, b)

    def is_fresh(self, dim: Dim) -> bool:
        """Tell whether `dim` is a symbol that only says that an extent is not known."""
        return dim in self._fresh_symbols

    def is_unknown(self, element: Any) -> bool:
        """Tell whether an element of known content stands for an integer of any sign."""
        return element in self._unknown_integers

    def mentions_fresh(self, dim: Dim) -> bool:
        """Tell whether `dim` depends on an extent that is not known."""
        if isinstance(dim, int):
            return False
        return any(
            s in self._fresh_symbols or s in self._unknown_integers for s in dim.free_symbols
        )

    def own_symbols(self, dim: Any) -> list[Any]:
        """Return the symbols of `dim` that this analysis made, in the order it made them."""
        found = [s for s in getattr(dim, "free_symbols", ()) if s in self._numbers]
        return sorted(found, key=self._numbers.__getitem__)

    def differs_from(self, other: Shapes) -> str | None:
        """Name a value of the module on which two analyses differ, fresh symbols' names aside."""
        from lwc.analysis.shape_comparison import first_difference

        return first_difference(self, other, self._module)

    # Upkeep during rewrites

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._facts

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return self._module.opset

    def infer(self, node: ir.Node) -> None:
        """Infer the outputs of a node made or changed during a rewrite.

        What was inferred at the calls of a function stays for nodes with an attribute that the
        calls decide.
        """
        inputs = [None if value is None else self.fact(value) for value in node.inputs]
        self._apply(node, inputs)

    # For the rules

    def fresh(self) -> Dim:
        """Return a new symbol for an extent that is not known."""
        self._fresh_count += 1
        made = symbol(f"unk__{self._fresh_count}")
        self._fresh_symbols.add(made)
        self._numbers[made] = self._fresh_count
        return made

    def fresh_integer(self) -> Any:
        """Return a new symbol for tensor content that is not known: an integer of any sign."""
        self._fresh_count += 1
        made = dims.integer(f"int__{self._fresh_count}")
        self._unknown_integers.add(made)
        self._numbers[made] = self._fresh_count
        return made

    def made_since(self, dim: Dim, count: int) -> bool:
        """Tell whether `dim` depends on a symbol made when `fresh_count` was above `count`."""
        if isinstance(dim, int):
            return False
        return any(self._numbers.get(s, 0) > count for s in dim.free_symbols)

    @property
    def fresh_count(self) -> int:
        """How many symbols were made so far."""
        return self._fresh_count

    def broadcast(self, shapes: Sequence[DimShape | None]) -> DimShape | None:
        """Return the shape numpy broadcasting gives, or None if a rank is not known.

        Raises:
            Misfit: Two extents are different numbers and neither is 1.
        """
        result: DimShape | None = None
        for shape in shapes:
            if shape is None:
                return None
            result = shape if result is None else self._broadcast_two(result, shape)
        return result

    def _broadcast_two(self, a: DimShape, b: DimShape) -> DimShape:
        if len(a) < len(b):
            a, b = b, a
        lead = len(a) - len(b)
        return a[:lead] + tuple(map(self.broadcast_dim, a[lead:], b))

    def broadcast_dim(self, a: Dim, b: Dim) -> Dim:
        """Return the extent two extents broadcast to.

        Of two different symbols either may be 1 at run time, so their result is a fresh symbol,
        the same one each time, unless one of them is provably not 1. `Min(n, a)` with `a` (a
        table cut to a length) gives `a`: the two are 1 together, and else must be equal.
        """
        if a is b or a == b:
            return a
        if isinstance(a, int):
            if a == 1:
                return b
            if isinstance(b, int):
                if b == 1:
                    return a
                raise Misfit(f"extents {a} and {b} do not broadcast")
            return a
        if isinstance(b, int):
            return a if b == 1 else b
        found = self._broadcasts.get((a, b))
        if found is None:
            if dims.equal(a, b) or not_one(a) or is_clipped(b, a):
                found = a
            elif not_one(b) or is_clipped(a, b):
                found = b
            else:
                found = self.fresh()
            self._broadcasts[a, b] = self._broadcasts[b, a] = found
        return found

    def call_attribute(self, name: str | None) -> ir.Attr | None:
        """Return an attribute of the innermost function call under inference."""
        return self._calls[-1].get(name or "") if self._calls else None

    def visit(self, graph: Iterable[ir.Node]) -> None:
        """Infer the nodes of a graph in order; its inputs must have facts."""
        facts = self._facts
        for node in graph:
            inputs: list[Fact | None] = []
            for value in node.inputs:
                if value is None:
                    inputs.append(None)
                else:
                    inputs.append(facts.get(value) or self._missing(value))
            self._apply(node, inputs)

    def set_fact(self, value: ir.Value, fact: Fact) -> None:
        """Record what is known of an input of a body."""
        self._facts[value] = fact

    def call(
        self, function: ir.Function, attributes: dict[str, ir.Attr], inputs: Sequence[Fact | None]
    ) -> list[Fact]:
        """Infer a function body for one call and return the facts of its outputs."""
        key = function.identifier()
        if key in self._called:
            return [UNKNOWN] * len(function.outputs)
        with self._inside(key, attributes) as outer:
            for index, value in enumerate(function.inputs):
                given = inputs[index] if index < len(inputs) else None
                self._facts[value] = given or UNKNOWN
            self.visit(function)
            results = [self.fact(value) for value in function.outputs]
            for value, fact in self._facts.items():
                before = outer.get(value)
                outer[value] = fact if before is None else control_flow.agreed(before, fact)
        return results

    @contextmanager
    def _inside(self, key: Any, attributes: dict[str, ir.Attr]) -> Iterator[dict[ir.Value, Fact]]:
        outer, self._facts = self._facts, {}
        self._called.add(key)
        self._calls.append(attributes)
        try:
            yield outer
        finally:
            self._calls.pop()
            self._called.discard(key)
            self._facts = outer

    # One node

    def _apply(self, node: ir.Node, inputs: list[Fact | None]) -> None:
        name = node.op_type if is_default_domain(node) else op_name(node)
        if self._functions and not self._calls and _refers(node):
            for value in node.outputs:
                self._facts.setdefault(value, UNKNOWN)
            return
        site = Site(node, inputs, self)
        try:
            function = self._functions.get(node.op_identifier()) if self._functions else None
            if function is not None:
                outcome = control_flow.infer_call(site, function)
            else:
                rule = RULES.get(name)
                outcome = fallback.infer(site) if rule is None else rule(site)
        except _BROKEN as error:
            self.misfits.append((node, str(error) or type(error).__name__))
            outcome = ()
        if isinstance(outcome, Fact):
            outcome = (outcome,)
        facts, given = self._facts, len(outcome)
        for index, value in enumerate(node.outputs):
            facts[value] = outcome[index] if index < given else UNKNOWN

    def _missing(self, value: ir.Value) -> Fact:
        """Find out about a value met for the first time, with what it is computed from."""
        stack, entered = [value], set()
        while stack:
            current = stack[-1]
            if current in self._facts:
                stack.pop()
                continue
            node = current.producer()
            if node is None:
                self._facts[current] = self._leaf(current)
                stack.pop()
                continue
            waiting = [v for v in node.inputs if v is not None and v not in self._facts]
            if waiting and current in entered:
                # The value depends on itself: a graph that does not verify.
                self._facts[current] = UNKNOWN
            elif waiting:
                entered.add(current)
                stack.extend(waiting)
            else:
                self.infer(node)
                stack.pop()
        return self._facts[value]

    def _leaf(self, value: ir.Value) -> Fact:
        tensor = constant_tensor(value)
        if tensor is not None:
            return tensor_fact(tensor)
        if value.is_initializer() and value.const_value is not None:
            return tensor_fact(value.const_value)._replace(known=None)
        if value.graph is self._module.graph:
            return self._declared_input(value)
        # An input of a body: what it declares need not hold where the body is used.
        return Fact(value.dtype)

    def _declared_input(self, value: ir.Value) -> Fact:
        """Describe a graph input by its declaration, anonymous extents by symbols named for it."""
        return self._from_type(value.type, value.shape, value.name)

    def _from_type(
        self, kind: ir.TypeProtocol | None, shape: ir.Shape | None, name: str | None
    ) -> Fact:
        if isinstance(kind, ir.SequenceType | ir.OptionalType):
            element = kind.elem_type
            inner = element if not isinstance(element, ir.DataType) else None
            return Fact(element=self._from_type(inner, None, None))
        dtype = None if kind is None else kind.dtype
        if shape is None:
            return Fact(dtype)
        return Fact(dtype, tuple(self._declared_dim(d, i, name) for i, d in enumerate(shape)))

    def _declared_dim(self, dim: int | ir.SymbolicDim, axis: int, name: str | None) -> Dim:
        if isinstance(dim, int):
            return dim if dim >= 0 else self._anonymous(name, axis)
        text = dim.value
        if text is None or is_anonymous(text):
            return self._anonymous(name, axis)
        return parse_dim(text)

    def _anonymous(self, name: str | None, axis: int) -> Dim:
        base = f"{name}_dim{axis}" if name else "dim"
        while base in self._taken:
            base += "_"
        self._taken.add(base)
        return symbol(base)

    def hint(self, value: ir.Value) -> Fact:
        """Describe an output by what the file says of it, for operators without a rule."""
        if isinstance(value.type, ir.SequenceType | ir.OptionalType):
            return self._from_type(value.type, None, None)
        shape = value.shape
        if shape is not None:
            known = {
                s
                for v in self._module.graph.inputs
                for d in (self.fact(v).shape or ())
                if not isinstance(d, int)
                for s in d.free_symbols
            }
            extents = []
            for dim in shape:
                if isinstance(dim, int):
                    extents.append(dim if dim >= 0 else self.fresh())
                    continue
                parsed = None if is_anonymous(dim.value) else parse_dim(dim.value or "")
                good = parsed is not None and parsed.free_symbols <= known
                extents.append(parsed if good else self.fresh())
            return Fact(value.dtype, tuple(extents))
        if isinstance(value.type, ir.TensorType):
            return Fact(value.dtype)
        return UNKNOWN


def _refers(node: ir.Node) -> bool:
    """Tell whether an attribute is a parameter of the function around."""
    return any(attribute.is_ref() for attribute in node.attributes.values())


def _declared_names(module: Module) -> set[str]:
    names: set[str] = set()
    for value in module.graph.inputs:
        for dim in value.shape or ():
            if not isinstance(dim, int) and dim.value is not None and not is_anonymous(dim.value):
                names.update(s.name for s in parse_dim(dim.value).free_symbols)
    return names
