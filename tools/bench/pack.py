#!/usr/bin/env python3
"""What packing linear layers that read the same activation gives: Q, K, V, and gate and up.

    python tools/bench/pack.py [--threads 1 2] [--tokens 1 512] [--rounds 15] [--json FILE]

The shapes are those of a decoder of width 576 with 9 heads of 64, 3 for keys and values, and a
feed-forward layer of 1536. A graph holds several layers with their own weights, all of which read
one activation, so that weights come from memory as in a model. Spellings of one thing run in turn,
round after round, and a spelling's time is the median over rounds of its time over that of the
first spelling, times the first one's median: what else runs on the machine hits them alike. One
thread is timed by its processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.predict import predict
from lwc.backends.onnxruntime.measure import load_target
from lwc.frontend.onnx_reader import from_proto

WIDTH, INNER, HEADS, GROUPS, SIZE = 576, 1536, 9, 3, 64
QUERY, KEY = HEADS * SIZE, GROUPS * SIZE
BLOCK = 32
LAYERS = {"float32": 8, "4 bits": 24}
_MS = "com.microsoft"

Weights = Literal["float32", "4 bits"]


@dataclass
class Graph:
    """Layers that read one activation.

    Attributes:
        weights: How weights are stored.
        past: Tokens in the cache of attention.
    """

    weights: Weights
    past: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    layer: int = 0

    def node(
        self, op: str, inputs: list[str], outputs: int = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node; return the names of its outputs."""
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """Add an initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def linear(self, source: str, depth: int, columns: int) -> str:
        """Add a product with a weight of its own."""
        if self.weights == "float32":
            weight = self._numbers((depth, columns)) / np.float32(np.sqrt(depth))
            return self.node("MatMul", [source, self.constant(weight)])[0]
        codes, scales = self._packed(depth, columns)
        attributes: dict[str, Any] = {
            "K": depth,
            "N": columns,
            "bits": 4,
            "block_size": BLOCK,
            "accuracy_level": 4,
        }
        inputs = [source, self.constant(codes), self.constant(scales)]
        return self.node("MatMulNBits", inputs, domain=_MS, **attributes)[0]

    def _numbers(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.random.default_rng(len(self.constants)).standard_normal(shape, np.float32)

    def _packed(
        self, depth: int, columns: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        random = np.random.default_rng(len(self.constants))
        blocks = depth // BLOCK
        codes = random.integers(0, 256, (columns, blocks, BLOCK // 2), dtype=np.uint8)
        return codes, np.full((columns, blocks), 0.02, np.float32)

    def split(self, value: str, *sizes: int) -> list[str]:
        """Cut a value along its last axis."""
        cuts = self.constant(np.array(sizes, np.int64))
        return self.node("Split", [value, cuts], len(sizes), axis=-1)

    def gate(self, gate: str, up: str) -> str:
        """Add silu(gate) * up, as ONNX Runtime runs it best."""
        opened = self.node("QuickGelu", [gate], domain=_MS, alpha=1.0)[0]
        return self.node("Mul", [opened, up])[0]

    def attend(self, *inputs: str) -> str:
        """Add attention to q, k and v, or to all of them as one."""
        rest = ["", ""] if len(inputs) == 1 else []
        cache = ["past_key", "past_value"] if self.past else ["", ""]
        inputs = (*inputs, *rest, *cache, "last", "total")
        sizes = {"num_heads": HEADS, "kv_num_heads": GROUPS}
        return self.node("GroupQueryAttention", list(inputs), 3, _MS, **sizes)[0]

    def expert(self, source: str) -> str:
        """Add gate, up, their product and down as a mixture of one expert."""
        router = self.constant(np.zeros((1, 1), np.float32))
        attributes: dict[str, Any] = {
            "k": 1, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }  # fmt: skip
        rows = self.node("Reshape", [source, self.constant(np.array([-1, WIDTH]))])[0]
        tokens = self.node("Shape", [rows], start=0, end=1)[0]
        shape = self.node("Concat", [tokens, self.constant(np.array([1]))], axis=0)[0]
        router = self.node("Expand", [router, shape])[0]
        if self.weights == "float32":
            first = self._numbers((1, 2 * INNER, WIDTH)) / np.float32(np.sqrt(WIDTH))
            last = self._numbers((1, WIDTH, INNER)) / np.float32(np.sqrt(INNER))
            inputs = [rows, router, self.constant(first), "", self.constant(last)]
            return self.node("MoE", inputs, domain=_MS, **attributes)[0]
        tensors = []
        for depth, width in ((WIDTH, 2 * INNER), (INNER, WIDTH)):
            codes, scales = self._packed(depth, width)
            codes = codes.reshape(1, width, depth // 2)
            tensors.append([self.constant(codes), self.constant(scales[None]), ""])
        inputs = [rows, router, *tensors[0], *tensors[1]]
        return self.node(
            "QMoE", inputs, domain=_MS, expert_weight_bits=4, block_size=BLOCK, accuracy_level=4,
            **attributes,
        )[0]  # fmt: skip


def _apart(graph: Graph) -> list[str]:
    return [graph.linear("x", WIDTH, columns) for columns in (QUERY, KEY, KEY)]


def _packed(graph: Graph) -> str:
    return graph.linear("x", WIDTH, QUERY + 2 * KEY)


def _gate_up(graph: Graph) -> list[str]:
    return [graph.linear("x", WIDTH, INNER) for _ in range(2)]


def _gate_up_packed(graph: Graph) -> list[str]:
    return graph.split(graph.linear("x", WIDTH, 2 * INNER), INNER, INNER)


Spelling = Callable[[Graph], list[str]]

CASES: dict[str, dict[str, Spelling]] = {
    "q, k, v": {
        "apart": _apart,
        "packed": lambda graph: [_packed(graph)],
        "packed, Split": lambda graph: graph.split(_packed(graph), QUERY, KEY, KEY),
    },
    "q, k, v and attention": {
        "apart": lambda graph: [graph.attend(*_apart(graph))],
        "packed": lambda graph: [graph.attend(_packed(graph))],
        "packed, Split": lambda graph: [
            graph.attend(*graph.split(_packed(graph), QUERY, KEY, KEY))
        ],
    },
    "gate and up": {
        "apart": _gate_up,
        "packed": lambda graph: [graph.linear("x", WIDTH, 2 * INNER)],
        "packed, Split": _gate_up_packed,
    },
    "gate, up and their product": {
        "apart": lambda graph: [graph.gate(*_gate_up(graph))],
        "packed, Split": lambda graph: [graph.gate(*_gate_up_packed(graph))],
    },
    "gate, up, product and down": {
        "apart": lambda graph: [graph.linear(graph.gate(*_gate_up(graph)), INNER, WIDTH)],
        "packed, Split": lambda graph: [
            graph.linear(graph.gate(*_gate_up_packed(graph)), INNER, WIDTH)
        ],
        "one expert": lambda graph: [graph.expert("x")],
    },
}
"""Spellings by what they compute; the first of each is what the others are compared with."""


def build(spelling: Spelling, weights: Weights, tokens: int, past: int) -> ModelProto:
    """Make the model of one spelling."""
    graph = Graph(weights, past)
    for _ in range(LAYERS[weights]):
        graph.outputs += spelling(graph)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, tokens, WIDTH])]
    if any(node.op_type == "GroupQueryAttention" for node in graph.nodes):
        graph.constants += [
            numpy_helper.from_array(np.array([past + tokens - 1], np.int32), "last"),
            numpy_helper.from_array(np.array(past + tokens, np.int32), "total"),
        ]
        for name in ("past_key", "past_value") if past else ():
            shape = [1, GROUPS, past, SIZE]
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "pack",
            inputs,
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                for name in graph.outputs
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(_MS, 1)],
        ir_version=10,
    )


class Runner:
    """Runs one spelling and times it.

    Args:
        model: The model.
        threads: Threads of the session.
    """

    def __init__(self, model: ModelProto, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.session, self.binding = session, session.io_binding()
        random = np.random.default_rng(0)
        for value in session.get_inputs():
            self.binding.bind_cpu_input(value.name, random.standard_normal(value.shape, np.float32))
        for value in session.get_outputs():
            self.binding.bind_output(value.name)
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.once()

    def once(self) -> float:
        """Run once; return seconds."""
        start = self.clock()
        self.session.run_with_iobinding(self.binding)
        return self.clock() - start


def measure(
    case: str, weights: Weights, tokens: int, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Measure all spellings of a case in turn; seconds are those of one layer."""
    past = 512 if tokens == 1 else 0
    models = {
        name: build(spelling, weights, tokens, past) for name, spelling in CASES[case].items()
    }
    runners = {name: Runner(model, threads) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    repeats = 5 if tokens == 1 else 1
    for _ in range(rounds):
        for name, runner in runners.items():
            seconds[name].append(min(runner.once() for _ in range(repeats)))
    base = next(iter(runners))
    layers = LAYERS[weights]
    rows = []
    for name, found in seconds.items():
        ratio = statistics.median(
            own / first for own, first in zip(found, seconds[base], strict=True)
        )
        rows.append(
            {
                "case": case,
                "spelling": name,
                "weights": weights,
                "tokens": tokens,
                "threads": threads,
                "microseconds": 1e6 * ratio * statistics.median(seconds[base]) / layers,
                "ratio": ratio,
                "predicted": _predicted(models[name], threads, layers),
            }
        )
    return rows


def _predicted(model: ModelProto, threads: int, layers: int) -> float | None:
    """Return the microseconds of a layer that the cost model expects, where it has a target."""
    target = load_target(threads)
    if target is None:
        return None
    cost = AnalysisManager(from_proto(model)).get(Cost)
    if cost.uncounted:
        return None
    return 1e6 * (predict(cost, target, {}).seconds - target.run_seconds) / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", metavar="WORDS", default="", help="cases that have them")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 120)
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        for weights in LAYERS:
            for tokens in arguments.tokens:
                title = f"{weights}, {tokens} tokens, {threads} threads: microseconds of a layer"
                table = Table("what", "spelling", "measured", "ratio", "predicted", title=title)
                for case in CASES:
                    if arguments.only not in case:
                        continue
                    made = measure(case, weights, tokens, threads, arguments.rounds)  # type: ignore[arg-type]
                    rows += made
                    for row in made:
                        predicted = row["predicted"]
                        table.add_row(
                            row["case"],
                            row["spelling"],
                            f"{row['microseconds']:.1f}",
                            f"{row['ratio']:.3f}",
                            "" if predicted is None else f"{predicted:.1f}",
                        )
                console.print(table)
    if arguments.json:
        summary = {
            f"{row['weights']}, {row['tokens']} tokens, {row['spelling']}": row["ratio"]
            for row in rows
        }
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
