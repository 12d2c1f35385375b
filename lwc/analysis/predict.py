"""Seconds a model takes on a measured target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from lwc.analysis.cost import Cost, NodeCost
from lwc.analysis.target import Target
from lwc.core.dims import Dim, evaluate, parse_dim
from lwc.core.errors import UsageError
from lwc.core.walk import constant_tensor, is_default_domain, op_name

__all__ = ["Numbers", "Prediction", "UnboundError", "predict"]


class UnboundError(UsageError):
    """A closed form has a dimension without a number.

    Attributes:
        dimension: Its name.
    """

    def __init__(self, dimension: str) -> None:
        super().__init__(f"dimension '{dimension}' has no value", remedy=f"bind it: {dimension}=1")
        self.dimension = dimension


class Numbers:
    """Turns closed forms into numbers under one set of bindings, each distinct form once.

    Args:
        bindings: Extents by dimension name.

    Raises:
        UnboundError: On use, where a dimension has no binding.
    """

    def __init__(self, bindings: Mapping[str, int]) -> None:
        self._bindings = bindings
        self._known: dict[Dim, int] = {}

    def __call__(self, dim: Dim) -> int:
        """Return the number that `dim` stands for."""
        if isinstance(dim, int):
            return dim
        found = self._known.get(dim)
        if found is None:
            try:
                found = self._known[dim] = evaluate(dim, self._bindings)
            except KeyError as missing:
                raise UnboundError(missing.args[0]) from None
        return found


@dataclass(frozen=True)
class Prediction:
    """Predicted times.

    Attributes:
        seconds: The whole run.
        by_node: Each node, those of subgraphs included (a branch that is not the slowest of its
            `If` too, though it is not in the sum).
        rooflined: Nodes predicted by the roofline for want of a kernel table, by kernel or op.
        unpredicted: Nodes that only take the time of launching them here, by op: they have no
            cost rule, or their size depends on the data that is fed.
    """

    seconds: float
    by_node: dict[ir.Node, float]
    rooflined: dict[str, int] = field(default_factory=dict)
    unpredicted: dict[str, int] = field(default_factory=dict)


def predict(
    cost: Cost, target: Target, bindings: Mapping[str, int], threads: int | None = None
) -> Prediction:
    """Add up what each node takes on the target.

    Give it the cost of the module the runtime executes: a runtime that fuses nodes runs another
    graph than the one it loads, and the backend knows which. Nodes that depend on weights alone
    take no time, since runtimes fold them when they load; DequantizeLinear they keep.

    Args:
        cost: The cost of the module.
        target: The measured machine.
        bindings: Extents by dimension name.
        threads: Checked against the target's, where given.

    Raises:
        UsageError: A dimension of an input has no binding, or the target has another thread
            count.
    """
    if threads is not None and threads != target.threads:
        raise UsageError(f"the target was measured with {target.threads} threads, not {threads}")
    return _Clock(cost, target, Numbers(bindings)).run()


class _Clock:
    def __init__(self, cost: Cost, target: Target, number: Numbers) -> None:
        self.cost = cost
        self.target = target
        self.number = number
        self.by_node: dict[ir.Node, float] = {}
        self.rooflined: Counter[str] = Counter()
        self.unpredicted: Counter[str] = Counter()
        self.inputs = set(_dimensions(cost.module.graph.inputs))
        self.folded: set[ir.Node] = set()
        self.times: dict[NodeCost, float] = {}

    def run(self) -> Prediction:
        seconds = self.graph(self.cost.module.graph) + self.target.run_seconds
        return Prediction(seconds, self.by_node, dict(self.rooflined), dict(self.unpredicted))

    def graph(self, nodes: Iterable[ir.Node]) -> float:
        return sum(self.node(node) for node in nodes)

    def node(self, node: ir.Node) -> float:
        if self._is_folded(node):
            self.folded.add(node)
            seconds = 0.0
        else:
            seconds = self.target.node_seconds + self._inside(node)
        self.by_node[node] = seconds
        return seconds

    def _inside(self, node: ir.Node) -> float:
        try:
            region = self.cost.regions.get(node)
            if region is not None:
                bodies = [self.graph(graph) for graph in region.graphs]
                once = max(bodies) if region.exclusive else sum(bodies)
                return once * self.number(region.trips)
            if node in self.cost.nodes:
                return self._kernel(node)
        except UnboundError as unbound:
            if unbound.dimension in self.inputs:
                raise
        self.unpredicted[op_name(node)] += 1
        return 0.0

    def _is_folded(self, node: ir.Node) -> bool:
        if node.op_type == "Constant" and is_default_domain(node):
            return True
        if node.op_type == "DequantizeLinear":
            return False  # kept for the integer kernel it might be fused into
        given = [value for value in node.inputs if value is not None]
        return bool(given) and all(
            constant_tensor(value) is not None or value.producer() in self.folded for value in given
        )

    def _kernel(self, node: ir.Node) -> float:
        cost = self.cost.nodes[node]
        known = self.times.get(cost)
        if known is None:
            known = self.times[cost] = self._work(cost)
        if cost.work.kernel != "view" and cost.work.kernel not in self.target.tables:
            self.rooflined[cost.work.kernel or node.op_type] += 1
        return known

    def _work(self, cost: NodeCost) -> float:
        work = cost.work
        if work.kernel == "view":
            return 0.0
        table = self.target.tables.get(work.kernel)
        if table is not None:
            problem = [self.number(extent) for extent in work.problem]
            return table.time(problem) * self.number(work.repeat)
        moved = self.number(cost.traffic) / self.target.bandwidth
        return max(moved, self.number(cost.flops) / self.target.peak_flops)


def _dimensions(inputs: Iterable[ir.Value]) -> Iterable[str]:
    """Yield the names of the symbolic dimensions of a graph's inputs."""
    for value in inputs:
        for dim in value.shape or ():
            if not isinstance(dim, int) and dim.value is not None:
                yield from (found.name for found in parse_dim(dim.value).free_symbols)
