#!/usr/bin/env python3
"""Compare quantizers on SmolLM2-135M: lwc, ONNX Runtime, onnxsim, neural-compressor, llama.cpp.

Every quantizer gets the same graph, the same calibration data (the first lines of a news text, in
windows of 512 tokens) and is judged on the other lines. Each works in a process of its own.

- perplexity, and the excess of its logarithm over float32's with the standard error of the paired
  differences, token by token;
- bytes of the files; bits per weight of the model, and of its layers: without embedding and head,
  which all have in the same 8 bits (llama.cpp and GenAI have their own);
- seconds and peak memory of quantizing.

`--only speed` lets what they made generate, in turns (see `decode.py`); `--only prompt` has models
without a cache compute all logits of a prompt, also those whose activations have one scale for all
tokens, so that they can have no cache; `--only embeddings` compares 8-bit forms of MiniLM by what
happens to its embeddings. Models and losses are kept in the
cache folder: a run that was stopped goes on where it was.

    python tools/bench/quantize.py [--only quality ...] [--settings 4-g128 w8a8 ...]
        [--makers lwc ...] [--tokens 16384] [--samples 32] [--limit 3600] [--json FILE]
    python tools/bench/quantize.py --list
    python tools/bench/quantize.py --install-peers
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode_peers import Absent, install_peers
from bench.quantize_embeddings import embedding_rows, show_embeddings
from bench.quantize_results import Results, Unmade, stored_bytes
from bench.quantize_settings import REFERENCE, SETTINGS, Setting, choose
from bench.quantize_speed import speed_rows
from bench.quantize_subjects import open_subject

from lwc.evaluate.perplexity import Perplexity

SECTIONS = ("quality", "speed", "prompt", "embeddings")


def quality_row(results: Results, setting: Setting, reference: Perplexity | None) -> dict[str, Any]:
    """Return the row of a setting, with `error` where something failed."""
    row: dict[str, Any] = {"section": "quality", "setting": setting.name, "base": setting.base}
    try:
        made = results.make(setting)
        losses = results.judge(setting, made["model"])
    except (Unmade, Absent) as error:
        return {**row, "error": str(error)}
    found = _perplexity(losses)
    size = stored_bytes(made["model"])
    weights, in_layers = results.subject.parameters()
    row |= {
        "perplexity": found.value,
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        "layer_bits": None,
        "seconds": made["seconds"],
        "peak_bytes": made["peak"],
    }
    if setting.quantizer not in ("gguf", "genai") and setting.base != "float32":
        rest = stored_bytes(results.subject.base(setting.base)) - 4 * in_layers
        row["layer_bits"] = 8 * (size - rest) / in_layers
    ratio = found.over(reference or found)
    # The standard error of a logarithm is that of the ratio, relative to it.
    row["excess"] = math.log(ratio.ratio)
    row["excess_error"] = ratio.standard_error / ratio.ratio
    return row


def _perplexity(losses: np.ndarray[Any, Any]) -> Perplexity:
    return Perplexity(math.exp(min(losses.mean(), 700)), len(losses), losses, 512, 512)


def quality_rows(results: Results, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return a row for each setting; the first is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    reference: Perplexity | None = None
    for setting in settings:
        print(setting.name, file=sys.stderr, flush=True)
        row = quality_row(results, setting, reference)
        rows.append(row)
        if setting.name == REFERENCE:
            if "error" in row:
                raise SystemExit(f"the model in float32 fails: {row['error']}")
            reference = _perplexity(results.judge(setting, results.make(setting)["model"]))
    return rows


def _figure(value: float | None, spec: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, spec)


def show_quality(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """Print the table, and what failed under it."""
    table = Table(title=title)
    table.add_column("quantizer")
    for column in ("perplexity", "excess", "± s.e.", "MB", "bits", "of layers", "s", "peak MB"):
        table.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            continue
        table.add_row(
            row["setting"],
            f"{row['perplexity']:.3f}",
            f"{row['excess']:+.4f}",
            f"{row['excess_error']:.4f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bits_per_weight']:.2f}",
            _figure(row["layer_bits"], ".2f"),
            _figure(row["seconds"], ".0f"),
            _figure(row["peak_bytes"], ".0f", 1e-6),
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['setting']}: {row['error']}", markup=False)


def compare(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the sections that are asked for and return the document."""
    subject = open_subject(arguments.layers, arguments.samples, arguments.tokens)
    results = Results(subject, arguments.threads, arguments.limit)
    settings = choose(arguments.settings, arguments.makers)
    for base in arguments.base:
        if base not in {setting.name for setting in settings}:
            raise SystemExit(f"--base {base} is not among the rows")
    rows: list[dict[str, Any]] = []
    if "quality" in arguments.only:
        rows += quality_rows(results, settings)
        title = f"{subject.source.gguf.stem}, {arguments.tokens} tokens, logarithms in nats"
        show_quality(rows, title, console)
    for section, tokens in (("speed", arguments.generate), ("prompt", 1)):
        if section in arguments.only:
            rows += speed_rows(
                results,
                settings,
                prompt=arguments.prompt,
                tokens=tokens,
                rounds=arguments.rounds,
                bases=arguments.base,
                console=console,
            )
    if "embeddings" in arguments.only:
        found = embedding_rows(arguments.sentences, arguments.threads)
        show_embeddings(found, console)
        rows += found
    summary = {
        "model": subject.source.gguf.name,
        "tokens": arguments.tokens,
        "samples": arguments.samples,
        "threads": arguments.threads,
        "versions": results.versions,
        "failed": {row["setting"]: row["error"] for row in rows if "error" in row},
    }
    return {"summary": summary, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words: dict[str, Any] = {"nargs": "+", "metavar": "WORD"}
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=["quality"])
    parser.add_argument("--settings", **words, help="forms such as 4-g128 or w8a8, or whole names")
    parser.add_argument("--makers", **words, help="lwc, ort, onnxsim, inc, llama.cpp, genai")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and end")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to predict")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, help="use only the first layers, for a quick run")
    parser.add_argument("--prompt", type=int, default=512, help="speed: tokens of the prompt")
    parser.add_argument("--generate", type=int, default=32, help="speed: tokens after it")
    parser.add_argument("--rounds", type=int, default=5, help="speed: rounds after an untimed one")
    parser.add_argument(
        "--base", nargs="+", metavar="NAME", choices=SETTINGS, default=[REFERENCE],
        help="speed, prompt: rows that the others are compared with, a table each (float32)",
    )  # fmt: skip
    parser.add_argument("--sentences", type=int, default=100, help="embeddings: texts to embed")
    parser.add_argument("--install-peers", action="store_true", help="install them, and end")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    if arguments.install_peers:
        install_peers()
        return
    if arguments.list:
        print("\n".join(SETTINGS))
        return
    if min(arguments.tokens, arguments.samples, arguments.threads, arguments.rounds) < 1:
        parser.error("tokens, samples, threads and rounds are at least 1")
    if arguments.generate < 2 or arguments.sentences < 3:
        parser.error("--generate is at least 2, --sentences at least 3")
    document = compare(arguments, Console(width=None if sys.stdout.isatty() else 120))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
