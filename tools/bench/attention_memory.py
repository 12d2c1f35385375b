#!/usr/bin/env python3
"""Peak memory of causal attention in each lowering, measured and predicted.

    python tools/bench/attention_memory.py [--lengths 1024 2048 4096] [--json FILE]

One layer of self-attention, 9 heads of 64 (3 for keys and values where the operator has groups),
runs in a process of its own, as `tools/bench/cost_model.py` measures: with ONNX Runtime's arena
and memory pattern off, the highest resident memory of the second run less that after the first.
`growth` is the peak at the longest length over that at the shortest: the ratio of the lengths
where memory is linear, its square where a matrix of scores is held.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.core.module import Module
from lwc.evaluate.memory import peak_memory
from lwc.frontend.onnx_writer import save

HEADS, GROUPS, SIZE = 9, 3, 64
LENGTHS = (1024, 2048, 4096)
BAR = 0.2
_FLOAT, _INT32 = ir.DataType.FLOAT, ir.DataType.INT32

# The C library maps bigger blocks apart from the heap, so that resident memory falls when they
# are freed; by default the limit moves with what was freed before.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class Graph:
    """A graph of one attention operator under construction."""

    def __init__(self, groups: int) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.feeds: dict[str, Callable[[int], Any]] = {}
        self.groups = groups
        self.q = self.input("q", _FLOAT, [1, "sequence", HEADS * SIZE], _numbers(HEADS))
        self.k, self.v = (
            self.input(name, _FLOAT, [1, "sequence", groups * SIZE], _numbers(groups))
            for name in ("k", "v")
        )

    def input(
        self, name: str, dtype: ir.DataType, shape: list[Any], feed: Callable[[int], Any]
    ) -> ir.Value:
        """Add an input, and what it is fed at a length."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        self.feeds[name] = feed
        return value

    def node(self, op: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
        """Add a standard operator and return its output."""
        node = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), name=op)
        node.outputs[0].name = op.lower()
        self.nodes.append(node)
        return node.outputs[0]

    def finish(self, op: str, inputs: list[ir.Value | None], attributes: dict[str, Any]) -> Module:
        """Make the module, whose last node is this one."""
        domain = "" if op == "Attention" else "com.microsoft"
        node = ir.Node(domain, op, inputs, ir.convenience.convert_attributes(attributes), name=op)
        output = node.outputs[0]
        output.name, output.type = "output", ir.TensorType(_FLOAT)
        output.shape = ir.Shape([1, "sequence", HEADS * SIZE])
        graph = ir.Graph(
            self.inputs, [output], nodes=[*self.nodes, node], name="attention",
            opset_imports={"": 23, "com.microsoft": 1},
        )  # fmt: skip
        return Module(ir.Model(graph, ir_version=10))


def _numbers(heads: int) -> Callable[[int], Any]:
    return lambda length: np.random.default_rng(0).standard_normal(
        (1, length, heads * SIZE), np.float32
    )


def standard() -> tuple[Graph, Module]:
    """Attention of opset 23, causal."""
    graph = Graph(GROUPS)
    attributes = {"q_num_heads": HEADS, "kv_num_heads": GROUPS, "is_causal": 1}
    return graph, graph.finish("Attention", [graph.q, graph.k, graph.v], attributes)


def _multi_head(
    attributes: dict[str, Any], *, bias: bool = False, mask: bool = False
) -> tuple[Graph, Module]:
    graph = Graph(HEADS)
    inputs: list[ir.Value | None] = [graph.q, graph.k, graph.v]
    if mask:
        ones = graph.input(
            "mask", _INT32, [1, "sequence"], lambda length: np.ones((1, length), np.int32)
        )
        inputs += [None, ones]
    if bias:
        inputs += [None, None, _bias(graph)]
    return graph, graph.finish("MultiHeadAttention", inputs, {"num_heads": HEADS, **attributes})


def _bias(graph: Graph) -> ir.Value:
    def triangle(length: int) -> Any:
        return np.triu(np.full((1, 1, length, length), -1e9, np.float32), 1)

    return graph.input("bias", _FLOAT, [1, 1, "sequence", "sequence"], triangle)


