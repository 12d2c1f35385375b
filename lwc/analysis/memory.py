"""Peak activation memory, by liveness, as ONNX Runtime's CPU planner lays buffers out.

What the planner does was found by experiment on ONNX Runtime 1.31 with the arena and the memory
pattern off: a buffer lives from the node that writes it to the last node that reads it or a view
of it; reshapes are views; activations, softmax and casts of equal size overwrite their input where
nothing else needs it; arithmetic such as Add does not; graph outputs live to the end; a dead buffer
is kept for the next value of the same shape, if one comes, and freed at once if none does. In-place
writes and keeping need shapes known to the runtime, so those stated in the graph decide.

Counted are buffers made during a run: not weights, and not graph inputs, which the caller owns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import onnx_ir as ir
import sympy

from lwc.analysis.cost import Cost
from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.predict import Numbers
from lwc.analysis.shapes import Shapes
from lwc.core.dims import Dim, simplify_dim
from lwc.core.module import Module
from lwc.core.walk import op_name

__all__ = ["Memory", "Peak", "execution_order"]

_ALIASES = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
"""The output is the first input's buffer, unless it is a graph output."""

_IN_PLACE = frozenset(
    (
        *("Relu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Celu"),
        *("ThresholdedRelu", "Softplus", "Softsign", "Softmax", "LogSoftmax", "Cast"),
    )
)
"""The output may overwrite the first input, if that dies here and is as large."""


@dataclass(frozen=True)
class Peak:
    """The most memory that buffers take at once.

    Attributes:
        nbytes: How much.
        node: The node during which it is reached (the innermost, in a subgraph), or None for a
            module without nodes.
        buffers: The values whose buffers are alive then, largest first, with their bytes.
    """

    nbytes: int
    node: ir.Node | None
    buffers: tuple[tuple[ir.Value, int], ...] = ()


@dataclass
class _Buffer:
    """Bytes that live from step `first` to step `last`, inclusive."""

    value: ir.Value
    nbytes: Dim
    first: int
    last: int


@dataclass
class _Plan:
    """One graph: its nodes in execution order, its buffers, and what each step holds besides."""

    order: list[ir.Node]
    buffers: list[_Buffer] = field(default_factory=list)
    scratch: list[Dim] = field(default_factory=list)
    bodies: dict[int, list[_Plan]] = field(default_factory=dict)


class Memory(Analysis):
    """Activation memory of a module.

    Attributes:
        unsized: Values whose size is not known, by the operator that makes them: not counted.
    """

    def __init__(self, plan: _Plan, unsized: dict[str, int]) -> None:
        self._plan = plan
        self.unsized = unsized

    @classmethod
    def requires(cls) -> tuple[type[Analysis], ...]:
        """Memory rests on shapes and on the kernels' workspaces, which are with the costs."""
        return (Shapes, Cost)

    @classmethod
    def build(cls, module: Module, analyses: AnalysisManager) -> Memory:
        """Plan the buffers of the main graph and of every body it runs."""
        planner = _Planner(analyses.get(Shapes), analyses.get(Cost))
        return cls(planner.plan(module.graph), dict(planner.unsized))

    def peak(self, bindings: Mapping[str, int]) -> int:
        """Return the peak in bytes for the given extents.

        Raises:
            UsageError: A dimension has no binding.
        """
        return self.where(bindings).nbytes

    def where(self, bindings: Mapping[str, int]) -> Peak:
        """Return the peak, the node during which it is reached, and what is alive then.

        Raises:
            UsageError: A dimension has no binding.
        """
        return _where(self._plan, Numbers(bindings))

    @cached_property
    def candidates(self) -> tuple[tuple[ir.Node, Dim], ...]:
        """The closed forms one of which is the peak, each with a node where it is reached.

        A form is left out where another is at least as large for every extent.
        """
        forms = _undominated(_candidates(self._plan))
        return tuple((node, _expression(form)) for form, node in forms)

    @cached_property
    def closed_form(self) -> Dim:
        """The peak as one expression: the largest of the candidates."""
        forms = [form for _, form in self.candidates]
        if all(isinstance(form, int) for form in forms):
            return max(forms, default=0)
        return simplify_dim(sympy.Max(*forms))


