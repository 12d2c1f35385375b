"""What a model costs, as rows for a table: by operator, and the dearest nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from lwc.analysis.cost import Cost, Totals
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory, Peak
from lwc.analysis.predict import Numbers, Prediction, predict
from lwc.analysis.target import Target
from lwc.core.dims import Dim, bind
from lwc.core.module import Module
from lwc.core.walk import op_name

__all__ = ["Plan", "PlanRow", "plan_rows"]


@dataclass(frozen=True)
class PlanRow:
    """One line of the table.

    Attributes:
        name: An operator, or a node.
        count: Nodes in the line.
        formulas: FLOPs, traffic and activation bytes as text in the model's own dimensions; where
            some are bound and others not, in those that are not.
        flops: FLOPs, or None where a dimension is not bound; the same for the others.
        parameters: Distinct parameters.
        parameter_bytes: Their stored bytes.
        traffic: Bytes read and written.
        activation_bytes: Bytes of outputs made.
        seconds: Predicted time, or None without a target.
    """

    name: str
    count: int
    formulas: Mapping[str, str]
    flops: int | None
    parameters: int
    parameter_bytes: int
    traffic: int | None
    activation_bytes: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The cost of a module as data.

    Attributes:
        total: The whole module.
        by_op: A row per operator of the main graph, the dearest first.
        top_nodes: The dearest nodes of the main graph.
        peak: The activation peak, or None where a dimension is not bound.
        peak_formula: The peak as text; long where several points of the program compete.
        uncounted: Nodes in no figure, by operator.
        missing: Dimensions without a binding.
        rooflined: Nodes whose time is the roofline's, by operator.
    """

    total: PlanRow
    by_op: tuple[PlanRow, ...]
    top_nodes: tuple[PlanRow, ...]
    peak: Peak | None
    peak_formula: str
    uncounted: Mapping[str, int]
    missing: tuple[str, ...] = ()
    rooflined: Mapping[str, int] = field(default_factory=dict)


def plan_rows(
    module: Module,
    analyses: AnalysisManager,
    bindings: Mapping[str, int],
    target: Target | None = None,
    *,
    top: int = 10,
) -> Plan:
    """Describe what `module` costs.

    Args:
        module: The module; nothing of it is read but shapes and small constants.
        analyses: Its analyses.
        bindings: Extents by dimension name; without some of them only formulas come.
        target: The machine to predict seconds for.
        top: How many nodes to list by themselves.
    """
    cost = analyses.get(Cost)
    memory = analyses.get(Memory)
    missing = _missing(cost.total, memory, bindings)
    number = None if missing else Numbers(bindings)
    prediction = predict(cost, target, bindings) if target and not missing else None

    def written(form: Dim) -> str:
        return str(bind(form, bindings) if missing else form).replace("**", "^")

    by_op: dict[str, list[ir.Node]] = defaultdict(list)
    for node in module.graph:
        if node in cost.nodes and op_name(node) != "Constant":
            by_op[op_name(node)].append(node)

    def row(name: str, nodes: Iterable[ir.Node]) -> PlanRow:
        return _row(name, list(nodes), cost, number, prediction, written=written)

    rows = sorted((row(op, nodes) for op, nodes in by_op.items()), key=_dearness, reverse=True)
    nodes = [node for group in by_op.values() for node in group]
    if number is not None:
        nodes.sort(key=lambda node: _node_dearness(node, cost, number, prediction), reverse=True)
    formulas = [written(form) for _, form in memory.candidates]
    return Plan(
        total=row("total", nodes),
        by_op=tuple(rows),
        top_nodes=tuple(row(node.name or op_name(node), [node]) for node in nodes[:top]),
        peak=None if missing else memory.where(bindings),
        peak_formula=formulas[0] if len(formulas) == 1 else f"max({', '.join(formulas)})",
        uncounted=dict(cost.uncounted),
        missing=missing,
        rooflined=prediction.rooflined if prediction else {},
    )


def _missing(total: Totals, memory: Memory, bindings: Mapping[str, int]) -> tuple[str, ...]:
    forms = [total.flops, total.traffic, *(form for _, form in memory.candidates)]
    names = {s.name for form in forms if not isinstance(form, int) for s in form.free_symbols}
    return tuple(sorted(names - set(bindings)))


def _row(
    name: str,
    nodes: list[ir.Node],
    cost: Cost,
    number: Numbers | None,
    prediction: Prediction | None,
    *,
    written: Callable[[Dim], str],
) -> PlanRow:
    sums = cost.totals(nodes)
    seconds = None
    if prediction is not None:
        whole = name == "total"
        seconds = prediction.seconds if whole else sum(prediction.by_node[n] for n in nodes)

    def count(form: Dim) -> int | None:
        return None if number is None else number(form)

    return PlanRow(
        name=name,
        count=len(nodes),
        formulas={
            "flops": written(sums.flops),
            "traffic": written(sums.traffic),
            "activation_bytes": written(sums.activation_bytes),
        },
        flops=count(sums.flops),
        parameters=sums.parameters,
        parameter_bytes=sums.parameter_bytes,
        traffic=count(sums.traffic),
        activation_bytes=count(sums.activation_bytes),
        seconds=seconds,
    )


def _dearness(row: PlanRow) -> tuple[float, int, int]:
    return (row.seconds or 0.0, row.flops or 0, row.parameter_bytes)


def _node_dearness(
    node: ir.Node, cost: Cost, number: Numbers, prediction: Prediction | None
) -> tuple[float, int]:
    seconds = prediction.by_node[node] if prediction else 0.0
    return seconds, number(cost.nodes[node].flops)
