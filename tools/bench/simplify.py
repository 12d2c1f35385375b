#!/usr/bin/env python3
"""Compare `canonicalize,fold-linear` with onnxsim and onnxslim on the ONNX files of fetch_models.

For every file and tool: nodes left (Constant nodes not counted, subgraphs counted), size of the
file written, and the time of load + simplify + save in this process (median of interleaved
repeats). lwc's outputs are compared with the original's at two input shapes.

    python tools/bench/simplify.py [--repeats 3] [--only NAME ...] [--json FILE]
    python tools/bench/simplify.py --scale [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from fetch_models import onnx_files

from lwc.analysis.manager import AnalysisManager
from lwc.calibration.feeds import FeedSpec, make_feed
from lwc.calibration.trials import working_feeds
from lwc.core.module import Module
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear
from lwc.pipeline.passes import PassContext

RTOL, ATOL = 1e-3, 1e-4
GROWTH = 1.01
SCALE = (5_000, 50_000)
GIVEN_INPUTS = {"sr": np.array(16000, dtype=np.int64)}
"""Inputs that no random number suits: silero-vad takes the sampling rates it was made for."""

GIVEN_DIMS = {
    "silero_vad": (
        {"input_d0": 2, "input_d1": 576, "state_d1": 2},
        {"input_d0": 1, "input_d1": 640, "state_d1": 1},
    )
}
"""Extents of a file whose dimensions are unnamed although two of them must be equal."""


def run_passes(module: Module) -> None:
    analyses = AnalysisManager(module)
    for each in (Canonicalize(), FoldLinear()):
        if each.run(module, PassContext(analyses, source=each.name)).changed:
            analyses.invalidate()


def by_lwc(source: Path, target: Path) -> None:
    module = load(source)
    run_passes(module)
    save(module, target)


def by_onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def by_onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def available_tools(console: Console) -> dict[str, Callable[[Path, Path], None]]:
    """Return the tools that import, loaded, so that no import is timed."""
    tools: dict[str, Callable[[Path, Path], None]] = {"lwc": by_lwc}
    for name, tool in (("onnxsim", by_onnxsim), ("onnxslim", by_onnxslim)):
        try:
            __import__(name)
        except ImportError:
            console.print(f"{name} is not installed: pip install {name}")
        else:
            tools[name] = tool
    return tools


def count_nodes(graph: onnx.GraphProto) -> int:
    count = 0
    for node in graph.node:
        count += node.op_type != "Constant"
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                count += count_nodes(inner)
    return count


def file_bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}*"))


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Original:
    """Runs the original file; what `working_feeds` asks whether a feed is valid."""

    def __init__(self, path: Path) -> None:
        self.session = session(path)

    def run(self, feed: Any, outputs: Any = None) -> dict[str, Any]:
        from lwc.core.errors import InputError

        names = [each.name for each in self.session.get_outputs()]
        try:
            return dict(zip(names, self.session.run(names, dict(feed)), strict=True))
        except Exception as error:
            raise InputError(str(error)) from error


def agreement(source: Path, result: Path) -> tuple[bool, float, int]:
    """Return whether all outputs agree, the largest absolute error, and the number of feeds."""
    original, simplified = Original(source), session(result)
    names = {each.name for each in original.session.get_inputs()}
    given = {name: value for name, value in GIVEN_INPUTS.items() if name in names}
    spec, module = FeedSpec(values=given), load(source)
    if source.stem in GIVEN_DIMS:
        feeds = [make_feed(module, dims, spec=spec) for dims in GIVEN_DIMS[source.stem]]
    else:
        feeds = working_feeds(module, original, 2, spec=spec)
    agree, worst = True, 0.0
    for feed in feeds:
        wanted = original.run(feed)
        found = simplified.run(list(wanted), dict(feed))
        for a, b in zip(wanted.values(), found, strict=True):
            same = a.shape == b.shape and np.allclose(a, b, rtol=RTOL, atol=ATOL, equal_nan=True)
            agree = agree and bool(same)
            if same and a.size and a.dtype.kind == "f":
                worst = max(worst, float(np.nanmax(np.abs(a - b))))
    return agree, worst, len(feeds)


def measure(
    name: str, source: Path, tools: dict[str, Callable[[Path, Path], None]], repeats: int
) -> dict[str, Any]:
    before = file_bytes(source)
    row: dict[str, Any] = {
        "model": name,
        "nodes": count_nodes(onnx.load(source, load_external_data=False).graph),
        "bytes": before,
        "tools": {},
    }
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            for tool, simplify in tools.items():
                if tool in failed:
                    continue
                target = Path(scratch) / tool / "model.onnx"
                target.parent.mkdir(exist_ok=True)
                start = time.perf_counter()
                try:
                    simplify(source, target)
                except Exception as error:
                    failed[tool] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                times[tool].append(time.perf_counter() - start)
        for tool in tools:
            if tool in failed:
                row["tools"][tool] = {"error": failed[tool], "seconds": times[tool][0]}
                continue
            target = Path(scratch) / tool / "model.onnx"
            row["tools"][tool] = {
                "nodes": count_nodes(onnx.load(target, load_external_data=False).graph),
                "ratio": file_bytes(target) / before,
                "seconds": statistics.median(times[tool]),
                "spread": [min(times[tool]), max(times[tool])],
            }
        agree, worst, feeds = agreement(source, Path(scratch) / "lwc" / "model.onnx")
    row |= {"agree": agree, "max_error": worst, "feeds": feeds}
    peers = {tool: result for tool, result in row["tools"].items() if tool != "lwc"}
    fair = [r["nodes"] for r in peers.values() if "nodes" in r and r["ratio"] <= GROWTH]
    row["bar"] = min(fair, default=None)
    row["met"] = row["bar"] is None or row["tools"]["lwc"]["nodes"] <= row["bar"]
    row["remark"] = "; ".join(
        f"{tool} failed: {result['error']}"
        if "error" in result
        else f"{tool}'s file grew {result['ratio']:.2f}x: not counted"
        for tool, result in peers.items()
        if "error" in result or result["ratio"] > GROWTH
    )
    return row


def show(rows: list[dict[str, Any]], tools: list[str], console: Console) -> dict[str, Any]:
    table = Table(title="nodes left / file size ratio / seconds (load + simplify + save, median)")
    table.add_column("model")
    table.add_column("nodes", justify="right")
    for tool in tools:
        table.add_column(tool, justify="right")
    table.add_column("bar", justify="right")
    table.add_column("max error", justify="right")
    table.add_column("remark")
    for row in rows:
        cells = []
        for tool in tools:
            r = row["tools"][tool]
            cells.append(
                "failed"
                if "error" in r
                else f"{r['nodes']} / {r['ratio']:.3f} / {r['seconds']:.3f}"
            )
        verdict = f"{row['max_error']:.1e}" if row["agree"] else "DISAGREES"
        bar = "-" if row["bar"] is None else f"{row['bar']} {'ok' if row['met'] else 'MISSED'}"
        table.add_row(row["model"], str(row["nodes"]), *cells, bar, verdict, row["remark"])
    console.print(table)
    total = {tool: sum(row["tools"][tool]["seconds"] for row in rows) for tool in tools}
    summary: dict[str, Any] = {
        "seconds": total,
        "against": {tool: total["lwc"] / total[tool] for tool in tools if tool != "lwc"},
        "bars_met": sum(row["met"] for row in rows),
        "files": len(rows),
        "all_agree": all(row["agree"] for row in rows),
        "largest_ratio": max(row["tools"]["lwc"]["ratio"] for row in rows),
    }
    times = ", ".join(f"{tool} {seconds:.2f} s" for tool, seconds in total.items())
    ratios = ", ".join(f"{r:.2f}x of {tool}'s" for tool, r in summary["against"].items())
    console.print(f"total: {times}; lwc takes {ratios}")
    console.print(
        f"node bar met on {summary['bars_met']} of {len(rows)} files; outputs agree: "
        f"{summary['all_agree']}; largest file ratio {summary['largest_ratio']:.3f}"
    )
    return summary


def layered_graph(nodes: int) -> onnx.ModelProto:
    """Make a graph of `nodes` nodes: layers with computed shapes, as exporters write attention."""
    made: list[onnx.NodeProto] = []

    def constant(name: str, value: Any) -> str:
        array = np.array(value, dtype=np.int64)
        tensor = helper.make_tensor(name, TensorProto.INT64, array.shape, array.ravel())
        made.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    x, layer = "x", 0
    while len(made) < nodes:
        p = f"layer{layer}."
        layer += 1
        shape = node("Shape", [x], p + "shape")
        parts = []
        for axis in (0, 1):
            extent = node("Gather", [shape, constant(f"{p}index{axis}", axis)], f"{p}extent{axis}")
            axes = constant(f"{p}axes{axis}", [0])
            parts.append(node("Unsqueeze", [extent, axes], f"{p}part{axis}"))
        heads = [constant(p + "heads", [4]), constant(p + "size", [4])]
        split = node("Concat", [*parts, *heads], p + "split", axis=0)
        joined = node("Concat", [*parts, constant(p + "width", [16])], p + "joined", axis=0)
        y = node("Add", [node("MatMul", [x, "weight"], p + "product"), "bias"], p + "linear")
        y = node("Transpose", [node("Reshape", [y, split], p + "view")], p + "t", perm=[0, 2, 1, 3])
        y = node("Transpose", [node("Softmax", [y], p + "soft")], p + "back", perm=[0, 2, 1, 3])
        x = node("Add", [x, node("Reshape", [y, joined], p + "merged")], p + "sum")
    weights = [
        helper.make_tensor("weight", TensorProto.FLOAT, [16, 16], np.ones(256)),
        helper.make_tensor("bias", TensorProto.FLOAT, [16], np.ones(16)),
    ]
    dims = ["batch", "sequence", 16]
    graph = helper.make_graph(
        made,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, dims)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure_scale(repeats: int, console: Console) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time canonicalize on layered graphs of two sizes and compute the growth exponent."""
    rows = []
    for size in SCALE:
        proto = layered_graph(size)
        times, after = [], 0
        for _ in range(repeats):
            module = Module(ir.from_proto(proto))
            start = time.process_time()
            Canonicalize().run(module, PassContext(AnalysisManager(module), source="canonicalize"))
            times.append(time.process_time() - start)
            after = module.graph.num_nodes()
        rows.append({
            "nodes": len(proto.graph.node), "after": after, "seconds": min(times), "all": times,
        })  # fmt: skip
    growth = rows[1]["seconds"] / rows[0]["seconds"]
    exponent = math.log(growth) / math.log(rows[1]["nodes"] / rows[0]["nodes"])
    table = Table(title="canonicalize, CPU seconds (best of repeats)")
    for column in ("nodes", "after", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["nodes"]), str(row["after"]), f"{row['seconds']:.2f}")
    console.print(table)
    console.print(f"time grows as n^{exponent:.3f}")
    return {"exponent": exponent}, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names from fetch_models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", action="store_true", help="measure growth with graph size")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    if arguments.scale:
        summary, rows = measure_scale(arguments.repeats, console)
    else:
        tools = available_tools(console)
        rows = []
        for name, path in onnx_files().items():
            if not arguments.only or name in arguments.only:
                rows.append(measure(name, path, tools, arguments.repeats))
                print(name, file=sys.stderr)
        summary = show(rows, list(tools), console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
