"""Products that the Triton kernels are compiled and costed for, and what they are judged by."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from triton_cases import Case, meta

from lwc.backends.triton.ahead import Compiled, compile_ahead
from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.kernels.quantize_rows import quantize_rows_operation
from lwc.backends.triton.kernels.tiled_bitmap_matmul import tiled_bitmap_operation
from lwc.backends.triton.kernels.tiled_csl_matmul import tiled_csl_launch
from lwc.backends.triton.kernels.w4a16_matmul import w4a16_operation
from lwc.backends.triton.kernels.w8a8_matmul import w8a8_operation
from lwc.backends.triton.operation import Configuration, Launch, Least, Operation
from lwc.core.errors import LwcError

TILING_BAR = 1.15

# Warp instructions of an SM in a cycle, and cycles of a second: the boost clocks that the peaks of
# tensor cores on the data sheets are stated at.
ISSUED = 4
CLOCKS = {"A100": 1.41e9, "H100": 1.83e9, "B200": 1.86e9}


def fewest(operation: Operation, gpu: Architecture, asked: int) -> int:
    """Return the fewest bytes asked for by a tiling that fits, and has a program for each SM."""
    found = sorted(
        (
            (sum(launch.work.requested for launch in launches), index, launches)
            for index, launches in enumerate(_tilings(operation, gpu))
        ),
        key=lambda entry: entry[:2],
    )
    for requested, _, launches in found:
        if requested >= asked:
            break
        try:
            kernel = compile_ahead(launches[0], gpu)
        except LwcError:
            continue
        if not kernel.spills and kernel.resident:
            return requested
    return asked


def _tilings(operation: Operation, gpu: Architecture) -> Iterator[tuple[Launch, ...]]:
    first = operation.candidates[0]
    rows, columns = operation.results[0].shape
    others = [
        dict(zip(inner, values, strict=True))
        for inner in [[name for name in first.tiles if name in ("DEPTH", "PIECE", "PIECES")]]
        for values in sorted({tuple(c[name] for name in inner) for c in operation.candidates})
    ]
    sizes = {candidate["COLUMNS"] for candidate in operation.candidates}
    widths = (128, 256) if 64 not in sizes else (64, 128, 256)
    for height, width, inner, split, warps in itertools.product(
        (16, 32, 64, 128, 256), widths, others, (1, 2, 4, 8, 16), (4, 8)
    ):
        programs = -(-rows // height) * -(-columns // width) * split
        if height * width > 128 * 32 * warps or height >= 2 * max(rows, 16):
            continue
        if programs < gpu.multiprocessors:
            continue
        tiles = {**first.tiles, **inner, "ROWS": height, "COLUMNS": width, "SPLIT": split}
        yield operation.prepare(Configuration(tiles, warps=warps, stages=2))


def issue_seconds(launch: Launch, kernel: Compiled, steps: int) -> float:
    """Return the time to issue the loop's instructions, four a cycle on each SM, without a stall.

    Args:
        launch: The kernel with its grid.
        kernel: What was compiled.
        steps: Steps of the loop that a program makes.
    """
    gpu = kernel.architecture
    programs = 1
    for extent in launch.grid:
        programs *= extent
    waves = -(-programs // gpu.multiprocessors)
    issued = loop_instructions(kernel) * launch.configuration.warps * steps
    return waves * issued / (ISSUED * CLOCKS[gpu.name])


def loop_instructions(kernel: Compiled) -> int:
    """Return the machine instructions of the longest loop."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = kernel.architecture.capability
    assembler = get_ptxas(capability)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.ptx)
        target = f"-arch={sm_arch_from_capability(capability)}"
        subprocess.run([assembler.path, target, str(ptx), "-o", str(cubin)], check=True)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, longest = 0, 0
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            count += 1
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels:
                longest = max(longest, count - labels[jump[1]])
    return longest


def dense_least(rows: int, depth: int, columns: int) -> Least:
    """Return what the same product with dense float16 weights must do."""
    return Least(2 * (rows * depth + depth * columns + rows * columns), 2 * rows * depth * columns)


def _w8a8(rows: int, depth: int, columns: int) -> Case:
    def make(gpu: Architecture) -> Operation:
        x, w = meta(rows, depth, dtype=torch.int8), meta(columns, depth, dtype=torch.int8)
        scales = meta(rows, dtype=torch.float32), meta(columns, dtype=torch.float32)
        return w8a8_operation(x, scales[0], w, scales[1], None, gpu, dtype=torch.float16)

    return Case(f"w8a8 {rows}x{depth}x{columns}", make, TILING_BAR, tiled=True, fewest=fewest)


