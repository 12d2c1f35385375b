"""Running operations: on a GPU with the fastest of their tilings, or in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from lwc.backends.triton.architectures import Architecture, nearest
from lwc.backends.triton.availability import interpreting
from lwc.backends.triton.operation import Configuration, Launch, Operation
from lwc.backends.triton.recording import recorder
from lwc.core.errors import LwcError

__all__ = ["architecture_of", "computable", "run", "running_on"]

_wide = ContextVar("wide", default=False)

_WIDEST = 8192
"""Columns of the widest tile of a product where a step costs more than its numbers."""


def run(operation: Operation) -> tuple[Any, ...]:
    """Run an operation on its tensors and return its results; nothing runs where these are empty.

    On a GPU it is tuned the first time that an operation of its key comes (see
    `lwc.backends.triton.tuning`). The interpreter takes the first candidate. Within `recording`
    nothing runs: the launches of the first candidate are written down.

    Raises:
        LwcError: A gradient is asked for, which kernels do not give.
    """
    if not any(result.numel() for result in operation.results):
        return operation.results
    noted = recorder()
    if noted is not None:
        noted.launches.extend(operation.prepare(operation.candidates[0]))
        return operation.results
    for launch in operation.prepare(_chosen(operation)):
        _check_no_gradient(launch)
        launch.run()
    return operation.results


def _check_no_gradient(launch: Launch) -> None:
    import torch

    if torch.is_grad_enabled() and any(
        isinstance(each, torch.Tensor) and each.requires_grad for each in launch.arguments.values()
    ):
        raise LwcError(
            f"{launch.name} gives no gradient, and is given what asks for one",
            remedy="run it under torch.no_grad(), or train through lwc.to_fx",
        )


def _chosen(operation: Operation) -> Configuration:
    first = operation.candidates[0]
    if interpreting():
        if _wide.get() and "SPLIT" in first.tiles:
            columns = min(1 << (operation.results[0].shape[-1] - 1).bit_length(), _WIDEST)
            wide = {"COLUMNS": max(columns, first["COLUMNS"]), "SPLIT": 1}
            return replace(first, tiles={**first.tiles, **wide})
        return first
    if len(operation.candidates) == 1:
        return first
    from lwc.backends.triton.tuning import fastest

    return fastest(operation)


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """Run a whole model: without gradients, new tensors on its device.

    In the interpreter products have tiles that no GPU has room for, as it takes as long for a small
    one.
    """
    import torch

    token = _wide.set(True)
    try:
        with torch.no_grad(), torch.device(device):
            yield
    finally:
        _wide.reset(token)


def computable(tensor: Any) -> Any:
    """Return a tensor that kernels compute right with: the interpreter cuts bfloat16 off."""
    import torch

    if interpreting() and tensor.dtype == torch.bfloat16:
        return tensor.float()
    return tensor


def architecture_of(tensor: Any) -> Architecture:
    """Return the facts that tilings for a tensor's device are chosen by."""
    noted = recorder()
    if noted is not None:
        return noted.architecture
    if tensor.device.type != "cuda":
        return nearest(0)
    import torch

    major, minor = torch.cuda.get_device_capability(tensor.device)
    return nearest(10 * major + minor)
