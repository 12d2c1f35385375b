"""Memory: peak resident memory of a model run in a process of its own, and bytes on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lwc.backends.onnxruntime.custom_operators import library_file
from lwc.core.errors import InputError, LwcError
from lwc.core.walk import all_graphs
from lwc.evaluate import memory_child
from lwc.pipeline.passes import Feed

__all__ = ["PeakMemory", "RunMemory", "file_size", "peak_memory"]


@dataclass(frozen=True)
class RunMemory:
    """Resident memory around one run.

    Attributes:
        resident: Bytes resident after the run.
        peak: Most bytes resident during the run.
    """

    resident: int
    peak: int


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of a process that runs one model, in bytes.

    Attributes:
        baseline: After the imports, before the model.
        session: After the session was made.
        session_peak: Most while it was made.
        runs: Around the run of each feed, in order.
    """

    baseline: int
    session: int
    session_peak: int
    runs: tuple[RunMemory, ...]

    @property
    def peak(self) -> int:
        """Most bytes resident at any time, the interpreter and ONNX Runtime included."""
        return max([self.session_peak, *(run.peak for run in self.runs)])


def peak_memory(
    path: str | Path,
    feeds: Iterable[Feed] = (),
    *,
    threads: int | None = None,
    arena: bool = True,
    memory_pattern: bool = True,
    optimize: str = "all",
    timeout: float = 600,
) -> PeakMemory:
    """Measure resident memory of ONNX Runtime running the model file as it lies there.

    A child process imports numpy and ONNX Runtime, opens the file, and runs the feeds one after
    the other. The kernel's high-water mark is set back before each step.

    Args:
        path: An `.onnx` file.
        feeds: The runs to make.
        threads: Threads of one operator; one per core by default.
        arena: Keep freed activation memory for the next run, ONNX Runtime's default.
        memory_pattern: Plan activation memory per input shape, ONNX Runtime's default.
        optimize: `all`, `basic` or `none`: ONNX Runtime's own graph optimisations.
        timeout: Seconds after which the child is ended.

    Raises:
        LwcError: The child failed (its last line says why), took too long, or the system has no
            `/proc`.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file", file=path)
    with tempfile.TemporaryDirectory(prefix="lwc-memory-") as folder:
        request = {
            "path": str(path),
            "feeds": [_stored(feed, Path(folder, str(index))) for index, feed in enumerate(feeds)],
            "threads": threads or 0,
            "arena": arena,
            "memory_pattern": memory_pattern,
            "optimize": optimize,
            "library": library_file(),
        }
        try:
            child = subprocess.run(
                [sys.executable, memory_child.__file__, json.dumps(request)],
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LwcError(f"the run took more than {timeout:g} s", file=path) from error
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise LwcError(f"the measuring process failed: {lines[-1]}", file=path)
    answer = json.loads(child.stdout)
    runs = tuple(RunMemory(**run) for run in answer.pop("runs"))
    return PeakMemory(**answer, runs=runs)


def _stored(feed: Feed, folder: Path) -> dict[str, str]:
    """Write the arrays of a feed to files and return their paths by input."""
    folder.mkdir()
    files = {}
    for index, (name, array) in enumerate(feed.items()):
        files[name] = str(folder / f"{index}.npy")
        plain = np.asarray(array)
        np.save(files[name], plain.astype(str) if plain.dtype == object else plain)
    return files


def file_size(path: str | Path) -> int:
    """Return the bytes of a model on disk, its external data files included.

    Args:
        path: A model file, or a folder that holds one with its companions: every file counts.

    Raises:
        InputError: The file or one of its data files does not exist.
    """
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise InputError("no such file", file=path)
    files = {path}
    if path.suffix in (".onnx", ".onnxtxt"):
        files |= _data_files(path)
    missing = next((file for file in files if not file.exists()), None)
    if missing is not None:
        raise InputError(f"its external data '{missing.name}' is missing", file=path)
    return sum(file.stat().st_size for file in files)


def _data_files(path: Path) -> set[Path]:
    found: set[Path] = set()
    for graph in all_graphs(ir.load(path)):
        tensors = [value.const_value for value in graph.initializers.values()]
        for node in graph:
            tensors += [
                attribute.as_tensor()
                for attribute in node.attributes.values()
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
            ]
        found.update(
            Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)
        )
    return found
