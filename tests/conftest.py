"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fetch_models
import pytest
from support import once_a_run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin each process's share with slow tests, so that quick ones fill the end."""
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    if processes == 1:
        return
    slow: list[pytest.Item] = []
    quick: list[pytest.Item] = []
    for each in items:
        marked = each.get_closest_marker("slow") or each.get_closest_marker("models")
        (slow if marked else quick).append(each)
    items[:] = [
        each
        for n in range(processes)
        for part in (slow, quick)
        for each in part[len(part) * n // processes : len(part) * (n + 1) // processes]
    ]


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """What tests write need not outlive a loss of power: `os.fsync` only looks at its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_touch_their_tensors_alone() -> Iterator[None]:
    """Where Triton's kernels are interpreted, what they load and store is watched."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from interpreted_memory import watch

            watch(patch)
        yield


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Return a function from a model's name to its path, fetched on first use."""
    return fetch_models.model_path


@pytest.fixture(scope="session")
def smollm2(model_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as its GGUF file is read, in a folder: tracing it takes half a minute."""

    def make(folder: Path) -> None:
        from lwc.frontend.load import load
        from lwc.frontend.onnx_writer import save_folder

        save_folder(load(model_file("smollm2")), folder)

    return once_a_run("smollm2", make, tmp_path_factory)
