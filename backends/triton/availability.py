"""Whether Triton is installed, and whether its kernels can run where the tensors are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lwc.core.errors import LwcError, MissingExtraError

__all__ = ["interpreting", "require_runnable", "require_triton", "runnable_device"]


def require_triton() -> None:
    """Check that torch and Triton are installed.

    Raises:
        MissingExtraError: One of them is missing.
    """
    if find_spec("torch") is None or find_spec("triton") is None:
        raise MissingExtraError("the Triton backend", "triton")


def interpreting() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU.

    Triton decides it when a kernel is defined, that is when its module is imported: by the
    variable TRITON_INTERPRET at that time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    from lwc.backends.triton.kernels import norm

    return isinstance(norm.norm_kernel, InterpretedFunction)


def require_runnable(*tensors: Any) -> None:
    """Check that kernels can run on tensors: all on one GPU, or all on the CPU interpreted.

    Where launches are only recorded, they may lie anywhere.

    Raises:
        MissingExtraError: Triton is not installed.
        LwcError: The tensors lie on different devices, or where no kernel runs.
    """
    require_triton()
    from lwc.backends.triton.recording import recorder

    if recorder() is not None:
        return
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise LwcError(f"tensors lie on {' and '.join(sorted(devices))}: one device is needed")
    (device,) = devices
    if device.startswith("cuda") and not interpreting():
        return
    if device == "cpu" and interpreting():
        return
    if interpreting():
        raise LwcError(
            f"Triton's interpreter is on and the tensors lie on {device}",
            remedy="unset TRITON_INTERPRET to run on the GPU, or move them to the CPU",
        )
    raise LwcError(
        f"Triton kernels need a GPU and the tensors lie on {device}",
        remedy="move them to cuda, or set TRITON_INTERPRET=1 before Python starts to run the "
        "kernels slowly on the CPU",
    )


def runnable_device() -> str:
    """Return where kernels run: `cuda`, or `cpu` in Triton's interpreter.

    Raises:
        MissingExtraError: Triton is not installed.
        LwcError: There is no GPU, and the interpreter is off.
    """
    require_triton()
    import torch

    device = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    require_runnable(torch.empty(0, device=device))
    return device
