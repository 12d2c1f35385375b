"""What the pipeline is handed from layers it does not import: backends, checks, the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lwc.core.errors import UsageError
from lwc.pipeline.options import did_you_mean

if TYPE_CHECKING:
    from lwc.analysis.target import Target
    from lwc.backends.base import Backend
    from lwc.core.module import Module
    from lwc.pipeline.gradients import GradientRequest, GradientRunner
    from lwc.pipeline.manager import NumericCheck
    from lwc.pipeline.passes import Checkpoint, Contract, Runner
    from lwc.verify.numeric.comparer import Comparer

__all__ = [
    "BACKENDS",
    "checkpoint",
    "find_backend",
    "make_gradient_runners",
    "make_runners",
    "numeric_check",
    "target_finder",
]

BACKENDS = ("onnxruntime", "fx", "triton")


def find_backend(backend: str | Backend | None) -> Callable[[], Backend] | None:
    """Return what makes the backend; it is imported only when something is run.

    Raises:
        UsageError: No backend has that name.
    """
    if backend is None:
        return None
    if not isinstance(backend, str):
        return lambda: backend
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'", remedy=did_you_mean(backend, BACKENDS))

    def make() -> Backend:
        if backend == "fx":
            from lwc.backends.fx.convert import make_backend

            return make_backend()
        if backend == "triton":
            from lwc.backends.triton import convert

            return convert.make_backend()
        from lwc.backends.onnxruntime.session import OnnxRuntimeBackend

        return OnnxRuntimeBackend()

    return make


def make_runners(
    backend: Callable[[], Backend] | None, threads: int | None
) -> Callable[[Module, Sequence[str]], AbstractContextManager[Runner]] | None:
    """Return what compiles modules for passes that run them, or None without a backend."""
    if backend is None:
        return None

    def make(module: Module, expose: Sequence[str]) -> AbstractContextManager[Runner]:
        return backend().compile(module, threads=threads, expose=expose)

    return make


def make_gradient_runners(
    threads: int | None,
) -> Callable[[Module, GradientRequest], AbstractContextManager[GradientRunner]]:
    """Return what makes modules differentiable: in PyTorch, whatever backend runs them."""

    def make(module: Module, request: GradientRequest) -> AbstractContextManager[GradientRunner]:
        from lwc.backends.fx.convert import make_gradient_runner

        return make_gradient_runner(module, request, threads=threads)

    return make


def numeric_check(*, seed: int = 0, threads: int | None = None) -> NumericCheck:
    """Return the check that executes both modules on ONNX Runtime and compares their outputs.

    It remembers what the last module gave: in a pipeline each module is run once.
    """
    comparer: Comparer | None = None

    def check(before: Module, after: Module, contract: Contract) -> str:
        from lwc.verify.numeric.comparer import Comparer

        nonlocal comparer
        comparer = comparer or Comparer(seed=seed, threads=threads)
        found = comparer(before, after, contract)
        if found.skipped is not None:
            return f"outputs not compared: {found.skipped}"
        worst = found.worst
        error = 0.0 if worst is None else worst.max_error
        return f"outputs within {error:.2g} on {found.feeds} feed{'s' * (found.feeds != 1)}"

    return check


def target_finder(
    backend: str | Backend | None, threads: int | None
) -> Callable[[], Target | None]:
    """Return what finds the machine that was measured with ONNX Runtime, where it is to run."""

    def find() -> Target | None:
        if backend != "onnxruntime":
            return None
        from lwc.backends.onnxruntime.measure import load_target

        return load_target(threads or 1)

    return find


def checkpoint(
    folder: str | os.PathLike[str] | None, backend: str | Backend | None, threads: int | None
) -> Checkpoint | None:
    """Return the checkpoints in `folder`, valid for one backend and number of threads."""
    if folder is None:
        return None
    from lwc.calibration.checkpoint import CheckpointFolder, surroundings

    if backend == "onnxruntime":
        from lwc.backends.onnxruntime.measure import runtime_name

        name = runtime_name()
    elif backend in ("fx", "triton"):
        from importlib.metadata import version

        name = f"{backend}, torch {version('torch')}"
        name += f", triton {version('triton')}" if backend == "triton" else ""
    else:
        name = f"{type(backend).__module__}.{type(backend).__qualname__}"
    return CheckpointFolder(folder, surroundings(name, threads))
