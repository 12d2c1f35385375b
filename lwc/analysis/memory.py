"""Peak activation memory, by liveness, as ONNX Runtime's CPU planner lays buffers out.

The nodes run in the order in which the graph has them. For the graph that ONNX Runtime itself
wrote (`optimized_module` of the backend) that is its order of execution.

What the planner does was found by comparing, node by node, with the bytes in use that ONNX
Runtime 1.31 reports in its profile, memory pattern off:

* A buffer lives from the node that writes it to the last node that reads it or a view of it;
  graph outputs live to the end.
* Reshapes are views. Activations, softmax and casts of equal size overwrite their input where
  nothing else needs it; arithmetic such as Add does not.
* A dead buffer is kept for the next value of the same shape and element size, however far off,
  and freed at once if none comes. So dequantized weights of the same shape share a buffer that
  lives from the first to the last.
* For both of these the runtime must know the shape when it plans: from the graph's own statements,
  or because it follows from the shapes of the inputs. A Reshape to a computed shape breaks that.
* Some kernels hold a workspace besides, most of all Where: twice its result. Their sizes are with
  the cost rules (`Work.scratch`).

Counted are buffers made during a run: not weights, and not graph inputs, which the caller owns.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import onnx_ir as ir
import sympy

from lwc.analysis.cost import Cost
from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.predict import Numbers
from lwc.analysis.shapes import Shapes
from lwc.core.dims import Dim, simplify_dim
from lwc.core.module import Module
from lwc.core.walk import constant_tensor, op_name, values_read

__all__ = ["Memory", "Peak"]

_ALIASES = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
"""The output is the first input's buffer, unless it is a graph output."""

_IN_PLACE = frozenset(
    (
        *("Relu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Celu"),
        *("ThresholdedRelu", "Softplus", "Softsign", "Softmax", "LogSoftmax", "Cast"),
    )
)
"""The output may overwrite the first input, if that dies here and is as large."""


_SHAPED_BY_CONTENT = frozenset(
    (
        *("Reshape", "Expand", "Slice", "Range", "ConstantOfShape", "Tile", "Resize", "Pad"),
        *("NonZero", "TopK", "OneHot", "Compress", "Unique"),
    )
)
"""What these make has a shape that the runtime knows beforehand only where it is constant."""


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

    def differs_from(self, other: Memory) -> str | None:
        """Name a buffer in which two analyses, built on the same shapes and costs, differ."""
        mine, theirs = self._plan, other._plan
        for a, b in zip(mine.buffers, theirs.buffers, strict=False):
            if a != b:
                return f"the buffer of '{a.value.name}' is not what it is when planned anew"
        if mine != theirs or self.unsized != other.unsized:
            return "the plan of its buffers is not the one made anew"
        return None

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

    def live(self, bindings: Mapping[str, int]) -> list[int]:
        """Return the bytes alive during each node of the main graph, workspaces left out.

        Raises:
            UsageError: A dimension has no binding.
        """
        return _live(self._plan, Numbers(bindings))

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


