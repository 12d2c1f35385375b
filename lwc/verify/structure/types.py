"""Types and shapes: does what a module states agree with what it computes?

Real files state wrong shapes, and some have operators whose inputs do not fit, mostly in branches
that never run. So a module can be held against what it was before a pass: only what the pass
brought in counts then.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import onnx_ir as ir

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.shape_rules.registry import Fact
from lwc.analysis.shapes import Shapes
from lwc.core.diagnostics import describe, neighbourhood
from lwc.core.dims import Dim, bind, is_anonymous, parse_dim
from lwc.core.errors import VerificationError
from lwc.core.module import Module
from lwc.core.schemas import STANDARD_DOMAINS, FormalType, OperatorTypes, operator_types
from lwc.core.walk import attribute_graphs

__all__ = ["Clash", "TypeState", "check_types", "verify_types"]

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_TENSORS = (ir.AttributeType.TENSOR, ir.AttributeType.SPARSE_TENSOR)
_CONTAINERS = (ir.SequenceType, ir.OptionalType)
_Stated: TypeAlias = tuple[object, tuple[int | str | None, ...] | None]


@dataclass(frozen=True)
class Clash:
    """Something stated or required that contradicts what is inferred.

    Attributes:
        place: The value it is about, or the first named output of the node.
        problem: What contradicts what, in one clause that does not name the place.
        node: The node, if there is one.
        operator: Whether the operator is at fault rather than a statement about its output.
        axis: The axis that a statement is wrong about, if it is about one.
    """

    place: str
    problem: str
    node: ir.Node | None
    operator: bool = False
    axis: int | None = None

    @property
    def key(self) -> tuple[str, bool, int | None]:
        """What it is about; how it is worded may change."""
        return self.place, self.operator, self.axis

    def __str__(self) -> str:
        return self.problem if self.operator else f"'{self.place}' {self.problem}"


class _Use(NamedTuple):
    """How a node computes its outputs, as far as it may not fit."""

    op_type: str
    attributes: tuple[ir.Attr, ...]
    inputs: tuple[Fact | None, ...]


@dataclass
class TypeState:
    """What a module states and computes at one moment, kept to compare a later one with it.

    It is read before a pass, which then changes the values in place; so it goes by names.

    Attributes:
        clashes: The contradictions.
        facts: What is inferred, by value name.
        stated: Type and shape that values state, by name.
        uses: Operators with the facts of their inputs, by the name of the first output.
    """

    clashes: list[Clash] = field(default_factory=list)
    facts: dict[str, Fact] = field(default_factory=dict)
    stated: dict[str, _Stated] = field(default_factory=dict)
    uses: dict[str, _Use] = field(default_factory=dict)

    def introduced(self, before: TypeState) -> Iterator[Clash]:
        """Yield the contradictions that `before` neither had nor held already, unnoticed.

        A contradiction was there unnoticed if nothing that it rests on became different, only
        better known. Where a dimension is bound to a number, say, a shape that the file stated
        all along turns out to be wrong.
        """
        if not self.clashes:
            return
        old = {clash.key for clash in before.clashes}
        stayed = old.intersection(clash.key for clash in self.clashes)
        # A pass may rename what is wrong: one that is gone forgives one that is worded like it.
        gone = Counter(clash.problem for clash in before.clashes if clash.key not in stayed)
        for clash in self.clashes:
            if clash.key in old:
                continue
            if gone[clash.problem]:
                gone[clash.problem] -= 1
                continue
            hidden = self._use_was if clash.operator else self._statement_was
            if not hidden(clash, before):
                yield clash

    def _use_was(self, clash: Clash, before: TypeState) -> bool:
        then, now = before.uses.get(clash.place), self.uses.get(clash.place)
        if then is None or now is None or then.op_type != now.op_type:
            return False
        if len(then.attributes) != len(now.attributes) or len(then.inputs) != len(now.inputs):
            return False
        if not all(map(_same_attribute, then.attributes, now.attributes)):
            return False
        return all(
            a is b or (a is not None and b is not None and _sharpened(a, b))
            for a, b in zip(then.inputs, now.inputs, strict=True)
        )

    def _statement_was(self, clash: Clash, before: TypeState) -> bool:
        name, axis = clash.place, clash.axis
        then, now = before.facts.get(name), self.facts.get(name)
        said, says = before.stated.get(name), self.stated[name]
        if then is None or now is None or said is None or not _sharpened(then, now):
            return False
        if said != says and not _bound(said, says):
            return False
        if axis is None or then.shape is None or said[1] is None:
            return said == says
        if said != says and isinstance(then.shape[axis], int):
            return False
        # What inference bore out before was right then.
        return not _confirmed(said[1][axis], then.shape[axis])


def verify_types(
    module: Module, shapes: Shapes | None = None, before: TypeState | None = None
) -> TypeState:
    """Check that stated types and shapes agree with inference, and operators with their inputs.

    The whole module is inferred: nodes whose inputs cannot fit their operator; inputs of a
    standard operator that have a type it does not take, or that differ where the standard has
    one type for them; values, graph outputs included, that state another element type or rank
    than the inferred one, another number, or another expression in the names of the graph
    inputs' dimensions. Unnamed extents state nothing.

    Args:
        module: A well-formed module; see `lwc.verify.structure.well_formed`.
        shapes: The module's analysis, built here unless it is given.
        before: What the module was before a pass; contradictions of that time are forgiven.

    Returns:
        The state to compare a later one with.

    Raises:
        VerificationError: The first contradiction.
    """
    state = check_types(module, shapes or Shapes.build(module, AnalysisManager(module)))
    found = state.clashes if before is None else state.introduced(before)
    for clash in found:
        node, file = clash.node, module.source.path
        if node is None:
            raise VerificationError(str(clash), file=file)
        raise VerificationError(f"{clash}\n{neighbourhood(node)}", file=file, node=describe(node))
    return state


def check_types(module: Module, shapes: Shapes) -> TypeState:
    """Collect every contradiction of a module; see `verify_types`. One walk, linear."""
    checker = _Checker(module, shapes)
    for node, reason in shapes.misfits:
        problem = f"its inputs do not fit the operator: {reason}"
        checker.state.clashes.append(Clash(_place(node), problem, node, operator=True))
    checker.graph(module.graph, module.graph.opset_imports)
    for function in module.model.functions.values():
        checker.graph(function.graph, function.opset_imports)
    return checker.state


class _Checker:
    """One walk over a module."""

    def __init__(self, module: Module, shapes: Shapes) -> None:
        self.shapes = shapes
        self.opset = module.opset
        self.names = _input_names(module, shapes)
        self.called = {(domain, op_type) for domain, op_type, _ in module.model.functions}
        self.state = TypeState()

    def graph(self, graph: ir.Graph, imports: Mapping[str, int]) -> None:
        """Check a graph and those nested in it; `imports` are those of the model or function."""
        fact_of, state = self.shapes.fact, self.state
        for node in graph:
            given = tuple([None if value is None else fact_of(value) for value in node.inputs])
            place = _place(node)
            attributes = tuple(node.attributes.values()) if node.attributes else ()
            state.uses[place] = _Use(node.op_type, attributes, given)
            problem = self._operator_problem(node, imports, given)
            if problem is not None:
                state.clashes.append(Clash(place, problem, node, operator=True))
            for value in node.outputs:
                if value.name:
                    self._value(value, node)
            if node.attributes:
                for nested in attribute_graphs(node):
                    self.graph(nested, imports)

    def _operator_problem(
        self, node: ir.Node, imports: Mapping[str, int], given: Sequence[Fact | None]
    ) -> str | None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in STANDARD_DOMAINS or (node.domain, node.op_type) in self.called:
            return None
        version = imports.get(domain) or imports.get("ai.onnx", self.opset)
        types = operator_types(domain, node.op_type, version)
        return None if types is None else _type_problem(node, types, given)

    def _value(self, value: ir.Value, node: ir.Node) -> None:
        """Hold what a value states against what it is."""
        name, kind, shape, state = value.name or "", value.type, value.shape, self.state
        fact = self.shapes.fact(value)
        dims = None
        if shape is not None:
            dims = tuple([dim if isinstance(dim, int) else dim.value for dim in shape])
        state.stated[name] = (_kind_key(kind), dims)
        state.facts[name] = fact
        problem = _kind_problem(kind, fact)
        if problem is not None:
            state.clashes.append(Clash(name, f"is stated as {problem}", node))
        if dims is None or fact.shape is None:
            return
        if len(dims) != len(fact.shape):
            problem = f"is stated with shape {shape}, but it is [{_listed(fact.shape)}]"
            state.clashes.append(Clash(name, problem, node))
            return
        for axis, (stated, inferred) in enumerate(zip(dims, fact.shape, strict=True)):
            if _differs(stated, inferred, self.names):
                problem = (
                    f"is stated with shape {shape}, but it is [{_listed(fact.shape)}]: "
                    f"{stated} and {inferred} differ"
                )
                state.clashes.append(Clash(name, problem, node, axis=axis))


def _place(node: ir.Node) -> str:
    for value in node.outputs:
        if value.name:
            return value.name
    return ""


# Statements


def _kind_key(kind: ir.TypeProtocol | None) -> object:
    """Copy what tells types apart: a type may be changed in place."""
    return kind.dtype if type(kind) is ir.TensorType else repr(kind)


def _kind_problem(kind: ir.TypeProtocol | None, fact: Fact) -> str | None:
    if kind is None or kind.dtype == ir.DataType.UNDEFINED:
        return None
    if type(kind) is ir.TensorType:
        if fact.element is not None:
            return f"a tensor of {kind.dtype.name}, but it is a sequence or optional"
        if fact.dtype is not None and kind.dtype != fact.dtype:
            return f"{kind.dtype.name}, but it is {fact.dtype.name}"
        return None
    if not isinstance(kind, _CONTAINERS):
        return None
    if fact.dtype is not None:
        return f"{kind}, but it is a tensor of {fact.dtype.name}"
    inner = kind.elem_type
    if fact.element is None or isinstance(inner, ir.DataType):
        return None
    return _kind_problem(inner, fact.element)


def _differs(stated: int | str | None, inferred: Dim, names: frozenset[str]) -> bool:
    """Tell whether a stated extent cannot be the inferred one.

    A number and a symbol may be equal, and so may two symbols: an operator further down may
    require it. Expressions in the same symbols may not, if they differ wherever they are tried.
    """
    if isinstance(stated, int):
        return isinstance(inferred, int) and 0 <= stated != inferred
    if stated is None or isinstance(inferred, int):
        return False
    return _expressions_differ(stated, inferred, names)


_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29)
_ROUND = 2**6 * 3**2 * 5 * 7
"""What strides, patches and heads divide: models mostly run at such extents alone."""


@functools.lru_cache(maxsize=1 << 14)
def _expressions_differ(stated: str, inferred: Dim, names: frozenset[str]) -> bool:
    if is_anonymous(stated):
        return False
    said = parse_dim(stated)
    symbols = {symbol.name for symbol in getattr(inferred, "free_symbols", ())}
    if {symbol.name for symbol in said.free_symbols} != symbols or not symbols <= names:
        return False
    return all(bind(said, at) != bind(inferred, at) for at in _tries(sorted(symbols)))


def _tries(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield extents to try: an operator may require of them that they divide, or are equal."""
    yield dict.fromkeys(names, _ROUND)
    for scale, shift in ((_ROUND, 0), (1, 0), (1, 3)):
        yield {
            name: scale * _PRIMES[(index + shift) % len(_PRIMES)]
            for index, name in enumerate(names)
        }
    yield dict.fromkeys(names, 6)


