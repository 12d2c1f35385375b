#!/usr/bin/env python3
"""Prints the reports of the demo side by side."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lwc.core.text import size, time
from lwc.report import Report, from_dict


def main(paths: list[str]) -> None:
    reports = [from_dict(json.loads(Path(path).read_text())) for path in paths]
    first = reports[0]
    table = Table(title="SmolLM2-135M, before and after", title_justify="left")
    table.add_column("")
    table.add_column("float32", justify="right")
    for path in paths:
        table.add_column(Path(path).stem.removeprefix("report-"), justify="right")

    def row(name: str, before: str, after: list[str]) -> None:
        table.add_row(name, before, *after)

    row("file", size(first.input.file_bytes), [_sized(report) for report in reports])
    row("nodes", str(first.before.nodes), [str(report.after.nodes) for report in reports])
    row(
        "peak resident memory",
        size(first.input.peak_rss_bytes),
        [size(report.output.peak_rss_bytes) for report in reports],
    )
    for index, entry in enumerate(first.latency):
        tokens = entry.bindings["sequence"]
        row(
            f"one run, {tokens} token{'s' * (tokens > 1)}",
            time(entry.before.median),
            [_timed(report, index) for report in reports],
        )
    perplexity = [next(q for q in r.quality if q.metric == "perplexity") for r in reports]
    row(
        "perplexity",
        f"{perplexity[0].before:.2f}",
        [f"{q.after:.2f} ({q.after / (q.before or 1) - 1:+.2%})" for q in perplexity],
    )
    console = Console()
    console.print(table)
    console.print(f"Perplexity: {perplexity[0].detail.partition(';')[0]}.")


def _sized(report: Report) -> str:
    after, before = report.output.file_bytes or 0, report.input.file_bytes or 1
    return f"{size(after)} ({after / before:.3f}×)"


def _timed(report: Report, index: int) -> str:
    entry = report.latency[index]
    spread = f"{entry.ratio.p10:.2f}–{entry.ratio.p90:.2f}"
    return f"{time(entry.after.median)} ({entry.ratio.median:.2f}×, {spread})"


if __name__ == "__main__":
    main(sys.argv[1:])
