"""A machine with a runtime on it, as measured numbers; and the seconds a model takes there.

A `Target` is data: tables of how long kernels take on problems of several sizes. Backends measure
them; this module stores, loads and interpolates them. Between measured sizes the time per unit of
work is interpolated linearly in the logarithms of the sizes; beyond them the nearest measured
efficiency holds. A kernel without a table takes what the roofline says: bytes over bandwidth or
FLOPs over peak, whichever is longer (Williams, Waterman, Patterson, CACM 52(4), 2009).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import re
import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lwc.core.errors import InputError
from lwc.core.paths import cache_folder

__all__ = ["Table", "Target", "cpu_name"]

_FORMAT = 1


@dataclass(frozen=True)
class Table:
    """Measured efficiency of one kernel over a grid of problem sizes.

    Attributes:
        grid: Measured sizes along each axis, ascending.
        seconds: Seconds per unit of work at each grid point, the last axis fastest. The unit of
            work is one point of the product of the axes.
    """

    grid: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]

    def time(self, problem: Sequence[float]) -> float:
        """Return the seconds that a problem takes; 0 where an extent is 0.

        Raises:
            ValueError: The problem has another number of extents than the table has axes.
        """
        if len(problem) != len(self.grid):
            raise ValueError(f"{len(problem)} extents for a table of {len(self.grid)} axes")
        work = math.prod(problem)
        if work <= 0:
            return 0.0
        corners = [_bracket(axis, extent) for axis, extent in zip(self.grid, problem, strict=True)]
        logarithm = 0.0
        for choice in itertools.product(*corners):
            weight = math.prod(share for _, share in choice)
            if weight:
                logarithm += weight * math.log(self.seconds[self._position(choice)])
        return math.exp(logarithm) * work

    def _position(self, choice: Sequence[tuple[int, float]]) -> int:
        position = 0
        for axis, (index, _) in zip(self.grid, choice, strict=True):
            position = position * len(axis) + index
        return position


def _bracket(axis: Sequence[float], extent: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return the two neighbours of `extent` on `axis` with their shares, clamped at the ends."""
    if extent <= axis[0]:
        return (0, 1.0), (0, 0.0)
    if extent >= axis[-1]:
        last = len(axis) - 1
        return (last, 1.0), (last, 0.0)
    high = bisect_right(axis, extent)
    low = high - 1
    share = math.log(extent / axis[low]) / math.log(axis[high] / axis[low])
    return (low, 1.0 - share), (high, share)


@dataclass(frozen=True)
class Target:
    """A processor, a runtime and a thread count, measured.

    Attributes:
        cpu: Name of the processor.
        runtime: Name and version of the runtime, as `onnxruntime 1.31.1`.
        threads: Threads the runtime computes with.
        bandwidth: Bytes per second of a large copy, reads and writes added.
        peak_flops: FLOPs per second of the fastest measured matrix product.
        node_seconds: What running any node costs besides its kernel.
        run_seconds: What one run of a model costs besides its nodes.
        tables: Kernel tables by name.
        measured_in: Seconds the measurement took.
    """

    cpu: str
    runtime: str
    threads: int
    bandwidth: float
    peak_flops: float
    node_seconds: float
    run_seconds: float
    tables: Mapping[str, Table] = field(default_factory=dict)
    measured_in: float = 0.0

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the target as JSON, atomically; by default to its place in the cache folder."""
        file = Path(path) if path is not None else self.place(self.cpu, self.runtime, self.threads)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
        return file

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Target:
        """Read a target that `save` wrote.

        Raises:
            InputError: The file is no target, or of another version of lwc.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format", None) != _FORMAT:
                raise InputError(
                    "the target was measured by another version of lwc",
                    file=path,
                    remedy="delete the file: it is measured anew",
                )
            tables = {
                name: Table(tuple(map(tuple, table["grid"])), tuple(table["seconds"]))
                for name, table in data.pop("tables").items()
            }
            return Target(**data, tables=tables)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"cannot be read as a measured target: {error}",
                file=path,
                remedy="delete the file: it is measured anew",
            ) from error

    @staticmethod
    def place(cpu: str, runtime: str, threads: int) -> Path:
        """Return the file in the cache folder for a processor, runtime and thread count."""
        key = hashlib.sha256(f"{cpu}|{runtime}".encode()).hexdigest()[:8]
        stem = re.sub(r"[^a-z0-9.]+", "-", f"{runtime} {cpu}".lower()).strip("-")
        return cache_folder() / "targets" / f"{stem}-{key}-{threads}t.json"


def cpu_name() -> str:
    """Return the processor's name, with family and model where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    parts = [facts.get(name, "") for name in ("model name", "cpu family", "model")]
    return " ".join(part for part in parts if part) or platform.machine()
