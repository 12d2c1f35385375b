#!/usr/bin/env python3
"""What Triton's kernels are made of and what they would cost: compiled for GPUs, run on none.

    python tools/bench/triton_static.py [--only WORDS] [--gpu A100 H100 B200] [--json FILE]

Each operation is compiled with the first of its tilings. Registers, spills, shared memory and
instructions are the compiler's. Bytes and operations are counted from the tiling. `moved` is what
crosses the memory bus when a tensor that fits half of the L2 cache is loaded from memory once;
`asked` is what the programs ask for, which L2 serves. The time is the longer of moved bytes at the
GPU's bandwidth and operations at its peak, launch after launch; the bound is the same for what any
kernel must move and compute. These times are predictions: nothing ran.

Bars: operations that can load each element once move at most 1.1 of the bytes they must. Prefill
asks for at most 1.15 of the bytes of the tiling that asks for the fewest, among those that compile
without spills and fit (`--tilings` compiles them, which takes minutes). Blocks of 32 and 64 keys
are tried. Those of 16 are left out: each block scales the sums anew. Products are compared with the
tilings that give each SM a program.

Sparse weights are compared with the bound of dense ones in float16 twice: by bytes, and by the time
it takes to issue the instructions that expand them, counted in the machine code of the loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton_cases import CASES, Case
from triton_products import PRODUCTS, issue_seconds

from lwc.backends.triton.ahead import Compiled, compile_ahead, performance_losses
from lwc.backends.triton.architectures import ARCHITECTURES, Architecture, architecture
from lwc.backends.triton.operation import Configuration, Launch, Least, Operation
from lwc.core.errors import LwcError


def judge(case: Case, gpu: Architecture, *, tilings: bool) -> dict[str, Any]:
    """Compile a case for a GPU and predict its time."""
    operation = case.make(gpu)
    configuration = operation.candidates[0]
    launches = operation.prepare(configuration)
    kernels = [compile_ahead(launch, gpu) for launch in launches]
    asked = sum(launch.work.requested for launch in launches)
    moved = sum(launch.work.from_memory(gpu.l2) for launch in launches)
    seconds = sum(_seconds(launch, gpu) for launch in launches)
    bound = _bound(operation.least, launches[0].work.operands, gpu)
    if case.tiled:
        find = case.fewest or _fewest
        fewest = find(operation, gpu, asked) if tilings else None
        traffic = None if fewest is None else asked / fewest
    else:
        traffic = moved / operation.least.nbytes
    return {
        "case": case.name,
        "gpu": gpu.name,
        "tiling": str(configuration),
        "launches": [_facts(*pair) for pair in zip(launches, kernels, strict=True)],
        "flops": sum(launch.work.flops for launch in launches),
        "bytes asked": asked,
        "bytes moved": moved,
        "bytes that must be moved": operation.least.nbytes,
        "operations that must be done": operation.least.flops,
        "traffic": traffic,
        "bar": case.bar,
        "predicted seconds": seconds,
        "bound seconds": bound,
        "ratio": seconds / bound,
        **_against_dense(case, gpu, launches, kernels, seconds),
    }


def _against_dense(
    case: Case, gpu: Architecture, launches: tuple[Launch, ...], kernels: list[Compiled],
    seconds: float,
) -> dict[str, float]:  # fmt: skip
    """Compare sparse weights with the bound of a product with dense ones in float16."""
    if case.dense is None:
        return {}
    split = launches[0].configuration["SPLIT"]
    issue = issue_seconds(launches[0], kernels[0], -(-case.steps // split))
    dense = _bound(case.dense, "float16", gpu)
    return {
        "dense bound seconds": dense,
        "issue seconds": issue,
        "speed against dense by bytes": dense / seconds,
        "speed against dense": dense / max(seconds, issue),
    }


def _facts(launch: Launch, kernel: Compiled) -> dict[str, Any]:
    slots = kernel.architecture.multiprocessors * kernel.resident
    programs = 1
    for extent in launch.grid:
        programs *= extent
    return {
        "kernel": kernel.name,
        "grid": launch.grid,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        "tensor memory": kernel.tensor_memory,
        "warps": kernel.warps,
        "blocks on an SM": kernel.resident,
        "occupancy": kernel.occupancy,
        "waves": programs / slots if slots else None,
        "tensor core": dict(kernel.tensor_core),
        "asynchronous": dict(kernel.asynchronous),
        "performance losses": performance_losses(kernel) if kernel.tensor_core else [],
    }


def _seconds(launch: Launch, gpu: Architecture) -> float:
    work = launch.work
    return max(work.from_memory(gpu.l2) / gpu.bandwidth, work.flops / gpu.peak[work.operands])


def _bound(least: Least, operands: str, gpu: Architecture) -> float:
    return max(least.nbytes / gpu.bandwidth, least.flops / gpu.peak[operands])


def _fewest(operation: Operation, gpu: Architecture, asked: int) -> int:
    """Return the fewest bytes that a tiling asks for which compiles without spills and fits."""
    widths = {
        name: size
        for name, size in operation.candidates[0].tiles.items()
        if name not in {"QUERIES", "KEYS"}
    }
    for rows in (512, 256, 128):
        for columns, warps in itertools.product((32, 64), (8, 16)):
            # Sums, scores and weights of a tile go through registers, and addresses need some.
            if rows * (widths["VALUE_SIZE"] + columns * 3 // 2) > gpu.registers * 0.8:
                continue
            configuration = Configuration(
                {"QUERIES": rows, "KEYS": columns, **widths}, warps=warps, stages=2
            )
            (launch,) = operation.prepare(configuration)
            if launch.work.requested >= asked:
                continue
            try:
                kernel = compile_ahead(launch, gpu)
            except LwcError:
                continue
            if not kernel.spills and kernel.resident:
                return launch.work.requested
    return asked


def _row(row: dict[str, Any]) -> list[str]:
    first = row["launches"][0]
    ratio = row["traffic"]
    return [
        row["case"],
        row["gpu"],
        " ".join(part for part in row["tiling"].split() if "size=" not in part),
        "+".join(str(launch["registers"]) for launch in row["launches"]),
        str(sum(launch["spills"] for launch in row["launches"])),
        f"{first['shared'] / 1024:.0f}",
        f"{first['occupancy']:.0%}",
        _instructions(first["tensor core"]),
        _instructions(first["asynchronous"]),
        f"{row['bytes moved'] / 1e6:.2f}",
        f"{row['bytes asked'] / 1e6:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{row['predicted seconds'] * 1e6:.1f}",
        f"{row['bound seconds'] * 1e6:.1f}",
        f"{row['ratio']:.2f}",
    ]


def _sparse_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out sparse products beside the bound of dense ones."""
    table = Table(
        title="Sparse weights against the bound of dense float16 (predictions): by bytes moved, "
        "and where issuing the loop's instructions takes longer"
    )
    columns = {
        "us by bytes": ("predicted seconds", 1e6),
        "us by instructions": ("issue seconds", 1e6),
        "dense us": ("dense bound seconds", 1e6),
        "speed by bytes": ("speed against dense by bytes", 1),
        "speed": ("speed against dense", 1),
    }
    table.add_column("case")
    table.add_column("GPU")
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{row[key] * scale:.2f}" for key, scale in columns.values()]
        table.add_row(row["case"], row["gpu"], *numbers)
    return table


