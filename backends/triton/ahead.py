"""Kernels compiled ahead of time: what the compiler made of them, on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.availability import require_triton
from lwc.backends.triton.operation import Launch
from lwc.core.errors import LwcError

__all__ = ["Compiled", "compile_ahead", "performance_losses", "specialised"]

_TENSOR_CORE = re.compile(
    r"^\s*(?:@\S+\s+)?((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*)", re.MULTILINE
)
_ASYNCHRONOUS = re.compile(
    r"^\s*(?:@\S+\s+)?(cp\.async\.(?:bulk\.tensor\.|bulk\.|ca\.|cg\.)[\w.:]*)", re.MULTILINE
)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for an architecture.

    Attributes:
        name: The kernel.
        architecture: What it was compiled for.
        registers: Registers of a thread.
        spills: Bytes of local memory of a thread: registers spilled, and arrays that found no
            registers.
        shared: Bytes of shared memory of a block.
        tensor_memory: Columns of tensor memory of a block.
        warps: Warps of a block, those that the compiler added among them.
        tensor_core: Instructions for tensor cores in the PTX, and how often each stands there.
        asynchronous: Instructions that copy to shared memory without waiting, likewise.
        ptx: The assembly.
        cubin: The machine code.
        entry: The name of the function in the cubin.
        signature: Types of the parameters by name, in order, as Triton names them; `constexpr`
            ones are compiled in.
        constants: What these are.
    """

    name: str
    architecture: Architecture
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    warps: int
    tensor_core: Counter[str]
    asynchronous: Counter[str]
    ptx: str
    cubin: bytes
    entry: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]

    @property
    def resident(self) -> int:
        """Blocks that run on one SM at the same time."""
        return self.architecture.resident_blocks(
            registers=self.registers,
            shared=self.shared,
            warps=self.warps,
            tensor_memory=self.tensor_memory,
        )

    @property
    def occupancy(self) -> float:
        """Resident warps over those an SM has room for."""
        return self.resident * self.warps / self.architecture.warps


def compile_ahead(launch: Launch, architecture: Architecture) -> Compiled:
    """Compile the kernel of a launch for an architecture, as the launch would have it compiled.

    Arguments are specialised as the launcher does: numbers equal to 1 become constants, those
    divisible by 16 are known to be, pointers are aligned to 16 bytes.

    Raises:
        LwcError: The compiler failed, or the kernels are for the interpreter in this process.
    """
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise LwcError(
            f"{launch.name} is for Triton's interpreter here and cannot be compiled",
            remedy="unset TRITON_INTERPRET",
        )
    signature, constants, attributes = specialised(launch)
    kind = ASTSource
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    source = kind(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture.capability, 32)
    try:
        with redirect_stdout(StringIO()):  # Triton prints the whole PTX that ptxas refuses
            compiled = triton.compile(source, target=target, options=launch.options)
    except (RuntimeError, triton.TritonError) as error:
        reasons = [line for line in str(error).splitlines() if "fatal" in line or "rror" in line]
        raise LwcError(
            f"{launch.name} does not compile for {architecture.target}: "
            f"{(reasons or [type(error).__name__])[0].strip()}"
        ) from error
    ptx = compiled.asm["ptx"]
    registers, spills = _usage(compiled.asm["cubin"])
    return Compiled(
        name=launch.name,
        architecture=architecture,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        warps=_threads(ptx) // 32,
        tensor_core=Counter(_TENSOR_CORE.findall(ptx)),
        asynchronous=Counter(_ASYNCHRONOUS.findall(ptx)),
        ptx=ptx,
        cubin=compiled.asm["cubin"],
        entry=compiled.metadata.name,
        signature=signature,
        constants=constants,
    )


def performance_losses(kernel: Compiled) -> list[str]:
    """Return what the assembler says makes a kernel slow, such as `wgmma` taken one at a time."""
    from triton import knobs

    newer = kernel.architecture.capability >= 90
    tool = knobs.nvidia.ptxas_blackwell if newer else knobs.nvidia.ptxas
    target = kernel.architecture.target + ("a" if newer else "")
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.ptx)
        command = [tool.path, "-v", f"--gpu-name={target}", str(source), "-o", str(result)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
    said = (ended.stdout + ended.stderr).splitlines()
    return [line.strip() for line in said if "Performance Loss" in line]


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return what a launch has its kernel compiled for.

    Returns:
        Types of parameters by name, `constexpr` among them; what those are; and attributes of the
        others by position, as Triton's compiler takes them.

    Raises:
        LwcError: The kernel has no parameter of a name that is given.
    """
    given = {**launch.arguments, **launch.compiled_for}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = given.pop(name)
        constant = name in launch.compiled_for
        kind, aligned = ("constexpr", False) if constant else _kind(value)
        if kind == "constexpr":
            signature[name] = "constexpr"
            constants[name] = value
            continue
        signature[name] = kind
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    if given:
        raise LwcError(f"{launch.name} has no parameter {', '.join(sorted(given))}")
    return signature, constants, attributes


def _kind(value: Any) -> tuple[str, bool]:
    """Return the type Triton gives an argument, and whether 16 divides it."""
    if value is None or isinstance(value, bool):
        return "constexpr", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    from triton.runtime.jit import mangle_type

    return str(mangle_type(value)), True


def _threads(ptx: str) -> int:
    found = re.search(r"\.reqntid (\d+)|\.maxntid (\d+)", ptx)
    if found is None:
        raise LwcError("the PTX does not state the threads of a block")
    return int(found.group(1) or found.group(2))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory of a thread, as the cubin states them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = _USAGE.search(text)
    if found is None:
        raise LwcError(f"cuobjdump states no usage: {text.strip()}")
    registers, stack, _, local = map(int, found.groups())
    return registers, stack + local