def execution_order(graph: ir.Graph | Iterable[ir.Node]) -> list[ir.Node]:
    """Return the nodes in the order ONNX Runtime runs them.

    It walks depth-first from the nodes that nothing reads, last one first, visiting the producers
    of a node from the latest in the graph to the earliest, and runs a node once its producers
    are.
    """
    nodes = list(graph)
    position = {node: index for index, node in enumerate(nodes)}
    producers: list[list[int]] = []
    read: set[int] = set()
    for index, node in enumerate(nodes):
        before = {
            position[producer]
            for value in _read_values(node)
            if (producer := value.producer()) is not None and producer in position
        }
        before.discard(index)
        producers.append(sorted(before))
        read |= before
    order: list[ir.Node] = []
    seen = [False] * len(nodes)
    stack = [(index, False) for index in range(len(nodes)) if index not in read]
    while stack:
        index, leaving = stack.pop()
        if leaving:
            order.append(nodes[index])
        elif not seen[index]:
            seen[index] = True
            stack.append((index, True))
            stack.extend((before, False) for before in producers[index] if not seen[before])
    return order


def _read_values(node: ir.Node) -> Iterable[ir.Value]:
    """Yield the values a node reads, those that its subgraphs read from outside included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        graphs: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            for inner in graph:
                yield from _read_values(inner)
            yield from graph.outputs


class _Planner:
    def __init__(self, shapes: Shapes, cost: Cost) -> None:
        self.shapes = shapes
        self.cost = cost
        self.unsized: defaultdict[str, int] = defaultdict(int)
        self.plans: dict[int, _Plan] = {}

    def plan(self, graph: ir.Graph | ir.Function) -> _Plan:
        known = self.plans.get(id(graph))
        if known is not None:
            return known
        order = [node for node in execution_order(graph) if node.op_type != "Constant"]
        plan = self.plans[id(graph)] = _Plan(order)
        uses = self._uses(order)
        kept = set(graph.outputs)
        owner: dict[ir.Value, _Buffer] = {}
        left: dict[int, int] = {}  # reads still to come, by buffer
        dead: list[tuple[_Extent, _Buffer]] = []  # latest first
        for step, node in enumerate(order):
            for value in node.outputs:
                if not value.name:
                    continue
                buffer = None if value in kept else self._shared(node, value, owner, left, uses)
                if buffer is None:
                    if _is_view(node, value) and value not in kept:
                        continue  # of a weight or an input: nothing is made
                    buffer = None if value in kept else _take(dead, _extent(value))
                if buffer is None:
                    buffer = _Buffer(value, self._nbytes(node, value), step, step)
                    plan.buffers.append(buffer)
                    left[id(buffer)] = 0
                buffer.last = step
                owner[value] = buffer
                left[id(buffer)] += uses.get(value, 0)
                if value in kept:
                    buffer.last = len(order)
            for value in _read_values(node):
                buffer = owner.get(value)
                if buffer is not None:
                    left[id(buffer)] -= 1
                    buffer.last = max(buffer.last, step)
                    extent = _extent(buffer.value)
                    if left[id(buffer)] == 0 and buffer.last == step and extent is not None:
                        dead.insert(0, (extent, buffer))
            found = self.cost.nodes.get(node)
            region = self.cost.regions.get(node)
            plan.scratch.append(found.work.scratch if found is not None and not region else 0)
            if region is not None:
                plan.bodies[step] = [self.plan(body) for body in region.graphs]
        return plan

    def _uses(self, order: list[ir.Node]) -> dict[ir.Value, int]:
        uses: dict[ir.Value, int] = defaultdict(int)
        for node in order:
            for value in _read_values(node):
                uses[value] += 1
        return uses

    def _shared(
        self,
        node: ir.Node,
        value: ir.Value,
        owner: dict[ir.Value, _Buffer],
        left: dict[int, int],
        uses: dict[ir.Value, int],
    ) -> _Buffer | None:
        """Return the input's buffer that an output takes over, or None if it gets its own."""
        source = node.inputs[0] if node.inputs else None
        if source is None or value is not node.outputs[0]:
            return None
        buffer = owner.get(source)
        if buffer is None:
            return None
        if _is_view(node, value):
            return buffer
        if (
            node.domain in ("", "ai.onnx")
            and node.op_type in _IN_PLACE
            and left[id(buffer)] == 1
            and _extent(source) is not None
            and _extent(source) == _extent(value)
        ):
            return buffer
        return None

    def _nbytes(self, node: ir.Node, value: ir.Value) -> Dim:
        nbytes = self.shapes.nbytes(value)
        if nbytes is None:
            self.unsized[op_name(node)] += 1
            return 0
        return nbytes


def _is_view(node: ir.Node, value: ir.Value) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in _ALIASES and value is node.outputs[0]


_Extent: TypeAlias = "tuple[int, tuple[int | str, ...]]"


