"""The `triton` backend: runs a module with kernels in Triton, behind the interface of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lwc.backends.fx.session import FxExecutable
from lwc.backends.triton.availability import runnable_device
from lwc.backends.triton.lower import lowered_to_kernels
from lwc.backends.triton.run import running_on

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["TritonBackend", "TritonExecutable"]


class TritonBackend:
    """Runs modules in PyTorch and Triton: on a GPU, or on the CPU in Triton's interpreter."""

    def compile(
        self, module: Module, *, threads: int | None = None, expose: Sequence[str] = ()
    ) -> TritonExecutable:
        """Lower `module`; its remarks tell which nodes run in kernels.

        Args:
            module: The module; it is not changed but for its remarks.
            threads: Threads of one operator of PyTorch's on the CPU; its choice by default.
            expose: Values of the main graph to return besides the outputs.

        Raises:
            LwcError: An operator has no lowering, or no kernel runs on this machine.
        """
        device = runnable_device()
        return TritonExecutable(module, lowered_to_kernels(module, expose=expose), threads, device)


class TritonExecutable(FxExecutable):
    """A module lowered to kernels; made by `TritonBackend.compile`."""

    def _timed(self, call: Callable[[], Any]) -> Sequence[Any]:
        with running_on(self._device or "cpu"):
            return super()._timed(call)