def _confirmed(stated: int | str | None, inferred: Dim) -> bool:
    """Tell whether inference bears a statement out."""
    if isinstance(stated, int) or isinstance(inferred, int):
        return stated == inferred
    return stated is not None and not is_anonymous(stated) and parse_dim(stated) == inferred


def _bound(then: _Stated, now: _Stated) -> bool:
    """Tell whether a statement is what it was, but for names that have become numbers."""
    if then[0] != now[0] or then[1] is None or now[1] is None or len(then[1]) != len(now[1]):
        return False
    return all(
        a == b or (isinstance(a, str) and isinstance(b, int) and not is_anonymous(a))
        for a, b in zip(then[1], now[1], strict=True)
    )


def _sharpened(then: Fact, now: Fact) -> bool:
    """Tell whether `now` is `then` and more: nothing that was known has become something else."""
    if then.dtype is not None and then.dtype != now.dtype:
        return False
    if then.element is not None and now.element is None:
        return False
    if then.shape is None:
        return True
    if now.shape is None or len(then.shape) != len(now.shape):
        return False
    pairs = list(zip(then.shape, now.shape, strict=True))
    if then.known is not None:
        if now.known is None or now.known.shape != then.known.shape:
            return False
        pairs += zip(then.known.flat, now.known.flat, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int | float))