def _instructions(found: dict[str, int]) -> str:
    """Shorten instructions to their family and count."""
    families: Counter[str] = Counter()
    for name, count in found.items():
        parts = name.split(".")
        families[".".join(parts[: 2 if parts[0] != "cp" else 3])] += count
    return " ".join(f"{name} x{count}" for name, count in families.items()) or "-"


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [row for row in rows if row["traffic"] is not None]
    over = [f"{row['case']} on {row['gpu']}" for row in judged if row["traffic"] > row["bar"]]
    spilling = [
        f"{row['case']} on {row['gpu']}"
        for row in rows
        if any(launch["spills"] for launch in row["launches"])
    ]
    slowed = [
        f"{row['case']} on {row['gpu']}"
        for row in rows
        if any(launch["performance losses"] for launch in row["launches"])
    ]
    return {
        "what this is": "compiled ahead of time and costed; nothing was run on a GPU",
        "rows": len(rows),
        "with traffic judged": len(judged),
        "over their bar": over,
        "with spills": spilling,
        "slowed by what the assembler says": slowed,
        "largest ratio of predicted time and bound": max(row["ratio"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="WORDS", default="", help="cases that have them")
    parser.add_argument(
        "--gpu", metavar="NAME", nargs="+", type=architecture, default=list(ARCHITECTURES)
    )
    parser.add_argument("--tilings", action="store_true", help="look for tilings with fewer loads")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 230)
    chosen = [case for case in (*CASES, *PRODUCTS) if arguments.only in case.name]
    work = [(case, gpu) for case in chosen for gpu in arguments.gpu]
    progress = Console(stderr=True)
    rows = [
        judge(case, gpu, tilings=arguments.tilings)
        for case, gpu in track(work, "compiling", console=progress)
    ]
    table = Table(title="Triton kernels, compiled and costed: predictions, nothing ran on a GPU")
    for heading in ("case", "GPU", "tiling"):
        table.add_column(heading, overflow="fold")
    for heading in ("registers", "spills", "shared KiB", "occupancy"):
        table.add_column(heading, justify="right")
    for heading in ("tensor cores", "asynchronous"):
        table.add_column(heading, overflow="fold")
    for heading in ("moved MB", "asked MB", "traffic", "time us", "bound us", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_row(row))
    console.print(table)
    if sparse := [row for row in rows if "dense bound seconds" in row]:
        console.print(_sparse_table(sparse))
    summary = _summary(rows)
    for name, value in summary.items():
        console.print(f"{name}: {value if value != [] else 'none'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
