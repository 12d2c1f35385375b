"""Running a module for a comparison: fitting feeds, plain arrays out, an end to every loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from lwc.backends.onnxruntime.session import OnnxRuntimeBackend, OnnxRuntimeExecutable
from lwc.calibration.inputs import RoleKind, fed_inputs, input_role
from lwc.core.dims import evaluate, parse_dim
from lwc.core.errors import LwcError
from lwc.core.module import Module

__all__ = [
    "LEAST_SECONDS",
    "LOOP_SECONDS",
    "Running",
    "compiled",
    "fits",
    "fitted",
    "flat",
    "limit_after",
]

Array = np.ndarray[Any, Any]

LOOP_SECONDS = 60.0
"""Time for one run of a module with loops: one may never end."""

LEAST_SECONDS, _TIMES_LONGER = 1.0, 20.0
"""Time that a module gets after a pass, at least and relative to that before: a pass may have lost
what ends a loop, and what it collects fills the memory."""


class Running:
    """A compiled module; made by `compiled`.

    Args:
        executable: What runs it.
        limit: Seconds after which a run is stopped, or None.

    Attributes:
        limit: See above.
        longest: Seconds that the longest run took.
    """

    def __init__(self, executable: OnnxRuntimeExecutable, limit: float | None) -> None:
        self._executable = executable
        self.limit = limit
        self.longest = 0.0

    def run(
        self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one batch and return the outputs by name, as `flat` names them.

        Raises:
            LwcError: The feed does not fit, a node fails, or it takes longer than `limit`.
        """
        start = time.perf_counter()
        try:
            found = self._executable.run(feed, outputs)
        except LwcError as error:
            if self.limit is None or time.perf_counter() - start < self.limit:
                raise
            raise LwcError(
                f"it runs for more than the {self.limit:.3g} s that it is given, since loops may "
                "never end",
                file=error.file,
            ) from error
        self.longest = max(self.longest, time.perf_counter() - start)
        return flat(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executable.close()


def compiled(module: Module, threads: int | None = 1, *, limit: float = LOOP_SECONDS) -> Running:
    """Compile a module as it is written.

    Args:
        module: The module.
        threads: Threads of one operator.
        limit: Seconds for one run where the module has loops.

    Raises:
        LwcError: ONNX Runtime refuses it.
    """
    seconds = limit if any(node.op_type == "Loop" for node in module.nodes()) else None
    executable = OnnxRuntimeBackend().compile(
        module, threads=threads, optimize="none", time_limit=seconds
    )
    return Running(executable, seconds)


def limit_after(seconds: float) -> float:
    """Return the seconds for a run of what a pass made of a module that ran for `seconds`."""
    return max(LEAST_SECONDS, _TIMES_LONGER * seconds)


def fitted(feed: Mapping[str, Array], module: Module) -> dict[str, Array]:
    """Give each input of `module` its array, in the element type it wants.

    An input that the feed lacks, because a pass added it, is neutral: a mask is ones, all else 0,
    and a dimension that no other input has is 0. An empty cache is that.
    """
    made: dict[str, Array] = {}
    extents: dict[str, int] = {}
    for value in fed_inputs(module):
        name = value.name or ""
        if name not in feed:
            continue
        made[name] = feed[name]
        if value.dtype is not None and value.dtype != ir.DataType.STRING:
            made[name] = feed[name].astype(value.dtype.numpy(), copy=False)
        for dim, extent in zip(value.shape or (), feed[name].shape, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                extents.setdefault(dim.value, extent)
    for value in fed_inputs(module):
        name = value.name or ""
        if name not in made and value.shape is not None and value.dtype is not None:
            shape = [_extent(dim, extents) for dim in value.shape]
            mask = input_role(module, value).kind == RoleKind.MASK
            made[name] = np.full(shape, int(mask), value.dtype.numpy())
    return made


def fits(feed: Mapping[str, Array], module: Module) -> bool:
    """Tell whether inputs that state one dimension have one extent there."""
    extents: dict[str, int] = {}
    return all(
        extents.setdefault(dim.value, extent) == extent
        for value in fed_inputs(module)
        if value.name in feed
        for dim, extent in zip(value.shape or (), feed[value.name or ""].shape, strict=False)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    )


def _extent(dim: int | ir.SymbolicDim, extents: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return 0
    parsed = parse_dim(dim.value)
    return evaluate(parsed, {str(each): extents.get(str(each), 0) for each in parsed.free_symbols})


def flat(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Take sequences apart: elements may differ in shape.

    An output `y` of that kind becomes `the length of y`, `y[0]`, `y[1]` and so on.
    """
    found: dict[str, Array] = {}
    for name, value in outputs.items():
        if isinstance(value, list):
            found[f"the length of {name}"] = np.array(len(value))
            found.update(flat({f"{name}[{index}]": each for index, each in enumerate(value)}))
        else:
            found[name] = np.asarray(value)
    return found