def _same_attribute(then: ir.Attr, now: ir.Attr) -> bool:
    """Tell whether an attribute stayed; a graph is changed in place, so nothing is said of it."""
    if (then.name, then.type) != (now.name, now.type) or then.type in _GRAPHS:
        return False
    if then is now:
        return True
    return then.type not in _TENSORS and then.value == now.value


def _input_names(module: Module, shapes: Shapes) -> frozenset[str]:
    """Return the names of the dimensions of the graph inputs."""
    return frozenset(
        symbol.name
        for value in module.graph.inputs
        for dim in shapes.shape(value) or ()
        if not isinstance(dim, int)
        for symbol in dim.free_symbols
    )


def _listed(shape: Iterable[Dim]) -> str:
    return ", ".join(map(str, shape))


# Operators


def _type_problem(node: ir.Node, types: OperatorTypes, given: Sequence[Fact | None]) -> str | None:
    """Say which input or output has a type that the standard does not allow, or return None."""
    bound: dict[str, tuple[str, str]] = {}
    for index, fact in enumerate(given):
        if fact is None or not types.inputs:
            continue
        formal = types.inputs[min(index, len(types.inputs) - 1)]
        if fact.element is not None and formal.tensors_only:
            return f"input '{formal.name}' cannot be a sequence or optional"
        written = _written(fact)
        if written is None:
            continue
        problem = _operand_problem(formal, f"input '{formal.name}'", written, bound)
        if problem is not None:
            return problem
    for index, value in enumerate(node.outputs):
        kind = value.type
        if not value.name or type(kind) is not ir.TensorType or not types.outputs:
            continue
        if kind.dtype == ir.DataType.UNDEFINED:
            continue
        formal = types.outputs[min(index, len(types.outputs) - 1)]
        written = _tensor_of(kind.dtype)
        problem = _operand_problem(formal, f"output '{formal.name}'", written, bound)
        if problem is not None:
            return problem
    return None


def _operand_problem(
    formal: FormalType, what: str, written: str, bound: dict[str, tuple[str, str]]
) -> str | None:
    if written not in formal.allowed:
        return f"{what} cannot be {written}"
    if formal.variable is None:
        return None
    other, kind = bound.setdefault(formal.variable, (what, written))
    return None if kind == written else f"{what} is {written}, but {other} is {kind}"


def _written(fact: Fact) -> str | None:
    """Write the type of a tensor as the standard does; None where it is no tensor or not known."""
    if fact.dtype is None or fact.dtype == ir.DataType.UNDEFINED:
        return None
    return _tensor_of(fact.dtype)


@functools.cache
def _tensor_of(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"