def _grouped(
    attributes: dict[str, Any], *, bias: bool = False, presents: bool = True
) -> tuple[Graph, Module]:
    graph = Graph(GROUPS)
    extent = graph.node("Shape", [graph.q], start=1, end=2)
    total = graph.node("Cast", [extent], to=int(_INT32))
    one = graph.node("Constant", [], value=ir.tensor(np.array([1], np.int32)))
    last = graph.node("Sub", [total, one])
    inputs: list[ir.Value | None] = [graph.q, graph.k, graph.v, None, None, last, total]
    if bias:
        inputs += [None, None, None, _bias(graph)]
    module = graph.finish(
        "GroupQueryAttention",
        inputs,
        {"num_heads": HEADS, "kv_num_heads": GROUPS, **attributes},
    )
    if presents:
        node = module.graph[-1]
        node.resize_outputs(3)
        for value, name in zip(node.outputs[1:], ("present key", "present value"), strict=True):
            value.name, value.type = name, ir.TensorType(_FLOAT)
            value.shape = ir.Shape([1, GROUPS, "sequence", SIZE])
    return graph, module


LOWERINGS: dict[str, Callable[[], tuple[Graph, Module]]] = {
    "GroupQueryAttention": lambda: _grouped({}),
    "GroupQueryAttention, no presents": lambda: _grouped({}, presents=False),
    "GroupQueryAttention, window of 256": lambda: _grouped({"local_window_size": 256}),
    "GroupQueryAttention, mask added": lambda: _grouped({"causal": 0}, bias=True),
    "MultiHeadAttention, not causal": lambda: _multi_head({}),
    "MultiHeadAttention, padding mask": lambda: _multi_head({}, mask=True),
    "MultiHeadAttention, unidirectional": lambda: _multi_head({"unidirectional": 1}),
    "MultiHeadAttention, mask added": lambda: _multi_head({}, bias=True),
    "Attention, causal": standard,
}


def measure(name: str, lengths: list[int], folder: Path) -> list[dict[str, Any]]:
    """Measure and predict the peak of one lowering at every length."""
    graph, module = LOWERINGS[name]()
    path = folder / "attention.onnx"
    save(module, path)
    predicted = AnalysisManager(module).get(Memory)
    rows = []
    for length in lengths:
        small, feed = (
            {key: make(size) for key, make in graph.feeds.items()} for size in (64, length)
        )
        found = peak_memory(path, [small, feed], threads=1, arena=False, memory_pattern=False)
        fed = sum(array.nbytes for array in feed.values())
        measured = found.runs[1].peak - found.runs[0].resident - fed
        expected = predicted.where({"sequence": length}).nbytes
        rows.append(
            {
                "lowering": name,
                "length": length,
                "measured": measured,
                "predicted": expected,
                "error": expected / measured - 1,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--only", metavar="WORDS", default="", help="lowerings that have them")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    os.environ.update(_MALLOC)
    console = Console(width=None if os.isatty(1) else 120)
    table = Table(title="peak memory of attention, MB (predicted, error)")
    table.add_column("lowering")
    for length in arguments.lengths:
        table.add_column(f"{length} tokens", justify="right")
    table.add_column("growth", justify="right")
    every = []
    with tempfile.TemporaryDirectory() as folder:
        for name in LOWERINGS:
            if arguments.only not in name:
                continue
            rows = measure(name, arguments.lengths, Path(folder))
            every += rows
            cells = [
                f"{row['measured'] / 1e6:.1f} ({row['predicted'] / 1e6:.1f}, {row['error']:+.0%})"
                for row in rows
            ]
            table.add_row(name, *cells, f"{rows[-1]['measured'] / rows[0]['measured']:.1f}x")
    console.print(table)
    worst = max(abs(row["error"]) for row in every)
    console.print(f"largest error of the prediction: {worst:.0%} (bar {BAR:.0%})")
    if arguments.json:
        summary = {"largest error": worst}
        arguments.json.write_text(json.dumps({"summary": summary, "rows": every}, indent=2))


if __name__ == "__main__":
    main()
