"""What a kernel declares: its tilings, its launches, and what they move and compute.

An operation is made from tensors. They may lie on the `meta` device: then it can be compiled ahead
of time and costed, and what is compiled is what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Access", "Configuration", "Launch", "Least", "Operation", "Work"]


@dataclass(frozen=True)
class Configuration:
    """A tiling of a kernel and how it is compiled: one candidate of the tuning.

    Attributes:
        tiles: Sizes of the tiling, by the names the kernel knows them by.
        warps: Warps of a block.
        stages: Buffers that loads of a loop run ahead into.
        registers: Most registers of a thread; the compiler's choice when 0.
    """

    tiles: Mapping[str, int] = field(hash=False)
    warps: int = 4
    stages: int = 2
    registers: int = 0

    def __getitem__(self, name: str) -> int:
        """Return a size of the tiling."""
        return self.tiles[name]

    def __str__(self) -> str:
        tiles = " ".join(f"{name.lower()}={size}" for name, size in self.tiles.items())
        return f"{tiles} warps={self.warps} stages={self.stages}"


@dataclass(frozen=True)
class Access:
    """What all programs of a launch load from, or store to, one tensor.

    Attributes:
        tensor: Its name.
        once: Bytes of the elements touched, each counted once.
        requested: Bytes that the programs ask for together. Masked elements are not counted.
        reach: Bytes loaded between two loads of one element: where they fit the L2 cache, the
            second comes from there. The tensor's own bytes when 0.
    """

    tensor: str
    once: int
    requested: int
    reach: int = 0

    def from_memory(self, l2: int) -> int:
        """Return the bytes that cross the memory bus with an L2 cache of `l2` bytes.

        Half of the cache is taken to hold what is loaded again; the rest is passing through.
        """
        return self.once if (self.reach or self.once) <= l2 // 2 else self.requested


@dataclass(frozen=True)
class Work:
    """What a launch moves and computes, counted from its tiling.

    Attributes:
        accesses: Loads and stores, by tensor.
        flops: Operations of its matrix products, whole tiles with their padding; of the
            elementwise work where there are none.
        operands: The element type of the operands of the products, which tells the peak.
    """

    accesses: tuple[Access, ...]
    flops: int
    operands: str

    @property
    def requested(self) -> int:
        """Bytes the programs ask for: what would be moved without an L2 cache."""
        return sum(access.requested for access in self.accesses)

    def from_memory(self, l2: int) -> int:
        """Return the bytes that cross the memory bus with an L2 cache of `l2` bytes."""
        return sum(access.from_memory(l2) for access in self.accesses)


@dataclass(frozen=True)
class Least:
    """What any kernel of an operation must do: the bound that launches are judged by.

    Attributes:
        nbytes: Bytes of inputs and outputs, each once.
        flops: Operations that cannot be left out.
    """

    nbytes: int
    flops: int


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: What `triton.jit` made of the function.
        grid: Programs along each axis.
        arguments: What the kernel is given besides its constants: tensors, numbers, or None.
        constants: The parameters it is compiled for, without the configuration's sizes.
        configuration: Tiling, warps and stages.
        work: What it moves and computes.
        tiles: Sizes of the configuration that this kernel has parameters for; all when None.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    configuration: Configuration
    work: Work
    tiles: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def compiled_for(self) -> dict[str, Any]:
        """All constants, the tiling among them."""
        chosen = self.configuration.tiles
        names = tuple(chosen) if self.tiles is None else self.tiles
        return {**self.constants, **{name: chosen[name] for name in names}}

    @property
    def options(self) -> dict[str, Any]:
        """How the compiler is told to compile."""
        found: dict[str, Any] = {
            "num_warps": self.configuration.warps,
            "num_stages": self.configuration.stages,
            "enable_fp_fusion": True,
        }
        if self.configuration.registers:
            found["maxnreg"] = self.configuration.registers
        return found

    def run(self) -> None:
        """Launch it on the tensors it was made with."""
        self.kernel[self.grid](**self.arguments, **self.compiled_for, **self.options)


@dataclass(frozen=True)
class Operation:
    """A computation on given tensors, by kernels whose tiling is still open.

    Attributes:
        name: What it computes.
        candidates: Tilings to choose from; the first is the best guess.
        prepare: Make the launches of a tiling, in order.
        results: Tensors the launches fill.
        least: The operation's lower bound.
        key: What the best tiling depends on, besides the device.
    """

    name: str
    candidates: tuple[Configuration, ...]
    prepare: Callable[[Configuration], tuple[Launch, ...]]
    results: tuple[Any, ...]
    least: Least
    key: Hashable
