"""Renders a report as JSON, Markdown or one self-contained HTML page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from lwc.core import text
from lwc.core.errors import UsageError
from lwc.frontend.atomic import StagedFile
from lwc.report.data import PassEntry, Report

__all__ = ["FORMATS", "render", "write_report"]


def render(report: Report, suffix: str) -> str:
    """Return the report as text in the format that a file suffix names.

    Raises:
        UsageError: The suffix is none of `.json`, `.md`, `.html`.
    """
    renderer = FORMATS.get(suffix.lower())
    if renderer is None:
        raise UsageError(f"no report format '{suffix}'", remedy=f"use one of {', '.join(FORMATS)}")
    return renderer(report)


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report in the format its suffix names; an old file stays whole until the end.

    Raises:
        UsageError: The suffix names no format.
        OSError: The folder is missing or the disk is full.
    """
    target = Path(path)
    content = render(report, target.suffix)
    with StagedFile(str(target.parent), target.name) as staged:
        # File names need not be UTF-8.
        staged.file.write(content.encode(errors="backslashreplace"))
        staged.commit(str(target))


def _json(report: Report) -> str:
    data = _without_nonfinite(report.to_dict())
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nonfinite(data: Any) -> Any:
    """Replace NaN and infinities, which JSON has not, by null."""
    if isinstance(data, dict):
        return {key: _without_nonfinite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_nonfinite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _template(report: Report, name: str, escape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lwc.report"),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        count=text.count, size=text.size, time=text.time, cell=_markdown_cell, figure=_figure
    )
    environment.globals.update(factor=text.factor)
    return environment.get_template(name).render(
        report=report, summary=_summary(report), ops=_ops_changed, bars=_bars
    )


def _markdown(report: Report) -> str:
    return _template(report, "report.md.jinja", escape=False)


def _html(report: Report) -> str:
    return _template(report, "report.html.jinja", escape=True)


FORMATS: dict[str, Callable[[Report], str]] = {".json": _json, ".md": _markdown, ".html": _html}


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _markdown_cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _summary(report: Report) -> list[dict[str, Any]]:
    """List the figures at both ends: name, before, after, and their ratio."""
    rows: list[tuple[str, Any, Any, Callable[[Any], str]]] = [
        ("File size", report.input.file_bytes, report.output.file_bytes, text.size),
        ("Weights", report.before.parameter_bytes, report.after.parameter_bytes, text.size),
        ("Nodes", report.before.nodes, report.after.nodes, text.count),
        ("Parameters", report.before.parameters, report.after.parameters, text.count),
        ("FLOPs per run", report.before.flops, report.after.flops, text.count),
        (
            "Peak activations",
            report.before.peak_activation_bytes,
            report.after.peak_activation_bytes,
            text.size,
        ),
        (
            "Peak resident memory",
            report.input.peak_rss_bytes,
            report.output.peak_rss_bytes,
            text.size,
        ),
        (
            "Predicted time per run",
            report.before.predicted_seconds,
            report.after.predicted_seconds,
            text.time,
        ),
    ]
    summary = [
        {"name": n, "before": f(b), "after": f(a), "ratio": text.factor(a, b)}
        for n, b, a, f in rows
        if b is not None or a is not None
    ]
    for entry in report.latency:
        shape = " ".join(f"{name}={number}" for name, number in entry.bindings.items())
        summary.append(
            {
                "name": f"Measured time, {shape or 'static shapes'}",
                "before": text.time(entry.before.median),
                "after": text.time(entry.after.median),
                "ratio": f"{entry.ratio.median:.3g}×",
            }
        )
    for quality in report.quality:
        if quality.before is None or quality.after is None:
            continue
        summary.append(
            {
                "name": quality.metric.capitalize(),
                "before": f"{quality.before:.5g}",
                "after": f"{quality.after:.5g}",
                "ratio": text.factor(quality.after, quality.before),
            }
        )
    return summary


def _ops_changed(entry: PassEntry | Report) -> list[tuple[str, int, int]]:
    """List the operators whose number of nodes differs: name, before, after."""
    before, after = entry.before.nodes_by_op, entry.after.nodes_by_op
    return [
        (op, before.get(op, 0), after.get(op, 0))
        for op in sorted({*before, *after})
        if before.get(op, 0) != after.get(op, 0)
    ]


def _bars(rows: list[tuple[str, float | None, str]]) -> list[dict[str, Any]]:
    """Lay out a bar chart: each row's share of the longest bar, between 0 and 1."""
    known = [value for _, value, _ in rows if value is not None]
    longest = max(known, default=0) or 1
    return [
        {"label": label, "share": value / longest, "shown": shown}
        for label, value, shown in rows
        if value is not None
    ]
