"""The lines lwc-opt prints on stderr about a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from lwc.core import text

if TYPE_CHECKING:
    from lwc.core.diagnostics import Remark, RemarkKind
    from lwc.frontend.onnx_writer import SaveResult
    from lwc.pipeline.record import PassRecord, PipelineRecord, Snapshot

__all__ = ["RemarkFilter", "remark_lines", "summary_lines", "written_line"]

RemarkFilter = Literal["none", "missed", "all"]

_SHOWN: dict[RemarkFilter, tuple[RemarkKind, ...]] = {
    "none": ("warning",),
    "missed": ("warning", "missed"),
    "all": ("warning", "missed", "note", "applied"),
}


def summary_lines(name: str, record: PipelineRecord) -> Iterator[str]:
    """Yield one line for the input and one for each pass."""
    yield f"{name}: {_size(record.input)}"
    width = max((len(each.name) for each in record.passes), default=0)
    for number, each in enumerate(record.passes, start=1):
        yield f"{number:>2} {each.name:<{width}}  {_pass_line(each)}, {each.seconds:.2f} s"


def remark_lines(remarks: Iterable[Remark], shown: RemarkFilter) -> Iterator[str]:
    """Yield the remarks the user asked for; warnings always."""
    for remark in remarks:
        if remark.kind in _SHOWN[shown]:
            yield str(remark)


def written_line(saved: SaveResult, output: Snapshot) -> str:
    """Tell what was written."""
    data = f" + {os.path.basename(saved.data_path)}" if saved.data_path is not None else ""
    return f"wrote {saved.path}{data}: {text.size(saved.nbytes)}, {_size(output)}"


def _size(snapshot: Snapshot) -> str:
    return f"{snapshot.nodes:,} nodes, {text.size(snapshot.parameter_bytes)} of weights"


def _pass_line(each: PassRecord) -> str:
    counts = f", {each.applied:,} rewrites" if each.applied else ""
    if each.missed:
        counts += f", {len(each.missed):,} missed"
    counts += "".join(
        f", {count:,} {name}"
        for name, count in each.statistics.items()
        if name in ("layers resumed", "statistics resumed")
    )
    if step := each.statistics.get("training resumed"):
        counts += f", resumed at step {step:,}"
    counts += _judged(each)
    if not each.changed:
        return f"unchanged: {_why_unchanged(each)}"
    weights = f"{text.size(each.before.parameter_bytes)}"
    if each.after.parameter_bytes != each.before.parameter_bytes:
        weights += f" -> {text.size(each.after.parameter_bytes)}"
    nodes = f"{each.before.nodes:,}"
    if each.after.nodes != each.before.nodes:
        nodes += f" -> {each.after.nodes:,}"
    checked = f", {each.verification}" if each.verification else ""
    return f"{nodes} nodes, {weights}{counts}{checked}"


def _judged(each: PassRecord) -> str:
    """Tell what a pass that trains found on data that it did not train on."""
    for name in ("held-out perplexity", "held-out loss"):
        before, after = (each.statistics.get(f"{name} {when}") for when in ("before", "after"))
        if isinstance(before, float) and isinstance(after, float):
            # A perplexity says what it is of; a loss is a mixture.
            loss = each.statistics.get("loss") if name == "held-out loss" else None
            return f", {name} {before:.4g} -> {after:.4g}" + (f" ({loss})" if loss else "")
    return ""


def _why_unchanged(each: PassRecord) -> str:
    notes = [remark for remark in each.remarks if remark.kind in ("note", "warning")]
    if each.missed:
        # What is missed of the whole model comes before what is of one of its nodes.
        first = next((remark for remark in each.missed if not remark.node), each.missed[0])
        place = f" at {first.node}" if first.node else ""
        more = f" (and {len(each.missed) - 1} more)" if len(each.missed) > 1 else ""
        return f"missed{place}: {first.message}{more}"
    return notes[-1].message if notes else "found nothing to do"
