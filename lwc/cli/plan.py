"""`--plan`: what a model costs, by operator and in total, without running it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.plan import Plan, PlanRow, plan_rows
from lwc.analysis.shapes import Shapes
from lwc.cli.plan_phases import phases_table
from lwc.core import text
from lwc.core.diagnostics import describe
from lwc.core.errors import UsageError
from lwc.pipeline.options import did_you_mean

if TYPE_CHECKING:
    from lwc.analysis.target import Target
    from lwc.core.module import Module

__all__ = ["plan_table", "print_plan"]

_PLAIN_WIDTH = 160
_LONGEST_CELL = 30
_LONGEST_LINE = 400


def print_plan(
    module: Module, bindings: Mapping[str, int], target: Target | None, color: str
) -> None:
    """Print the cost table to stdout.

    Args:
        module: The model.
        bindings: Numbers for symbolic dimensions; where some are missing, figures are formulas.
        target: The measured machine to predict seconds for, or None.
        color: `auto`, `always` or `never`.

    Raises:
        UsageError: No input has a dimension of a bound name, or its number is no extent.
    """
    console = Console(
        force_terminal=True if color == "always" else None,
        no_color=color == "never",
        width=None if sys.stdout.isatty() else _PLAIN_WIDTH,
        highlight=False,
        markup=False,
    )
    analyses = AnalysisManager(module)
    names = _input_dimensions(module, analyses.get(Shapes))
    _check_names(names, bindings)
    plan = plan_rows(module, analyses, bindings, target)
    console.print(plan_table(plan))

    def say(line: str) -> None:
        console.print(text.printable(line), soft_wrap=True)

    if plan.peak is not None:
        at = "" if plan.peak.node is None else f", at {describe(plan.peak.node)}"
        say(f"largest sum of live activations: {text.size(plan.peak.nbytes)}{at}")
    else:
        for name, formula in (
            ("FLOPs", plan.total.formulas["flops"]),
            ("bytes read and written", plan.total.formulas["traffic"]),
            ("largest sum of live activations, in bytes", plan.peak_formula),
        ):
            say(f"{name}: {_shortened(formula, _LONGEST_LINE)}")
        unbound = [name for name in names if name not in bindings]
        if unbound:
            say(f"numbers: {' '.join(f'--bind {name}=N' for name in unbound)}")
    phases = phases_table(module, analyses, bindings, target)
    if phases is not None:
        console.print(phases)
    if plan.uncounted:
        listed = ", ".join(f"{count} {op}" for op, count in sorted(plan.uncounted.items()))
        say(f"in no figure, for want of a rule or of a known shape: {listed}")
    if target is None:
        say("predicted time: this machine is not measured yet (--measure does it once)")


def plan_table(plan: Plan) -> Table:
    """Lay the plan out by operator.

    The rows are the nodes of the main graph; control flow counts with what it runs.
    """
    table = Table(title_justify="left")
    table.add_column("operator")
    headings = ["nodes", "FLOPs", "parameters", "weights", "read + written", "activations"]
    timed = plan.total.seconds is not None
    for heading in [*headings, "predicted"] if timed else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.by_op:
        table.add_row(*_cells(row, timed))
    table.add_section()
    table.add_row(*_cells(plan.total, timed))
    return table


def _cells(row: PlanRow, timed: bool) -> list[str]:
    def cell(value: int | None, formula: str, unit: bool) -> str:
        if value is None:
            return _shortened(formula, _LONGEST_CELL)
        return text.size(value) if unit else f"{value:,}"

    cells = [
        text.printable(row.name),
        f"{row.count:,}",
        cell(row.flops, row.formulas["flops"], False),
        f"{row.parameters:,}",
        text.size(row.parameter_bytes),
        cell(row.traffic, row.formulas["traffic"], True),
        cell(row.activation_bytes, row.formulas["activation_bytes"], True),
    ]
    return [*cells, text.time(row.seconds)] if timed else cells


def _shortened(formula: str, longest: int) -> str:
    return formula if len(formula) <= longest else f"{formula[: longest - 1]}…"


def _input_dimensions(module: Module, shapes: Shapes) -> list[str]:
    names = {
        symbol.name: None
        for value in module.graph.inputs
        for dim in shapes.shape(value) or ()
        if not isinstance(dim, int)
        for symbol in sorted(dim.free_symbols, key=str)
    }
    return list(names)


def _check_names(names: list[str], bindings: Mapping[str, int]) -> None:
    for name, extent in bindings.items():
        if extent < 1:
            raise UsageError(f"dimension '{name}' cannot be {extent}")
        if name not in names:
            raise UsageError(
                f"no input has a dimension '{name}'",
                remedy=did_you_mean(name, names)
                or f"the dimensions are {', '.join(sorted(names)) or 'all fixed'}",
            )
