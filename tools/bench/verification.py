#!/usr/bin/env python3
"""Time pipelines with and without verification, end to end, on real models.

`lwc-opt` runs as a process of its own with `--verify=none`, `structural` and `numeric`,
interleaved, and writes its result each time. The table shows medians and the ratios to `none`,
with their spread over the repeats.

    python tools/bench/verification.py [--models NAME ...] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from fetch_models import cache_folder, model_path

LEVELS = ("none", "structural", "numeric")
PIPELINE = "canonicalize,quantize-weights"
MODELS = ("minilm", "smollm2")
BAR = 2.0
"""Times without verification that numeric verification may take."""


def run(words: list[str]) -> float:
    """Run lwc-opt and return its wall time in seconds."""
    command = [sys.executable, "-m", "lwc.cli.opt", *words]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"lwc-opt {' '.join(words)}: {done.stderr.strip()}")
    return seconds


def as_onnx(name: str) -> Path:
    """Return a model as a folder with an ONNX file; what is none is read once and kept."""
    source = model_path(name)
    if source.suffix == ".onnx":
        return source
    folder = cache_folder() / "onnx" / name
    if not (folder / "model.onnx").exists():
        run([str(source), "-o", f"{folder}/"])
    return folder


def measure(name: str, repeats: int, target: Path) -> dict[str, Any]:
    """Time every level on one model, in turns."""
    model = str(as_onnx(name))
    times: dict[str, list[float]] = {level: [] for level in LEVELS}
    for _ in range(repeats):
        for level in LEVELS:
            words = [model, "-o", f"{target / name}/", "-p", PIPELINE, f"--verify={level}", "-q"]
            times[level].append(run(words))
    ratios = {
        level: [seconds / none for seconds, none in zip(times[level], times["none"], strict=True)]
        for level in LEVELS[1:]
    }
    return {
        "model": name,
        "pipeline": PIPELINE,
        "seconds": {level: statistics.median(found) for level, found in times.items()},
        "ratio": {level: statistics.median(found) for level, found in ratios.items()},
        "spread": {level: [min(found), max(found)] for level, found in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of fetch_models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = []
    with tempfile.TemporaryDirectory() as target:
        for name in arguments.models:
            rows.append(measure(name, arguments.repeats, Path(target)))
            print(name, file=sys.stderr)
    table = Table(title=f"seconds of lwc-opt -p '{PIPELINE}', end to end (median, ratio to none)")
    table.add_column("model")
    for level in LEVELS:
        table.add_column(level, justify="right")
    for row in rows:
        cells = [f"{row['seconds']['none']:.2f}"]
        for level in LEVELS[1:]:
            low, high = row["spread"][level]
            ratio = f"{row['ratio'][level]:.2f}x, {low:.2f}-{high:.2f}"
            cells.append(f"{row['seconds'][level]:.2f} ({ratio})")
        table.add_row(row["model"], *cells)
    console.print(table)
    worst = max(row["ratio"]["numeric"] for row in rows)
    console.print(f"numeric verification takes at most {worst:.2f}x (bar {BAR:.0f}x)")
    if arguments.json:
        summary = {
            "numeric": worst,
            "structural": max(row["ratio"]["structural"] for row in rows),
        }
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