class _Planner:
    def __init__(self, shapes: Shapes, cost: Cost) -> None:
        self.shapes = shapes
        self.cost = cost
        self.unsized: defaultdict[str, int] = defaultdict(int)
        self.plans: dict[int, _Plan] = {}
        self.extents: dict[ir.Value, _Extent | None] = {}

    def plan(self, graph: ir.Graph | ir.Function) -> _Plan:
        known = self.plans.get(id(graph))
        if known is not None:
            return known
        order = [node for node in graph if node.op_type != "Constant"]
        plan = self.plans[id(graph)] = _Plan(order)
        uses = self._uses(order)
        kept = set(graph.outputs)
        owner: dict[ir.Value, _Buffer] = {}
        left: dict[int, int] = {}  # reads still to come, by buffer
        dead: defaultdict[_Extent, list[_Buffer]] = defaultdict(list)
        for step, node in enumerate(order):
            for value in node.outputs:
                if not value.name:
                    continue
                extent = self._extent(value)
                buffer = None if value in kept else self._shared(node, value, owner, left, uses)
                if buffer is None:
                    if _is_view(node, value) and value not in kept:
                        continue  # of a weight or an input: nothing is made
                    buffer = None if value in kept else _take(dead, extent)
                if buffer is None:
                    buffer = _Buffer(value, self._nbytes(node, value), step, step)
                    plan.buffers.append(buffer)
                    left[id(buffer)] = 0
                buffer.last = step
                owner[value] = buffer
                left[id(buffer)] += uses.get(value, 0)
                if value in kept:
                    buffer.last = len(order)
            for value in values_read(node):
                buffer = owner.get(value)
                if buffer is not None:
                    left[id(buffer)] -= 1
                    buffer.last = max(buffer.last, step)
                    extent = self._extent(buffer.value)
                    if left[id(buffer)] == 0 and buffer.last == step and extent is not None:
                        dead[extent].append(buffer)
            found = self.cost.nodes.get(node)
            region = self.cost.regions.get(node)
            plan.scratch.append(found.work.scratch if found is not None and not region else 0)
            if region is not None:
                plan.bodies[step] = [self.plan(body) for body in region.graphs]
        return plan

    def _uses(self, order: list[ir.Node]) -> dict[ir.Value, int]:
        uses: dict[ir.Value, int] = defaultdict(int)
        for node in order:
            for value in values_read(node):
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
            and self._extent(source) is not None
            and self._extent(source) == self._extent(value)
        ):
            return buffer
        return None

    def _extent(self, value: ir.Value) -> _Extent | None:
        """Return the element size and shape that the runtime knows when it plans, or None.

        It knows what the graph states, and what follows from the shapes of inputs alone.
        """
        if value not in self.extents:
            dtype = self.shapes.dtype(value)
            dims = self._stated(value)
            if dims is None:
                dims = self._inferred(value)
            self.extents[value] = None
            if dims is not None and dtype is not None and dtype != ir.DataType.STRING:
                self.extents[value] = dtype.bitwidth, dims
        return self.extents[value]

    def _stated(self, value: ir.Value) -> tuple[int | str, ...] | None:
        if value.shape is None:
            return None
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        return None if None in dims else cast("tuple[int | str, ...]", dims)

    def _inferred(self, value: ir.Value) -> tuple[int | str, ...] | None:
        node = value.producer()
        shape = self.shapes.shape(value)
        if shape is None or (node is not None and not self._follows(node)):
            return None
        if not all(isinstance(dim, int) or dim.is_Symbol for dim in shape):
            return None
        return tuple(dim if isinstance(dim, int) else dim.name for dim in shape)

    def _follows(self, node: ir.Node) -> bool:
        """Tell whether the shapes of a node's outputs follow from those of its inputs."""
        given = [value for value in node.inputs if value is not None]
        if node.op_type in _SHAPED_BY_CONTENT:
            shaping = given if node.op_type in ("Range", "ConstantOfShape") else given[1:]
            if any(constant_tensor(value) is None for value in shaping):
                return False
        return all(constant_tensor(v) is not None or self._extent(v) is not None for v in given)

    def _nbytes(self, node: ir.Node, value: ir.Value) -> Dim:
        nbytes = self.shapes.nbytes(value)
        if nbytes is None:
            self.unsized[op_name(node)] += 1
            return 0
        return nbytes


def _is_view(node: ir.Node, value: ir.Value) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in _ALIASES and value is node.outputs[0]


_Extent: TypeAlias = "tuple[int, tuple[int | str, ...]]"


def _take(dead: Mapping[_Extent, list[_Buffer]], extent: _Extent | None) -> _Buffer | None:
    """Take the latest dead buffer of an extent; scalars are not worth it to the runtime."""
    if extent is None or not extent[1] or not dead[extent]:
        return None
    return dead[extent].pop()


def _live(plan: _Plan, number: Numbers) -> list[int]:
    change = [0] * (len(plan.order) + 2)
    for buffer in plan.buffers:
        nbytes = number(buffer.nbytes)
        change[buffer.first] += nbytes
        change[buffer.last + 1] -= nbytes
    return list(itertools.accumulate(change))[: len(plan.order)]


def _where(plan: _Plan, number: Numbers) -> Peak:
    best, best_step, best_node = 0, -1, None
    for step, (node, live) in enumerate(zip(plan.order, _live(plan, number), strict=True)):
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