def _w4a16(rows: int, depth: int, columns: int, group_size: int, *, zeros: bool = True) -> Case:
    def make(gpu: Architecture) -> Operation:
        pairs = depth // (2 * group_size)
        return w4a16_operation(
            meta(rows, depth, dtype=torch.float16),
            meta(columns, pairs, group_size, dtype=torch.uint8),
            meta(pairs, columns, dtype=torch.int32),
            meta(pairs, columns, dtype=torch.uint8) if zeros else None,
            None, gpu, columns=columns, group_size=group_size,
        )  # fmt: skip

    name = f"w4a16 groups of {group_size}{'' if zeros else ' symmetric'} {rows}x{depth}x{columns}"
    return Case(name, make, TILING_BAR, tiled=True, fewest=fewest)


def _sparse(rows: int, depth: int, columns: int, percent: int) -> Case:
    """Nonzeros at random: the fullest of some thousand tiles is four deviations above the mean."""

    def make(gpu: Architecture) -> Operation:
        tiles = -(-columns // 128), -(-depth // 64)
        share = 1 - (percent / 100) ** 2  # pairs that are not zero
        mean = 4096 * share
        fullest = int(mean + 4 * (mean * (1 - share)) ** 0.5) + 4
        return tiled_bitmap_operation(
            meta(rows, depth, dtype=torch.float16),
            meta(*tiles, 512, dtype=torch.uint8),
            meta(int(columns * depth // 2 * share) + 2 * tiles[0] * tiles[1], dtype=torch.int32),
            meta(tiles[0] * tiles[1] + 1, dtype=torch.int32),
            None, gpu, columns=columns, fullest=fullest,
        )  # fmt: skip

    return Case(
        f"sparse {percent}% {rows}x{depth}x{columns}", make, TILING_BAR, tiled=True, fewest=fewest,
        dense=dense_least(rows, depth, columns), steps=-(-depth // 64),
    )  # fmt: skip


def _tiled_csl(rows: int, depth: int, columns: int, percent: int) -> Case:
    """Flash-LLM's layout in Gluon, which was never run; without the sum of the parts."""

    def make(gpu: Architecture) -> Operation:
        tiles = -(-columns // 128) * -(-depth // 64)
        mean = 8192 * (1 - percent / 100)
        fullest = int(mean + 4 * (mean * percent / 100) ** 0.5) + 4
        x = meta(rows, depth, dtype=torch.float16)
        nonzeros = meta(int(tiles * (mean + 1.5)), dtype=torch.int32)
        offsets = meta(tiles + 2, dtype=torch.int32)
        parts = 8
        out = meta(parts, rows, columns, dtype=torch.float32)
        nbytes = x.numel() * 2 + 4 * (nonzeros.numel() + offsets.numel()) + 2 * rows * columns
        return Operation(
            name="product with tiled CSL",
            candidates=(Configuration({"ROWS": max(16, rows), "SPLIT": parts}, warps=4, stages=1),),
            prepare=lambda configuration: (
                tiled_csl_launch(
                    x, nonzeros, offsets, out, fullest=fullest, configuration=configuration
                ),
            ),
            results=(out,),
            least=Least(nbytes, 2 * rows * depth * columns),
            key=(),
        )

    return Case(
        f"tiled CSL, Gluon {percent}% {rows}x{depth}x{columns}", make, TILING_BAR, tiled=True,
        fewest=lambda _operation, _gpu, asked: asked, dense=dense_least(rows, depth, columns),
        steps=-(-depth // 64),
    )  # fmt: skip


def _quantize(rows: int, columns: int) -> Case:
    def make(gpu: Architecture) -> Operation:
        return quantize_rows_operation(meta(rows, columns))

    return Case(f"rows to int8 {rows}x{columns} bf16", make)


SPARSITIES = (50, 70, 80, 90)

PRODUCTS: list[Any] = [
    _quantize(8192, 4096),
    _quantize(16, 14336),
    *(_w8a8(rows, 4096, 4096) for rows in (1, 16, 64, 2048)),
    _w8a8(4096, 4096, 14336),
    *(_w4a16(rows, 4096, 4096, 128) for rows in (1, 16, 64, 2048)),
    _w4a16(1, 4096, 14336, 32),
    _w4a16(4096, 4096, 14336, 64, zeros=False),
    *(_sparse(rows, 4096, 14336, percent) for rows in (1, 16) for percent in SPARSITIES),
    _sparse(64, 4096, 14336, 80),
    _sparse(2048, 4096, 4096, 80),
    *(_tiled_csl(rows, 4096, 14336, percent) for rows in (1, 16) for percent in SPARSITIES),
]
