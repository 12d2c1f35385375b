#!/usr/bin/env python3
"""Plant faults into passes and see whether `check_pass` finds them.

Each fault of mutations.py and weight_mutations.py is planted in a process of its own, in which
`lwc.verify.check_pass` checks the pass with default settings. The table says what was found, after
how many graphs and seconds, and how small the reproducer is. `--clean` runs the passes without a
fault instead: every report is a false alarm then. Drawing ends after a time, so that fewer graphs
are drawn on a loaded machine: run it alone, and compare the numbers of graphs.

    python tools/bench/mutants.py [--only WORDS] [--jobs 2] [--json FILE]
    python tools/bench/mutants.py --clean [--examples 2000] [--json FILE]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import importlib.abc
import importlib.machinery
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from mutations import GRAPH_MUTATIONS, Mutation
from weight_mutations import WEIGHT_MUTATIONS

MUTATIONS = (*GRAPH_MUTATIONS, *WEIGHT_MUTATIONS)

LIMIT = 60.0
"""Seconds in which a fault must be found."""

BROKEN_TEXT = re.compile(r"\b(NameError|ImportError|ModuleNotFoundError|AttributeError)\b")
"""A crash with one of these shows that the planted text does not run, not that a fault was seen."""

CLEAN = ("canonicalize", "fold-linear", "infer-shapes", "quantize-weights", "bind-dims{N=3}")


class Planter(importlib.abc.MetaPathFinder):
    """Finds one module as usual and loads it with changed source."""

    def __init__(self, mutation: Mutation) -> None:
        self.mutation = mutation

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.mutation.module:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                assert spec.origin is not None
                spec.loader = Changed(fullname, spec.origin, self.mutation)
                return spec
        return None


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from its source with the fault in it."""

    def __init__(self, name: str, path: str, mutation: Mutation) -> None:
        super().__init__(name, path)
        self.mutation = mutation

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text(encoding="utf-8")
        count = source.count(self.mutation.old)
        if count != 1:
            raise ValueError(
                f"'{self.mutation.name}': its text occurs {count} times in {self.mutation.module}"
            )
        changed = source.replace(self.mutation.old, self.mutation.new)
        return compile(changed, self.path, "exec")


def plant(mutation: Mutation) -> None:
    """Let the changed module be imported in place of the right one, by whoever imports it first.

    Raises:
        ValueError: The module was imported before, or the text to replace is not there once.
    """
    if mutation.module in sys.modules:
        raise ValueError(f"{mutation.module} is imported already")
    sys.meta_path.insert(0, Planter(mutation))
    importlib.import_module(mutation.module)


def check(spec: str, seed: int, examples: int | None, seconds: float | None) -> dict[str, Any]:
    """Check a pass and return what was found as plain data."""
    from lwc.pipeline.spec import resolve
    from lwc.verify.contract.property import PassBrokenError, check_pass

    settings: dict[str, Any] = {"seed": seed}
    if examples is not None:
        settings["examples"] = examples
    if seconds is not None:
        settings["seconds"] = seconds
    start = time.perf_counter()
    try:
        report = check_pass(resolve(spec)[0], **settings)
    except PassBrokenError as broken:
        return {
            "found": True,
            "clause": broken.violation.clause,
            "message": broken.violation.message.splitlines()[0],
            "graphs": broken.examples,
            "nodes": broken.counterexample.nodes,
            "command": broken.counterexample.command,
            "seconds": time.perf_counter() - start,
        }
    return {
        "found": False,
        "graphs": report.examples,
        "changed": report.changed,
        "seconds": time.perf_counter() - start,
    }


def run_child(arguments: list[str], timeout: float) -> dict[str, Any]:
    """Run this program for one pass in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"found": False, "error": f"not done after {timeout:.0f} s", "seconds": timeout}
    if done.returncode:
        # Killed from outside, such as for want of memory, it says nothing.
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"found": False, "error": said[-1], "seconds": 0.0}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def on_merit(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result, as an error where what was found is only that the fault does not run."""
    if result.get("clause") == "crash" and BROKEN_TEXT.search(result["message"]):
        return {**result, "found": False, "error": "the fault itself does not run"}
    return result


def choose(words: str | None) -> list[Mutation]:
    """Return the faults that have `words` in their name or in the pass that shows them."""
    return [each for each in MUTATIONS if not words or words in each.name or words in each.spec]


def verdict_on(row: dict[str, Any]) -> str:
    """Say what found a fault, or on how much nothing did: a loaded machine draws fewer graphs."""
    if "error" in row:
        return str(row["error"])
    if not row["found"]:
        return f"NOT FOUND on {row['graphs']} graphs, {row['changed']} of them changed"
    late = row["seconds"] > LIMIT
    return f"NOT FOUND in time, but by {row['clause']}" if late else str(row["clause"])


