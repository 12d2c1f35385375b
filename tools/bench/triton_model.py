#!/usr/bin/env python3
"""SmolLM2-135M lowered to kernels in Triton and emitted, run on the CPU beside ONNX Runtime.

    python tools/bench/triton_model.py [--layers N] [--tokens N] [--settings …] [--json FILE]

Each setting is emitted as `lwc-opt --emit` does, without compiled kernels; the Python module is
imported from its folder and runs a prompt in Triton's interpreter. The same module runs on ONNX
Runtime. `largest` is the largest difference of a logit over the largest logit, `norm` that of all
logits over their norm, `cosine` their cosine; `same` counts tokens whose best next token is the
same, of a prompt of random ids. `fx` is the `norm` of the fx backend beside ONNX Runtime, which no
kernel has a part in, `fx same` what it counts, and `alone` the largest of a product in a kernel
that is given the activations that fx has there.
Seconds are the interpreter's and say nothing of a GPU.

In float32 both compute the same function but for this: the W4A16 kernel has scales in float16, and
does not round activations, which ONNX Runtime is told not to either (accuracy-level=1). W8A8 rounds
activations to 8 bits in both, and sums exactly; where another order of sums before it moves a
number across a half, the rounding is a whole step off, which spreads from layer to layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bench.decode_models import open_source
from fetch_models import model_path
from rich.console import Console
from rich.table import Table

import lwc
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.backends.triton.emit import emit
from lwc.backends.triton.run import running_on
from lwc.calibration.feeds import make_feed

FUSED = "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,canonicalize"
SETTINGS = {
    "w4a16": f"{FUSED},quantize-weights{{bits=4 symmetric=true embeddings=4 accuracy-level=1}}",
    "w8a8": f"{FUSED},smooth-quantize{{none embeddings=none}},fuse-epilogue",
}


def optimized(module: lwc.Module, setting: str) -> lwc.Module:
    """Run the passes of a setting."""
    return lwc.optimize(module, SETTINGS[setting], grant="all", verify="none").module


def measure(module: lwc.Module, setting: str, tokens: int) -> dict[str, Any]:
    """Emit an optimized module and compare what it computes, and what the fx backend does."""
    alone, plain = _beside_fx(module, tokens)
    feed = make_feed(module, {"batch": 1, "sequence": tokens})
    with OnnxRuntimeBackend().compile(module, threads=1) as executable:
        wanted = executable.run(feed)["logits"].reshape(tokens, -1).astype(float)
    with tempfile.TemporaryDirectory() as folder:
        emitted = emit(module, folder, architectures=[])
        model = _loaded(Path(folder))
        inputs = [torch.from_numpy(feed[value.name or ""]) for value in module.graph.inputs]
        start = time.perf_counter()
        outputs = model(*inputs)
        seconds = time.perf_counter() - start
    found = _logits(outputs, tokens)
    places = Counter(
        (
            each.op,
            "kernel" if each.kernels else "torch",
            ", ".join(each.kernels) or each.reason or "",
        )
        for each in emitted.placements
    )
    return {
        "setting": setting,
        "largest": float(np.abs(found - wanted).max() / np.abs(wanted).max()),
        "norm": _distance(found, wanted),
        "fx": _distance(plain, wanted),
        "alone": alone,
        "cosine": float((found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted)),
        "same": int((found.argmax(-1) == wanted.argmax(-1)).sum()),
        "fx same": int((plain.argmax(-1) == wanted.argmax(-1)).sum()),
        "seconds": seconds,
        "in kernels": sum(n for (_, where, _), n in places.items() if where == "kernel"),
        "in torch": sum(n for (_, where, _), n in places.items() if where == "torch"),
        "nodes": [
            {"op": op, "runs in": where, "why": why, "nodes": count}
            for (op, where, why), count in sorted(places.items(), key=lambda each: each[0][1:])
        ],
    }


def _beside_fx(module: lwc.Module, tokens: int) -> tuple[float, Any]:
    """Compare products one by one, given the activations that the fx backend has.

    Returns:
        The largest difference of a product, and the logits of the fx backend.
    """
    feed = make_feed(module, {"batch": 1, "sequence": tokens})
    seen = _Products(lwc.to_fx(module))
    with torch.no_grad():
        outputs = seen.run(
            *(torch.from_numpy(feed[value.name or ""]) for value in module.graph.inputs)
        )
    largest = 0.0
    lowered = lwc.to_triton(module)
    with running_on("cpu"):
        for node in lowered.graph.nodes:
            if node.op == "call_module":
                x, wanted = seen.found[node.name]
                found = lowered.get_submodule(node.target)(x)
                largest = max(largest, _distance(found.numpy(), wanted.numpy()))
    return largest, _logits(outputs, tokens)


class _Products(torch.fx.Interpreter):  # type: ignore[misc]
    """Keeps what products are given and return."""

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: dict[str, tuple[Any, Any]] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        result = super().run_node(node)
        if node.meta.get("computes") in ("com.microsoft::MatMulNBits", "lwc::DynamicQuantMatMul"):
            self.found[node.name] = self.fetch_args_kwargs_from_env(node)[0][0], result
        return result


def _logits(outputs: Any, tokens: int) -> Any:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.numpy().reshape(tokens, -1).astype(float)


def _distance(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _loaded(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("emitted_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(device="cpu")


def _print(console: Console, rows: list[dict[str, Any]], tokens: int) -> None:
    table = Table(title="logits beside ONNX Runtime", title_justify="left")
    for heading in (
        "setting", "in kernels", "in torch", "largest", "norm", "fx", "alone", "cosine", "same",
        "fx same", "s",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        table.add_row(
            row["setting"],
            str(row["in kernels"]),
            str(row["in torch"]),
            f"{row['largest']:.1e}",
            f"{row['norm']:.1e}",
            f"{row['fx']:.1e}",
            f"{row['alone']:.1e}",
            f"{row['cosine']:.7f}",
            f"{row['same']}/{tokens}",
            f"{row['fx same']}/{tokens}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    for row in rows:
        table = Table(title=f"nodes of {row['setting']}", title_justify="left")
        for heading in ("operator", "nodes", "runs in", "kernels, or why not"):
            table.add_column(heading, justify="right" if heading == "nodes" else "left")
        for node in row["nodes"]:
            why = node["why"] or "no kernel computes it"
            table.add_row(node["op"], str(node["nodes"]), node["runs in"], why)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, help="only the first layers (all)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    module = lwc.load(open_source(model_path("smollm2"), layers=options.layers).gguf)
    rows = [
        measure(optimized(module, setting), setting, options.tokens) for setting in options.settings
    ]
    _print(Console(width=None if os.isatty(1) else 130), rows, options.tokens)
    if options.json:
        summary = {
            row["setting"]: {k: row[k] for k in ("largest", "norm", "fx", "alone", "cosine")}
            for row in rows
        }
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
