"""`--plan`: what a model costs, by operator and in total, without running it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lwc.analysis.cost import Cost, Totals
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.analysis.shapes import Shapes
from lwc.cli.summary import format_bytes
from lwc.core.dims import Dim, bind
from lwc.core.errors import UsageError
from lwc.core.walk import op_name
from lwc.pipeline.options import did_you_mean

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.module import Module

__all__ = ["plan_table", "print_plan"]

_PLAIN_WIDTH = 160


def print_plan(module: Module, bindings: Mapping[str, int], color: str) -> None:
    """Print the cost table to stdout.

    Args:
        module: The model.
        bindings: Numbers for symbolic dimensions; figures in others stay formulas.
        color: `auto`, `always` or `never`.

    Raises:
        UsageError: No input has a dimension of a bound name.
    """
    plain = not sys.stdout.isatty()
    console = Console(
        force_terminal=True if color == "always" else None,
        no_color=color == "never",
        width=_PLAIN_WIDTH if plain else None,
        highlight=False,
    )
    analyses = AnalysisManager(module)
    _check_names(module, analyses.get(Shapes), bindings)
    cost, memory = analyses.get(Cost), analyses.get(Memory)
    console.print(plan_table(module, cost, bindings))
    peak = _peak(memory, bindings)
    console.print(f"largest sum of live activations: {peak}")
    if cost.uncounted:
        listed = ", ".join(f"{count} {op}" for op, count in sorted(cost.uncounted.items()))
        console.print(f"in no figure, for want of a rule or of a known shape: {listed}")


def plan_table(module: Module, cost: Cost, bindings: Mapping[str, int]) -> Table:
    """Lay the cost out by operator, the most arithmetic first.

    The rows are the nodes of the main graph; control flow counts with what it runs.
    """
    table = Table(title_justify="left")
    table.add_column("operator")
    for heading in ("nodes", "FLOPs", "parameters", "weights", "read + written", "activations"):
        table.add_column(heading, justify="right", overflow="fold")
    groups: dict[str, list[ir.Node]] = {}
    for node in module.graph:
        if op_name(node) != "Constant":
            groups.setdefault(op_name(node), []).append(node)
    rows = [(op, len(nodes), cost.totals(nodes)) for op, nodes in groups.items()]
    rows.sort(key=lambda row: (-_rank(bind(row[2].flops, bindings)), row[0]))
    for op, count, totals in rows:
        table.add_row(op, f"{count:,}", *_cells(totals, bindings))
    table.add_section()
    table.add_row("total", f"{sum(row[1] for row in rows):,}", *_cells(cost.total, bindings))
    return table


def _cells(totals: Totals, bindings: Mapping[str, int]) -> list[str]:
    return [
        _count(bind(totals.flops, bindings)),
        f"{totals.parameters:,}",
        format_bytes(totals.parameter_bytes),
        _bytes(bind(totals.traffic, bindings)),
        _bytes(bind(totals.activation_bytes, bindings)),
    ]


def _check_names(module: Module, shapes: Shapes, bindings: Mapping[str, int]) -> None:
    names = {
        symbol.name
        for value in module.graph.inputs
        for dim in shapes.shape(value) or ()
        if not isinstance(dim, int)
        for symbol in dim.free_symbols
    }
    for name in bindings:
        if name not in names:
            raise UsageError(
                f"no input has a dimension '{name}'",
                remedy=did_you_mean(name, names)
                or f"the dimensions are {', '.join(sorted(names)) or 'all fixed'}",
            )


def _rank(dim: Dim) -> float:
    """Order figures that may be formulas: unknown dimensions count as 100."""
    if isinstance(dim, int):
        return dim
    return float(dim.subs(dict.fromkeys(dim.free_symbols, 100)))


def _count(dim: Dim) -> str:
    return f"{dim:,}" if isinstance(dim, int) else str(dim)


def _bytes(dim: Dim) -> str:
    return format_bytes(dim) if isinstance(dim, int) else str(dim)


def _peak(memory: Memory, bindings: Mapping[str, int]) -> str:
    try:
        return format_bytes(memory.peak(bindings))
    except UsageError:
        return f"{_bytes(bind(memory.closed_form, bindings))} (bytes; --bind gives a number)"
