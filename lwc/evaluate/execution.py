"""What every evaluation accepts as a model: a path, a module, or something that runs already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from lwc.backends.base import Backend, Executable
from lwc.core.module import Module

__all__ = ["ModelLike", "executable", "module_of"]

ModelLike: TypeAlias = "Module | str | Path"


def module_of(model: ModelLike) -> Module:
    """Return `model`, read from its file where it is a path."""
    if isinstance(model, Module):
        return model
    from lwc.frontend.load import load

    return load(model)


@contextlib.contextmanager
def executable(
    model: ModelLike | Executable, *, threads: int | None = None, backend: Backend | None = None
) -> Iterator[Executable]:
    """Give `model` compiled; what was compiled here is freed again.

    Args:
        model: A path, a module or an executable, which is given back as it is.
        threads: Threads of one operator; the backend's choice by default.
        backend: What compiles; ONNX Runtime by default.
    """
    if not isinstance(model, Module | str | Path):
        yield model
        return
    if backend is None:
        from lwc.backends.onnxruntime.session import OnnxRuntimeBackend

        backend = OnnxRuntimeBackend()
    with backend.compile(module_of(model), threads=threads) as compiled:
        yield compiled
