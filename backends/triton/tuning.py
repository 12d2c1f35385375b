"""The fastest tiling of an operation on a device: measured once, and kept in lwc's cache folder.

What is kept holds for a device, a version of Triton and the source of the kernels: each such triple
has a file of its own, so that nothing stale is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lwc.backends.triton.architectures import Architecture, nearest
from lwc.backends.triton.operation import Configuration, Launch, Operation
from lwc.core.errors import LwcError
from lwc.core.paths import cache_folder
from lwc.frontend.atomic import StagedFile

__all__ = ["Tunings", "fastest", "predicted_seconds", "promising", "tuned"]

Measure: TypeAlias = Callable[[Callable[[], None]], float]

_FORMAT = 1

TOO_SLOW = 2.0
"""Candidates that are predicted to take longer than this times the best are not measured."""


@dataclass
class Tunings:
    """The fastest tilings of a device, in memory and in a file.

    Attributes:
        path: The file; it is made with the first tiling.
        known: Tilings by what they are for (see `_key`).
    """

    path: Path
    known: dict[str, Configuration] = field(default_factory=dict)

    @staticmethod
    def of(device: str) -> Tunings:
        """Read what is kept of a device, for this version of Triton and of the kernels.

        A file that is damaged is ignored, with a warning; the next tiling replaces it.
        """
        path = _place(device)
        if not path.exists():
            return Tunings(path)
        try:
            return Tunings(path, _read(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(
                f"{path}: cannot be read as tilings and is written anew ({error})", stacklevel=2
            )
            return Tunings(path)

    def fastest(
        self, operation: Operation, architecture: Architecture, measure: Measure
    ) -> Configuration:
        """Return the fastest tiling of an operation, measured where none of its own is known.

        Raises:
            LwcError: No candidate runs on the device.
        """
        key = _key(operation)
        if self.known.get(key) not in operation.candidates:
            self.known[key] = tuned(operation, measure, promising(operation, architecture))
            self._write()
        return self.known[key]

    def _write(self) -> None:
        """Write all tilings, with those that other processes have written since."""
        try:
            others = _read(self.path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            others = {}
        self.known = others | self.known
        fastest = {key: asdict(tiling) for key, tiling in sorted(self.known.items())}
        text = json.dumps({"format": _FORMAT, "fastest": fastest}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with StagedFile(str(self.path.parent), self.path.name) as staged:
                staged.file.write(text.encode())
                staged.commit(str(self.path))
        except OSError as error:
            warnings.warn(f"{self.path}: tilings are not kept: {error.strerror}", stacklevel=2)


def fastest(operation: Operation) -> Configuration:
    """Return the fastest tiling of an operation on the current GPU.

    Raises:
        LwcError: No candidate runs on the device.
    """
    import torch
    from triton.testing import do_bench

    major, minor = torch.cuda.get_device_capability()
    tunings = _tunings(torch.cuda.get_device_name())
    return tunings.fastest(operation, nearest(10 * major + minor), do_bench)


_tunings = functools.cache(Tunings.of)


def promising(operation: Operation, architecture: Architecture) -> tuple[Configuration, ...]:
    """Return the candidates that are worth a measurement.

    These are the first one, which is the best guess, and all that are predicted to take at most
    twice the time of the best predicted one. What does not fit shared memory or registers is known
    when it is measured: it does not launch.
    """
    seconds = [
        sum(predicted_seconds(launch, architecture) for launch in operation.prepare(each))
        for each in operation.candidates
    ]
    bound = TOO_SLOW * min(seconds)
    return tuple(
        each
        for index, each in enumerate(operation.candidates)
        if index == 0 or seconds[index] <= bound
    )


def predicted_seconds(launch: Launch, architecture: Architecture) -> float:
    """Return what the roofline says of a launch (Williams, Waterman, Patterson 2009).

    Bytes over bandwidth or operations over the peak, whichever takes longer; fewer programs than
    multiprocessors have that share of both.
    """
    work = launch.work
    share = min(1.0, math.prod(launch.grid) / architecture.multiprocessors)
    moved = work.from_memory(architecture.l2) / architecture.bandwidth
    return max(moved, work.flops / architecture.peak[work.operands]) / share


def tuned(
    operation: Operation, measure: Measure, candidates: tuple[Configuration, ...] | None = None
) -> Configuration:
    """Return the fastest candidate; those that need more than the device has are left out.

    Args:
        operation: What is run; its launches only write to its results.
        measure: Returns the time of a call.
        candidates: Which of its candidates are measured; all when None.

    Raises:
        LwcError: No candidate runs on the device.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    candidates = operation.candidates if candidates is None else candidates
    times: list[tuple[float, int]] = []
    for index, configuration in enumerate(candidates):
        launches = operation.prepare(configuration)

        def call(launches: tuple[Launch, ...] = launches) -> None:
            for launch in launches:
                launch.run()

        try:
            times.append((measure(call), index))
        except (OutOfResources, PTXASError):
            continue
    if not times:
        raise LwcError(f"no tiling of {operation.name} fits this device")
    return candidates[min(times)[1]]


def _key(operation: Operation) -> str:
    return f"{operation.name} {operation.key}"


def _place(device: str) -> Path:
    import triton

    surroundings = f"{device}|{triton.__version__}|{_kernel_sources()}"
    digest = hashlib.sha256(surroundings.encode()).hexdigest()[:12]
    stem = re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")
    return cache_folder() / "tilings" / f"{stem}-triton-{triton.__version__}-{digest}.json"


@functools.cache
def _kernel_sources() -> str:
    """Return a digest of the source of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).with_name("kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: str | os.PathLike[str]) -> dict[str, Configuration]:
    """Read tilings.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else; so do TypeError, KeyError and AttributeError tell.
    """
    data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if data["format"] != _FORMAT:
        raise ValueError(f"format {data['format']}")
    return {key: _configuration(**stored) for key, stored in data["fastest"].items()}


def _configuration(
    *, tiles: Mapping[str, int], warps: int, stages: int, registers: int
) -> Configuration:
    numbers = [*tiles.values(), warps, stages, registers]
    if not all(type(number) is int for number in numbers):
        raise ValueError("a size of a tiling is no integer")
    return Configuration(dict(tiles), warps, stages, registers)