def run_mutants(
    chosen: list[Mutation], jobs: int, extra: list[str], console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Plant each fault and show what became of it."""

    def one(mutation: Mutation) -> dict[str, Any]:
        index = str(MUTATIONS.index(mutation))
        result = on_merit(run_child(["--child", index, *extra], 1200.0))
        print(f"{mutation.name}: {result}", file=sys.stderr)
        return {"name": mutation.name, "kind": mutation.kind, "pass": mutation.spec, **result}

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, chosen))
    table = Table(title="faults planted, found by check_pass with default settings")
    for column in ("fault", "kind", "pass", "found by", "graphs", "nodes", "seconds"):
        table.add_column(
            column, justify="left" if column in "fault kind pass found by" else "right"
        )
    for row in rows:
        table.add_row(
            row["name"], row["kind"], row["pass"], verdict_on(row), str(row.get("graphs", "-")),
            str(row.get("nodes", "-")), f"{row['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    caught = [row for row in rows if row["found"] and row["seconds"] <= LIMIT]
    summary = {
        "faults": len(rows),
        "found": len(caught),
        "share": len(caught) / len(rows),
        "median_nodes": statistics.median(row["nodes"] for row in caught) if caught else None,
        "median_seconds": statistics.median(row["seconds"] for row in caught) if caught else None,
        "slowest_seconds": max((row["seconds"] for row in caught), default=None),
        "missed": [row["name"] for row in rows if row not in caught],
        "by_clause": dict(Counter(row["clause"] for row in caught).most_common()),
    }
    console.print(
        f"{len(caught)} of {len(rows)} faults found within {LIMIT:.0f} s "
        f"({100 * summary['share']:.1f} %); reproducers have {summary['median_nodes']} nodes, "
        f"found after {summary['median_seconds']} s (medians); "
        f"missed: {', '.join(summary['missed']) or 'none'}"
    )
    clauses = ", ".join(f"{clause} {count}" for clause, count in summary["by_clause"].items())
    console.print(f"found by clause: {clauses or 'none'}")
    return summary, rows


def run_clean(
    specs: list[str], examples: int, jobs: int, seed: int, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Check the passes as they are: nothing must be found."""

    def one(spec: str) -> dict[str, Any]:
        arguments = ["--clean-child", spec, "--examples", str(examples), "--seed", str(seed)]
        result = run_child(arguments, 3600.0)
        print(f"{spec}: {result}", file=sys.stderr)
        return {"pass": spec, **result}

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, specs))
    table = Table(title="passes as they are")
    for column in ("pass", "graphs", "changed", "false alarms", "seconds"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for row in rows:
        alarm = row.get("error") or (f"1 ({row['clause']})" if row["found"] else "0")
        table.add_row(
            row["pass"], str(row.get("graphs", "-")), str(row.get("changed", "-")), alarm,
            f"{row['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    alarms = sum(bool(row["found"] or "error" in row) for row in rows)
    console.print(f"{alarms} false alarms in {len(rows)} passes")
    summary = {"false_alarms": alarms, "graphs": sum(row.get("graphs", 0) for row in rows)}
    return summary, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="WORDS", help="faults with them in their name or pass")
    parser.add_argument("--clean", action="store_true", help="check the passes without a fault")
    parser.add_argument("--examples", type=int, default=2000, help="graphs per pass with --clean")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--seconds", type=float, help="time for drawing graphs; check_pass's default otherwise"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--clean-child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        mutation = MUTATIONS[arguments.child]
        plant(mutation)
        print(json.dumps(check(mutation.spec, arguments.seed, None, arguments.seconds)))
        return
    if arguments.clean_child is not None:
        result = check(arguments.clean_child, arguments.seed, arguments.examples, 3600.0)
        print(json.dumps(result))
        return
    nothing = f"--only: nothing has '{arguments.only}' in its name or pass"
    console = Console(width=None if sys.stdout.isatty() else 160)
    if arguments.clean:
        specs = [spec for spec in CLEAN if not arguments.only or arguments.only in spec]
        if not specs:
            parser.error(nothing)
        summary, rows = run_clean(
            specs, arguments.examples, arguments.jobs, arguments.seed, console
        )
    else:
        chosen = choose(arguments.only)
        if not chosen:
            parser.error(nothing)
        extra = ["--seed", str(arguments.seed)]
        if arguments.seconds is not None:
            extra += ["--seconds", str(arguments.seconds)]
        summary, rows = run_mutants(chosen, arguments.jobs, extra, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
