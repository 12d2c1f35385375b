#!/usr/bin/env python3
"""Does a window make attention faster? One layer of 9 heads of 64, 3 for keys and values.

    python tools/bench/window.py [--lengths 2048 4096] [--window 256] [--rounds 7] [--json FILE]

Prompts, and one token behind a cache of that length, in each spelling: GroupQueryAttention without
and with `local_window_size`, with the window as a mask that is added, and in pieces: queries in
chunks as long as the window, each against the keys of two chunks, as Longformer computes it, by
MultiHeadAttention on chunks laid out already. Spellings run in turn on one thread and are timed by
its processor time; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

HEADS, GROUPS, SIZE = 9, 3, 64
_MS = "com.microsoft"

Array = np.ndarray[Any, Any]


def session(
    op: str, inputs: dict[str, Array | None], outputs: int, **attributes: Any
) -> Callable[[], float]:
    """Make a model of one operator; return what runs it and gives seconds."""
    given = {name: array for name, array in inputs.items() if array is not None}
    names = [name if array is not None else "" for name, array in inputs.items()]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op, names, results, domain=_MS, **attributes)
    graph = helper.make_graph(
        [node],
        "window",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in given.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(_MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    made = ort.InferenceSession(model.SerializeToString(), options)
    binding = made.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for name in results:
        binding.bind_output(name)

    def once() -> float:
        start = time.thread_time()
        made.run_with_iobinding(binding)
        return time.thread_time() - start

    once()
    return once


def numbers(*shape: int) -> Array:
    """Return normal numbers."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def grouped(length: int, past: int, window: int, mask: int = 0) -> Callable[[], float]:
    """GroupQueryAttention of new tokens behind a past."""
    whole = length + past
    bias = None
    if mask:
        i, j = np.arange(past, whole)[:, None], np.arange(whole)
        bias = np.where(i - j < mask, 0, -1e9).astype(np.float32)[None, None]
    cache = numbers(1, GROUPS, past, SIZE) if past else None
    inputs: dict[str, Array | None] = {
        "q": numbers(1, length, HEADS * SIZE), "k": numbers(1, length, GROUPS * SIZE),
        "v": numbers(1, length, GROUPS * SIZE), "past_key": cache, "past_value": cache,
        "last": np.array([whole - 1], np.int32), "total": np.array(whole, np.int32),
        "cos": None, "sin": None, "positions": None, "bias": bias,
    }  # fmt: skip
    sizes = {"num_heads": HEADS, "kv_num_heads": GROUPS, "local_window_size": window}
    return session("GroupQueryAttention", inputs, 3, **sizes)


def chunked(length: int, window: int) -> Callable[[], float]:
    """Chunks of queries against the keys of two chunks."""
    chunks = length // window
    inputs: dict[str, Array | None] = {
        "q": numbers(chunks, window, HEADS * SIZE), "k": numbers(chunks, 2 * window, HEADS * SIZE),
        "v": numbers(chunks, 2 * window, HEADS * SIZE), "bias": None, "padding": None,
        "added": numbers(1, 1, window, 2 * window),
    }  # fmt: skip
    return session("MultiHeadAttention", inputs, 1, num_heads=HEADS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    window, rows = arguments.window, []
    table = Table("tokens", "keys", "spelling", "milliseconds", title=f"window of {window}")
    for length in arguments.lengths:
        for new, past in ((length, 0), (1, length)):
            spellings = {
                "no window": grouped(new, past, -1),
                "local_window_size": grouped(new, past, window),
                "mask added": grouped(new, past, -1, mask=window),
            }
            if not past:
                spellings["chunks"] = chunked(length, window)
            seconds: dict[str, list[float]] = {name: [] for name in spellings}
            for _ in range(arguments.rounds * (20 if past else 1)):
                for name, once in spellings.items():
                    seconds[name].append(once())
            for name, found in seconds.items():
                taken = 1e3 * statistics.median(found)
                rows.append(
                    {"tokens": new, "keys": new + past, "spelling": name, "milliseconds": taken}
                )
                table.add_row(str(new), str(new + past), name, f"{taken:.2f}")
    Console(width=None if os.isatty(1) else 120).print(table)
    if arguments.json:
        summary = {"window": window, "lengths": arguments.lengths}
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
