#!/usr/bin/env python3
"""Run ONNX's own backend tests through the `fx` backend, and say which operators fail.

A case passes where the lowered module gives what ONNX expects. What ONNX Runtime makes of the same
model is told beside it: a case that it fails too may be beyond what can be asked for.

    python tools/bench/fx_nodes.py [--kinds node light] [--only SUBSTRING] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.backend_cases import KINDS, Case, cases_of
from bench.backend_check import difference, named, run, stated

from lwc.backends.fx.session import FxBackend
from lwc.frontend.load import load


@dataclass(frozen=True)
class Row:
    """What became of one case.

    Attributes:
        kind: Kind of the case.
        case: Its name.
        operator: The operator that the case is about, as its name and its nodes tell.
        passed: Whether the `fx` backend gives what ONNX expects.
        onnxruntime: Whether ONNX Runtime does.
        reason: How the `fx` backend failed.
    """

    kind: str
    case: str
    operator: str
    passed: bool
    onnxruntime: bool
    reason: str = ""


def rows_of(kinds: Sequence[str], only: str = "") -> Iterator[Row]:
    """Check every case of some kinds whose name contains `only`."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for case in cases_of(kind, only):
                yield _check(kind, case, Path(folder))


def _check(kind: str, case: Case, folder: Path) -> Row:
    file = folder / "case.onnx"
    file.write_bytes(case.model.SerializeToString())
    try:
        correct = not difference(run(file, case.feed), case.expected, stated(case))
    except Exception:  # ONNX Runtime's errors have no common base.
        correct = False
    operator = _operator(case)
    try:
        module = load(file)
        with FxBackend().compile(module, threads=1) as executable:
            found = executable.run(dict(case.feed))
        reason = difference(list(found.values()), case.expected, stated(case)) or ""
    except Exception as error:
        reason = named(error).replace(f"{file}: ", "")
    return Row(kind, case.name, operator, not reason, correct, reason)


def _operator(case: Case) -> str:
    """Name the operator whose letters the case's name has most of, or the only one."""
    nodes = case.model.graph.node
    names = [f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes]
    plain = case.name.replace("_", "").lower()
    fitting = [name for name in names if name.rpartition("::")[2].lower() in plain]
    return max(fitting or names, key=len, default="none")


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Count what passed, of all and of what ONNX Runtime passes."""
    asked = [row for row in rows if row.onnxruntime]
    return {
        "cases": len(rows),
        "passed": sum(row.passed for row in rows),
        "onnxruntime_passes": len(asked),
        "passed_of_these": sum(row.passed for row in asked),
    }


def show(rows: Sequence[Row], console: Console) -> dict[str, Any]:
    """Print the counts, and the failures by operator; return the counts."""
    summary = summarize(rows)
    counted = Table("cases", "passed", "of", "share")
    for text, part, whole in (
        ("that ONNX Runtime passes", summary["passed_of_these"], summary["onnxruntime_passes"]),
        ("all", summary["passed"], summary["cases"]),
    ):
        counted.add_row(text, str(part), str(whole), f"{part / max(whole, 1):.1%}")
    console.print(counted)
    failed = [row for row in rows if not row.passed]
    counts = Counter(row.operator for row in failed)
    table = Table("operator", "failures", "of them passed by ONNX Runtime", "the first one")
    for operator, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        group = [row for row in failed if row.operator == operator]
        group.sort(key=lambda row: not row.onnxruntime)
        first = f"{group[0].case}: {group[0].reason}".replace("[", "\\[")
        table.add_row(operator, str(count), str(sum(row.onnxruntime for row in group)), first)
    if failed:
        console.print(table)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["node"])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="part of the case's name")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    rows = list(rows_of(arguments.kinds, arguments.only))
    summary = show(rows, console)
    if arguments.json:
        figures = {"summary": summary, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
