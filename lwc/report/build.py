"""Builds a report from the record of a pipeline and the modules it went through."""

from __future__ import annotations

import itertools
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import lwc
from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.analysis.predict import UnboundError
from lwc.analysis.target import cpu_name
from lwc.core.diagnostics import Remark
from lwc.core.dims import bind
from lwc.evaluate.memory import file_size
from lwc.pipeline.record import take_snapshot
from lwc.report.data import Figures, Machine, MissedRewrite, ModelEntry, PassEntry, Report

if TYPE_CHECKING:
    from lwc.core.dims import Dim
    from lwc.core.module import Module
    from lwc.pipeline.record import PassRecord, PipelineRecord

__all__ = ["Predict", "build_report", "model_entry", "onnx_file", "take_figures", "this_machine"]


Predict: TypeAlias = "Callable[[Module, Mapping[str, int]], float]"
"""Predicts the seconds of one run of a module under bindings."""

_Number = TypeVar("_Number", int, float)


def take_figures(
    module: Module, bindings: Mapping[str, int], predict: Predict | None = None
) -> Figures:
    """Return what the cost model says of a module; no weight is read.

    Args:
        module: The module.
        bindings: Numbers for the symbolic dimensions; figures that need others are left out.
        predict: Predicts seconds, where that is wanted.
    """
    analyses = AnalysisManager(module)
    cost = analyses.get(Cost)
    snapshot = take_snapshot(module)
    total = cost.total
    return Figures(
        nodes=snapshot.nodes,
        nodes_by_op=dict(snapshot.ops),
        parameters=total.parameters,
        parameter_bytes=snapshot.parameter_bytes,
        flops=_number(total.flops, bindings),
        flops_formula=str(total.flops),
        peak_activation_bytes=_if_bound(lambda: analyses.get(Memory).peak(bindings)),
        traffic_bytes=_number(total.traffic, bindings),
        predicted_seconds=_if_bound(lambda: predict(module, bindings)) if predict else None,
        uncounted=dict(cost.uncounted),
    )


def build_report(
    record: PipelineRecord,
    modules: Sequence[Module],
    source: ModelEntry,
    result: ModelEntry,
    *,
    bindings: Mapping[str, int] | None = None,
    predict: Predict | None = None,
) -> Report:
    """Join the pipeline's record with the cost model's figures.

    Args:
        record: What the passes did.
        modules: The module before the first pass and after each one.
        source: The model that went in.
        result: The model that came out.
        bindings: Numbers for the symbolic dimensions.
        predict: Predicts seconds, where that is wanted.
    """
    bindings = dict(bindings or {})
    figures = [take_figures(modules[0], bindings, predict)]
    for module, entry in zip(modules[1:], record.passes, strict=True):
        figures.append(take_figures(module, bindings, predict) if entry.changed else figures[-1])
    return Report(
        pipeline=record.pipeline,
        machine=this_machine(),
        input=source,
        output=result,
        bindings=bindings,
        passes=[
            _pass_entry(entry, *ends)
            for entry, ends in zip(record.passes, itertools.pairwise(figures), strict=True)
        ],
        before=figures[0],
        after=figures[-1],
        seconds=record.seconds,
        notes=[str(remark) for remark in record.remarks],
    )


def model_entry(module: Module, path: str | None) -> ModelEntry:
    """Describe a module as one end of a pipeline.

    Args:
        module: The module.
        path: The file or folder that holds it, or None where it is only in memory.
    """
    kind = module.source.format
    if path != module.source.path:
        kind = "memory" if path is None else Path(path).suffix.lstrip(".") or "onnx"
    size = None
    if path is not None and (file := onnx_file(Path(path))) is not None:
        size = file_size(file)
    elif path is not None and Path(path).is_file():
        size = Path(path).stat().st_size
    return ModelEntry(
        path=path,
        format=kind,
        file_bytes=size,
        dense_bytes=4 * AnalysisManager(module).get(Cost).total.parameters,
    )


def onnx_file(path: Path) -> Path | None:
    """Return the ONNX file that `path` is or, as a folder, holds."""
    file = path / "model.onnx" if path.is_dir() else path
    return file if file.suffix == ".onnx" and file.exists() else None


def this_machine() -> Machine:
    """Describe the machine and the versions that decide its speed."""
    import onnxruntime

    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
        lwc=lwc.__version__,
    )


def _if_bound(figure: Callable[[], _Number]) -> _Number | None:
    try:
        return figure()
    except UnboundError:
        return None


def _number(dim: Dim, bindings: Mapping[str, int]) -> float | None:
    bound = bind(dim, bindings)
    if isinstance(bound, int):
        return bound
    return None if bound.free_symbols else float(bound)


def _pass_entry(record: PassRecord, before: Figures, after: Figures) -> PassEntry:
    notes = [r.message for r in record.remarks if r.kind in ("note", "warning")]
    if record.verification:
        notes.append(f"verified: {record.verification}")
    return PassEntry(
        name=record.name,
        spec=record.spec,
        contract=record.contract,
        assumptions=list(record.assumptions),
        seconds=record.seconds,
        verify_seconds=record.verify_seconds,
        changed=record.changed,
        applied={rule or record.name: count for rule, count in record.rewrites.items()},
        missed=_group(r for r in record.remarks if r.kind == "missed"),
        notes=notes,
        statistics=dict(record.statistics),
        before=before,
        after=after,
    )


def _group(remarks: Iterable[Remark]) -> list[MissedRewrite]:
    examples: dict[tuple[str | None, str], str | None] = {}
    counts: Counter[tuple[str | None, str]] = Counter()
    for remark in remarks:
        key = (remark.rule, remark.message)
        counts[key] += 1
        examples.setdefault(key, remark.node)
    return [
        MissedRewrite(reason=key[1], count=count, example=examples[key], rule=key[0])
        for key, count in counts.most_common()
    ]
