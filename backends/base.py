"""What a backend is: it compiles a module into something that runs, times itself and closes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np

    from lwc.core.module import Module
    from lwc.pipeline.passes import Feed

__all__ = ["Backend", "Executable", "NodeTime"]


@dataclass(frozen=True)
class NodeTime:
    """What one node cost in a profiled run.

    Attributes:
        node: The node's name as the backend ran it; fused nodes have the backend's own names.
        op: The operator type the backend ran, without its domain.
        seconds: Wall time per run, all calls together; the median over the profiled runs. A
            control-flow node's includes its body, whose nodes are listed too.
        calls: Calls per run; more than one inside a loop.
    """

    node: str
    op: str
    seconds: float
    calls: int


class Executable(AbstractContextManager["Executable"], Protocol):
    """A compiled module. Leaving its `with` block frees it."""

    def run(
        self, feed: Feed, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch and return the named values; all outputs and exposed ones by default."""

    def warm_up(self, feed: Feed, runs: int = 3) -> None:
        """Run `feed` a few times, so that caches, pools and lazily packed weights are ready."""

    def bind(self, feed: Feed) -> Callable[[], None]:
        """Return a call that runs `feed` with inputs and outputs in place: for timing."""

    def profile(self, feed: Feed, *, runs: int = 5) -> list[NodeTime]:
        """Return what each node costs, in the order of execution."""

    def close(self) -> None:
        """Free what the executable holds; it cannot run afterwards."""

    def __enter__(self) -> Self:
        """Return the executable."""


class Backend(Protocol):
    """Compiles modules."""

    def compile(
        self, module: Module, *, threads: int | None = None, expose: Sequence[str] = ()
    ) -> Executable:
        """Compile `module`.

        Args:
            module: The module; it is not changed.
            threads: Threads of one operator; the backend's choice by default.
            expose: Values of the main graph to return besides the outputs.

        Raises:
            LwcError: The backend cannot run the module; the message names the node.
        """