def _extent(value: ir.Value) -> _Extent | None:
    """Return the element size and shape that the graph states, or None if it leaves them open."""
    if value.shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    dims: list[int | str] = []
    for dim in value.shape:
        extent = dim if isinstance(dim, int) else dim.value
        if extent is None:
            return None
        dims.append(extent)
    return value.dtype.bitwidth, tuple(dims)


def _take(dead: list[tuple[_Extent, _Buffer]], extent: _Extent | None) -> _Buffer | None:
    """Take the latest dead buffer of an extent; scalars are not worth it to the runtime."""
    if extent is None or not extent[1]:
        return None
    for index, (have, buffer) in enumerate(dead):
        if have == extent:
            del dead[index]
            return buffer
    return None


def _where(plan: _Plan, number: Numbers) -> Peak:
    steps = len(plan.order)
    change = [0] * (steps + 2)
    for buffer in plan.buffers:
        nbytes = number(buffer.nbytes)
        change[buffer.first] += nbytes
        change[buffer.last + 1] -= nbytes
    best, best_step, best_node, live = 0, -1, None, 0
    for step, node in enumerate(plan.order):
        live += change[step]
        here, inner = live + number(plan.scratch[step]), node
        for body in plan.bodies.get(step, ()):
            peak = _where(body, number)
            if live + peak.nbytes > here:
                here, inner = live + peak.nbytes, peak.node or node
        if here > best or best_node is None:
            best, best_step, best_node = here, step, inner
    alive = [
        (buffer.value, number(buffer.nbytes))
        for buffer in plan.buffers
        if buffer.first <= best_step <= buffer.last
    ]
    alive.sort(key=lambda item: -item[1])
    return Peak(best, best_node, tuple(alive))


_Form: TypeAlias = "dict[Any, Any]"
"""A sum: coefficient by monomial (a sympy expression, or 1)."""


def _candidates(plan: _Plan) -> list[tuple[_Form, ir.Node]]:
    """Return the distinct sums over the steps of a plan, dominated ones removed where cheap."""
    starts: dict[int, list[_Buffer]] = defaultdict(list)
    ends: dict[int, list[_Buffer]] = defaultdict(list)
    for buffer in plan.buffers:
        starts[buffer.first].append(buffer)
        ends[buffer.last].append(buffer)
    live: _Form = {}
    found: dict[frozenset[Any], tuple[_Form, ir.Node]] = {}
    for step, node in enumerate(plan.order):
        for buffer in starts.get(step, ()):
            _add(live, buffer.nbytes, 1)
        here = dict(live)
        _add(here, plan.scratch[step], 1)
        bodies = [form for body in plan.bodies.get(step, ()) for form in _undominated(
            _candidates(body)
        )]  # fmt: skip
        for form, inner in bodies or [({}, node)]:
            total = dict(here)
            for monomial, coefficient in form.items():
                total[monomial] = total.get(monomial, 0) + coefficient
            found.setdefault(frozenset(total.items()), (total, inner))
        for buffer in ends.get(step, ()):
            _add(live, buffer.nbytes, -1)
    return list(found.values())


def _add(form: _Form, nbytes: Dim, sign: int) -> None:
    for monomial, coefficient in _terms(nbytes):
        total = form.get(monomial, 0) + sign * coefficient
        if total == 0:
            form.pop(monomial, None)
        else:
            form[monomial] = total


_TERMS: dict[Any, tuple[tuple[Any, Any], ...]] = {}


def _terms(nbytes: Dim) -> tuple[tuple[Any, Any], ...]:
    if isinstance(nbytes, int):
        return ((1, nbytes),) if nbytes else ()
    found = _TERMS.get(nbytes)
    if found is None:
        parts = sympy.Add.make_args(sympy.expand(nbytes))
        pairs = [part.as_coeff_Mul() for part in parts]
        found = _TERMS[nbytes] = tuple((monomial, coefficient) for coefficient, monomial in pairs)
    return found


def _undominated(forms: list[tuple[_Form, ir.Node]]) -> list[tuple[_Form, ir.Node]]:
    """Keep the sums that no other reaches term by term; every monomial is non-negative."""
    kept: list[tuple[_Form, ir.Node]] = []
    for form, node in forms:
        if any(_dominates(other, form) for other, _ in kept):
            continue
        kept = [pair for pair in kept if not _dominates(form, pair[0])]
        kept.append((form, node))
    return kept


def _dominates(one: _Form, other: _Form) -> bool:
    return all(one.get(monomial, 0) >= count for monomial, count in other.items()) and all(
        count >= other.get(monomial, 0) for monomial, count in one.items()
    )


def _expression(form: _Form) -> Dim:
    return simplify_dim(sympy.Add(*(count * monomial for monomial, count in form.items())))
