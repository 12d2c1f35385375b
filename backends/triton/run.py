"""Running operations: on a GPU with the fastest of their tilings, or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from lwc.backends.triton.architectures import Architecture, nearest
from lwc.backends.triton.availability import interpreting
from lwc.backends.triton.operation import Configuration, Operation
from lwc.core.errors import LwcError

__all__ = ["architecture_of", "computable", "run", "tuned"]

_fastest: dict[Hashable, Configuration] = {}


def run(operation: Operation) -> tuple[Any, ...]:
    """Run an operation on its tensors and return its results.

    On a GPU the candidates are timed the first time that an operation of that key comes. The
    interpreter takes the first one.
    """
    configuration = operation.candidates[0]
    if not interpreting() and len(operation.candidates) > 1:
        import torch

        key = (operation.name, operation.key, torch.cuda.get_device_name())
        if key not in _fastest:
            _fastest[key] = tuned(operation, _milliseconds)
        configuration = _fastest[key]
    for launch in operation.prepare(configuration):
        launch.run()
    return operation.results


def tuned(operation: Operation, measure: Callable[[Callable[[], None]], float]) -> Configuration:
    """Return the fastest candidate; those that need more than the device has are left out.

    Args:
        operation: What is run; its launches only write to its results.
        measure: Returns the time of a call.

    Raises:
        LwcError: No candidate runs on the device.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    times: list[tuple[float, int]] = []
    for index, configuration in enumerate(operation.candidates):
        launches = operation.prepare(configuration)

        def call(launches: tuple[Any, ...] = launches) -> None:
            for launch in launches:
                launch.run()

        try:
            times.append((measure(call), index))
        except (OutOfResources, PTXASError):
            continue
    if not times:
        raise LwcError(f"no tiling of {operation.name} fits this device")
    return operation.candidates[min(times)[1]]


def computable(tensor: Any) -> Any:
    """Return a tensor that kernels compute right with: the interpreter cuts bfloat16 off."""
    import torch

    if interpreting() and tensor.dtype == torch.bfloat16:
        return tensor.float()
    return tensor


def architecture_of(tensor: Any) -> Architecture:
    """Return the facts that tilings for a tensor's device are chosen by."""
    if tensor.device.type != "cuda":
        return nearest(0)
    import torch

    major, minor = torch.cuda.get_device_capability(tensor.device)
    return nearest(10 * major + minor)


def _milliseconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call))
