#!/usr/bin/env python3
"""Run ONNX's own backend tests before and after passes: what ran correctly must still do so.

Each case goes four ways: as it is, with all inputs turned into initializers, so that constants
fold, with a random half of them, and with that half and no extents declared. ONNX Runtime runs the
file before the passes and the file after, on one thread, as written and with its own optimizations.

    python tools/bench/backend_nodes.py [--kinds node light] [--only SUBSTRING]
        [--passes PIPELINE] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.backend_cases import KINDS, VARIANTS, Case, cases_of, variant_of
from bench.backend_check import Outcome, check

from lwc.pipeline.passes import Pass
from lwc.pipeline.spec import parse


def outcomes(
    kinds: Sequence[str], pipeline: str, only: str = "", *, part: slice = slice(None)
) -> Iterator[Outcome]:
    """Check every case of some kinds, whose name contains `only`, in all variants.

    Args:
        kinds: The kinds.
        pipeline: The passes.
        only: Part of the names.
        part: Which of the cases, as a slice of those of each kind.
    """
    passes = parse(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for case in cases_of(kind, only)[part]:
                yield from _variants(kind, case, passes, Path(folder))


def _variants(kind: str, case: Case, passes: tuple[Pass, ...], folder: Path) -> Iterator[Outcome]:
    """Check the variants; of a case with one input, two are the same model."""
    known: dict[bytes, Outcome] = {}
    for name in VARIANTS:
        variant = variant_of(case, name)
        content = variant.model.SerializeToString(deterministic=True)
        if content not in known:
            known[content] = check(kind, case, variant, passes, folder)
        yield replace(known[content], variant=name)


def summarize(rows: Sequence[Outcome]) -> dict[str, Any]:
    """Count, by kind and variant.

    `changed` counts cases that ONNX Runtime runs correctly, `refused` and `failed` all of them:
    passes must not break down on a case that ONNX Runtime cannot run either.
    """
    groups: dict[str, list[Outcome]] = {}
    for row in rows:
        groups.setdefault(f"{row.kind}, {row.variant}", []).append(row)
    summary: dict[str, Any] = {}
    for name, group in groups.items():
        before = Counter(row.before for row in group)
        status = Counter(row.status for row in group)
        summary[name] = {
            "cases": len(group),
            "correct": before["correct"],
            "cannot_run": before["cannot run"],
            "other_result": before["other result"],
            "refused": status["refused"],
            "changed": sum(row.changed for row in group if row.before == "correct"),
            "failed": status["failed"],
        }
    return summary


def show(rows: Sequence[Outcome], console: Console) -> dict[str, Any]:
    """Print the counts, what was refused and what failed; return the counts."""
    summary = summarize(rows)
    table = Table(title="cases by what ONNX Runtime makes of them, and what became of them")
    table.add_column("kind, variant")
    for column in ("cases", "correct", "cannot run", "other result"):
        table.add_column(column, justify="right")
    for column in ("refused by the reader", "changed of the correct", "failures"):
        table.add_column(column, justify="right")
    for name, counts in summary.items():
        table.add_row(name, *map(str, counts.values()))
    console.print(table)
    for status, title in (("refused", "refused by the reader"), ("failed", "failures")):
        chosen = [row for row in rows if row.status == status]
        if chosen:
            console.print(f"{title}:")
        for row in chosen:
            place = f"  {row.kind} {row.case}, {row.variant} ({row.before} before)"
            console.print(f"{place}: {row.reason}", markup=False, highlight=False)
    console.print(f"failures: {sum(counts['failed'] for counts in summary.values())}")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["node", "light"])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="part of the case's name")
    parser.add_argument("--passes", default="canonicalize", metavar="PIPELINE")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    rows = list(outcomes(arguments.kinds, arguments.passes, arguments.only))
    summary = show(rows, console)
    if arguments.json:
        figures = {"summary": summary, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
