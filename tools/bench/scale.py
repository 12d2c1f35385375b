"""Measure lwc on a model far larger than its memory: time against the disk's own rate.

    tools/bench/scale.py                    # 6.7 billion parameters, 13.5 GB of float16
    tools/bench/scale.py --layers 2 --json scale.json

Makes a llama-shaped model, measures how fast the disk reads it and writes the result directly
(past the page cache), then runs `lwc-opt --plan` and `lwc-opt -p quantize-weights{bits=4}` on it
in child processes with cold caches. The acceptance figure is the disk's time over lwc's time.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_llama import Shape, add_shape_options, make_llama, shape_of
from rich.console import Console
from rich.table import Table

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        step: What was run.
        seconds: Wall time.
        peak_rss_mb: Peak resident memory of the child in MiB, None for disk measurements.
        read_gb: Bytes read from the disk, in GB.
        written_gb: Bytes written, in GB.
    """

    step: str
    seconds: float
    peak_rss_mb: float | None
    read_gb: float
    written_gb: float


def drop_caches(files: list[Path]) -> str:
    """Make the next read of `files` come from the disk; say how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise(DONTNEED) on the model's files"
    return "/proc/sys/vm/drop_caches"


def direct_read(path: Path) -> float:
    """Return the seconds a direct sequential read of the file takes."""
    buffer = mmap.mmap(-1, _CHUNK)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    begun = time.perf_counter()
    try:
        while os.readv(descriptor, [buffer]) > 0:
            pass
    finally:
        os.close(descriptor)
    return time.perf_counter() - begun


def direct_write(directory: Path, nbytes: int) -> float:
    """Return the seconds a direct sequential write of so many bytes takes, sync included."""
    buffer = mmap.mmap(-1, _CHUNK)
    buffer.write(os.urandom(_CHUNK))
    path = directory / "direct-write"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    begun = time.perf_counter()
    try:
        for _ in range(-(-nbytes // _CHUNK)):
            os.writev(descriptor, [buffer])
        os.fsync(descriptor)
        return time.perf_counter() - begun
    finally:
        os.close(descriptor)
        path.unlink()


def run_child(arguments: list[str]) -> tuple[float, float]:
    """Run `lwc-opt` and return its wall time in seconds and its peak resident memory in MiB."""
    command = [sys.executable, "-m", "lwc.cli.opt", *arguments]
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return seconds, usage.ru_maxrss / 1024


def measure(directory: Path, shape: Shape, pipeline: str) -> tuple[list[Row], dict[str, object]]:
    """Make the model in `directory`, run everything, and return rows and the summary."""
    model, result = directory / "model.onnx", directory / "out" / "model.onnx"
    parameters = make_llama(model, shape)
    data = model.with_name(model.name + ".data")
    size = data.stat().st_size
    rows = []
    seconds, memory = 0.0, 0.0

    how = drop_caches([data])
    seconds, memory = run_child([str(model), "--plan"])
    rows.append(Row("lwc-opt --plan", seconds, memory, 0.0, 0.0))

    result.parent.mkdir()
    drop_caches([data])
    seconds, memory = run_child([str(model), "-p", pipeline, "-o", str(result)])
    written = sum(path.stat().st_size for path in result.parent.iterdir())
    rows.append(Row(f"lwc-opt -p {pipeline}", seconds, memory, size / 1e9, written / 1e9))
    shutil.rmtree(result.parent)

    drop_caches([data])
    read = direct_read(data)
    rows.append(Row("direct read of the model", read, None, size / 1e9, 0.0))
    write = direct_write(directory, written)
    rows.append(Row("direct write of the result", write, None, 0.0, written / 1e9))
    summary: dict[str, object] = {
        "parameters": parameters,
        "caches dropped by": how,
        "plan_seconds": rows[0].seconds,
        "plan_peak_rss_mb": rows[0].peak_rss_mb,
        "quantize_seconds": seconds,
        "quantize_peak_rss_mb": memory,
        "disk_seconds": read + write,
        "fraction_of_disk_rate": (read + write) / seconds,
    }
    return rows, summary


def show(rows: list[Row], summary: dict[str, object]) -> None:
    table = Table(title=f"{summary['parameters']:,} parameters; caches dropped by "
                  f"{summary['caches dropped by']}")  # fmt: skip
    table.add_column("step")
    for column in ("seconds", "peak RSS MiB", "read GB", "written GB", "GB/s"):
        table.add_column(column, justify="right")
    for row in rows:
        moved = row.read_gb + row.written_gb
        table.add_row(
            row.step,
            f"{row.seconds:.2f}",
            "" if row.peak_rss_mb is None else f"{row.peak_rss_mb:.0f}",
            f"{row.read_gb:.2f}",
            f"{row.written_gb:.2f}",
            f"{moved / row.seconds:.2f}" if moved else "",
        )
    console = Console()
    console.print(table)
    console.print(f"{summary['fraction_of_disk_rate']:.0%} of the disk's direct read + write rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_shape_options(parser)
    parser.add_argument("--pipeline", default="quantize-weights{bits=4}")
    parser.add_argument(
        "--directory", type=Path, help="where to put the model, by default a cache folder"
    )
    parser.add_argument("--json", type=Path, help="write the summary and rows here")
    options = vars(parser.parse_args())
    pipeline, parent, target = (options.pop(name) for name in ("pipeline", "directory", "json"))
    parent = parent or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lwc"
    parent.mkdir(parents=True, exist_ok=True)
    shape = shape_of(parser, options)
    with tempfile.TemporaryDirectory(dir=parent, prefix="scale-") as directory:
        rows, summary = measure(Path(directory), shape, pipeline)
    show(rows, summary)
    if target is not None:
        document = {"summary": summary, "rows": [asdict(row) for row in rows]}
        target.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
