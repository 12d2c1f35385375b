#!/usr/bin/env python3
"""Damage SmolLM2-135M and let `recover` train it: how much of the lost perplexity comes back.

A fifth of the neurons of each MLP is set to zero, drawn by a seed: the same columns of the gate and
up projection and rows of the down projection. `lwc-opt` trains adapters on the first lines of a
news text in windows of 512 tokens, with the undamaged model as teacher; the other lines judge. What
comes back is the share of the lost logarithm of perplexity. Adapters stay beside the weights at
first, and `merge-lora` folds them in afterwards, so that both can be compared.

    python tools/bench/recover.py [--share 0.2] [--steps 50] [--rank 8] [--options 'batch=2']
        [--threads 2] [--tokens 16384] [--samples 64] [--layers N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.quantize_subjects import WINDOW, Subject, open_subject
from bench.scale import run_child

import lwc
from lwc.calibration.text import text_feeds
from lwc.core.module import Module
from lwc.core.weights import reading
from lwc.evaluate.execution import executable
from lwc.evaluate.perplexity import Perplexity, perplexity
from lwc.passes.quantization.weight_uses import WeightUses, find_weights

Array = np.ndarray[Any, Any]


def mlps(module: Module) -> Iterator[tuple[list[WeightUses], WeightUses]]:
    """Yield the gate and up projection of each layer, and its down projection."""
    waiting: list[WeightUses] = []
    for weight in find_weights(module):
        inputs, outputs = weight.extents
        if weight.tied or inputs == outputs:
            continue
        if waiting and waiting[0].extents == (outputs, inputs):
            yield waiting, weight
            waiting = []
        elif outputs > inputs:
            waiting.append(weight)


def damage(module: Module, share: float, seed: int) -> int:
    """Set neurons to zero in place; return how many."""
    drawn, gone = np.random.default_rng(seed), 0
    for wide, down in mlps(module):
        neurons = down.extents[0]
        dead = drawn.choice(neurons, round(share * neurons), replace=False)
        gone += len(dead)
        for weight, axis in (*((each, 1) for each in wide), (down, 0)):
            with reading(weight.tensor) as array:
                content = array.copy()
            place = [slice(None), slice(None)]
            turned = axis ^ int(weight.uses[0].transposed)
            content[(*place[:turned], dead)] = 0
            module.replace_initializer(weight.value, module.spilled(ir.Tensor(content)))
    return gone


def judge(module: Module, subject: Subject, threads: int) -> Perplexity:
    """Return the perplexity on the half of the text that is not trained on."""
    ids = subject.ids(calibration=False)
    return perplexity(
        module,
        lambda _: ids,
        "",
        window=WINDOW,
        stride=WINDOW,
        max_tokens=None,
        threads=threads,
    )


def difference(first: Module, second: Module, subject: Subject, threads: int) -> float:
    """Return the largest difference of logits over the largest logit, on one window."""
    ids = subject.ids(calibration=False)[:WINDOW]
    (feed,) = text_feeds(first, lambda _: ids, "", window=WINDOW)
    found = []
    for module in (first, second):
        with executable(module, threads=threads) as compiled:
            found.append(compiled.run(feed)["logits"])
    return float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Damage, train and judge; return the document."""
    subject = open_subject(arguments.layers, arguments.samples, arguments.tokens)
    base = subject.base("float32")
    model = lwc.load(base)
    before = judge(model, subject, arguments.threads)
    neurons = damage(model, arguments.share, arguments.seed)
    damaged = judge(model, subject, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="lwc-recover-") as folder:
        source, target = Path(folder, "damaged.onnx"), Path(folder, "recovered.onnx")
        lwc.optimize(model).save(source)
        del model
        words = (
            f"steps={arguments.steps} rank={arguments.rank} teacher='{base}' merge=false "
            f"{arguments.options}"
        )
        command = [str(source), "-o", str(target), "-p", f"recover{{{words.strip()}}}"]
        command += ["--calibrate", str(subject.feeds()), "--threads", str(arguments.threads)]
        command += ["--seed", str(arguments.seed)]
        report = Path(folder, "report.json")
        seconds, peak = run_child([*command, "--report", str(report), "-q"])
        beside = lwc.load(target)
        merged = lwc.optimize(beside, "merge-lora").module
        after = judge(merged, subject, arguments.threads)
        apart = difference(beside, merged, subject, arguments.threads)
        passes = json.loads(report.read_text())["passes"]
    rows = [
        {
            "model": name,
            "perplexity": found.value,
            "lost": math.log(found.value / before.value),
            "lost_error": found.over(before).standard_error / found.over(before).ratio,
        }
        for name, found in (("float32", before), ("damaged", damaged), ("recovered", after))
    ]
    lost, left = rows[1]["lost"], rows[2]["lost"]
    summary = {
        "model": subject.source.gguf.name,
        "neurons set to zero": neurons,
        "regained": (float(lost) - float(left)) / float(lost),
        "minutes": seconds / 60,
        "peak_gb": peak * 2**20 / 1e9,
        "merged_difference": apart,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "samples": arguments.samples,
        "statistics": passes[0]["statistics"],
    }
    return {"summary": summary, "rows": rows}


def show(document: dict[str, Any]) -> None:
    summary, statistics = document["summary"], document["summary"]["statistics"]
    table = Table(title=f"{summary['model']}, {summary['tokens']} tokens, logarithms in nats")
    table.add_column("model")
    for column in ("perplexity", "log lost", "± s.e."):
        table.add_column(column, justify="right")
    for row in document["rows"]:
        table.add_row(
            row["model"],
            f"{row['perplexity']:.3f}",
            f"{row['lost']:+.4f}",
            f"{row['lost_error']:.4f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{summary['regained']:.0%} regained in {summary['minutes']:.1f} min, at most "
        f"{summary['peak_gb']:.2f} GB; merged and unmerged differ by "
        f"{summary['merged_difference']:.1e} of the largest logit"
    )
    console.print(", ".join(f"{name} {value}" for name, value in statistics.items()), markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=float, default=0.2, help="of the neurons to set to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--options", default="", help="more options of recover")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to judge by")
    parser.add_argument("--samples", type=int, default=64, help="windows to train on")
    parser.add_argument("--layers", type=int, help="use only the first layers, for a quick run")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    document = compare(arguments)
    show(document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
