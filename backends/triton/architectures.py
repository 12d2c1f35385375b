"""Facts of GPUs that kernels are compiled for and judged by.

Sources. Limits of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities", table
"Technical Specifications per Compute Capability". Granularities of registers and shared memory:
the occupancy calculator of Nsight Compute. Bandwidth and peaks (dense, without 2:4 sparsity):
NVIDIA's data sheets of the A100 80 GB SXM, the H100 SXM and the HGX B200, per GPU. The L2 cache:
the white papers of A100 and H100, and what the driver states for the B200.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lwc.core.errors import UsageError

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "nearest"]


@dataclass(frozen=True)
class Architecture:
    """One GPU.

    Attributes:
        name: The product.
        capability: The compute capability without its point: 90 is 9.0.
        multiprocessors: Streaming multiprocessors (SMs) switched on.
        shared_per_block: Bytes of shared memory one block may have.
        shared_per_multiprocessor: Bytes of shared memory of all blocks of an SM.
        l2: Bytes of the L2 cache.
        bandwidth: Bytes per second of the memory.
        peak: Floating-point (or integer) operations per second by the type of the operands:
            tensor cores, but `float32` is the CUDA cores'.
        registers: 32-bit registers of an SM.
        warps: Warps resident on an SM at most.
        blocks: Blocks resident on an SM at most.
        tensor_memory: Columns of tensor memory of an SM; 0 where there is none.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    l2: int
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_memory: int = 0

    @property
    def target(self) -> str:
        """The architecture as the assembler names it."""
        return f"sm_{self.capability}"

    def resident_blocks(
        self, *, registers: int, shared: int, warps: int, tensor_memory: int = 0
    ) -> int:
        """Return how many blocks of a kernel fit on one SM at the same time.

        Args:
            registers: Registers of one thread.
            shared: Bytes of shared memory of one block.
            warps: Warps of one block.
            tensor_memory: Columns of tensor memory of one block.
        """
        if shared > self.shared_per_block:
            return 0
        per_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 to a warp
        kept = -(-(shared + 1024) // 128) * 128  # the driver keeps 1 KiB of each block
        limits = [
            self.blocks,
            self.warps // warps,
            self.registers // max(per_warp, 1) // warps,
            self.shared_per_multiprocessor // kept,
        ]
        if tensor_memory:
            limits.append(self.tensor_memory // tensor_memory)
        return min(limits)


ARCHITECTURES = (
    Architecture(
        name="A100",
        capability=80,
        multiprocessors=108,
        shared_per_block=163 * 1024,
        shared_per_multiprocessor=164 * 1024,
        l2=40 * 2**20,
        bandwidth=2.039e12,
        peak={"float16": 312e12, "bfloat16": 312e12, "int8": 624e12, "float32": 19.5e12},
    ),
    Architecture(
        name="H100",
        capability=90,
        multiprocessors=132,
        shared_per_block=227 * 1024,
        shared_per_multiprocessor=228 * 1024,
        l2=50 * 2**20,
        bandwidth=3.35e12,
        peak={
            "float16": 989e12,
            "bfloat16": 989e12,
            "int8": 1979e12,
            "float8": 1979e12,
            "float32": 67e12,
        },
    ),
    Architecture(
        name="B200",
        capability=100,
        multiprocessors=148,
        shared_per_block=227 * 1024,
        shared_per_multiprocessor=228 * 1024,
        l2=126 * 2**20,
        bandwidth=8e12,
        peak={
            "float16": 2250e12,
            "bfloat16": 2250e12,
            "int8": 4500e12,
            "float8": 4500e12,
            "float32": 75e12,
        },
        tensor_memory=512,
    ),
)


def architecture(name: str) -> Architecture:
    """Return an architecture by its product or its target, such as `H100` or `sm_90`.

    Raises:
        UsageError: There is none of that name.
    """
    for found in ARCHITECTURES:
        if name.lower() in (found.name.lower(), found.target):
            return found
    known = ", ".join(f"{found.name} ({found.target})" for found in ARCHITECTURES)
    raise UsageError(f"no architecture is called '{name}'", remedy=f"known: {known}")


def nearest(capability: int) -> Architecture:
    """Return the newest architecture not newer than a compute capability, else the oldest."""
    older = [found for found in ARCHITECTURES if found.capability <= capability]
    return older[-1] if older else ARCHITECTURES[0]
