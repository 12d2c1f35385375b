"""lwc's native operators, where they were built: `lwc::DynamicQuantMatMul` in C++.

Without them ONNX Runtime computes the operators by their functions, which is slower.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lwc.core.diagnostics import Remark
from lwc.core.dialect import DOMAIN
from lwc.core.errors import LwcError, UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

    from lwc.core.module import Module

__all__ = ["instruction_set", "is_native", "library_file", "register"]


_ABSENT = Remark(
    "warning",
    "onnxruntime",
    "lwc's native operators were not built here, so that lwc::DynamicQuantMatMul runs as an ONNX "
    "function, which is slower: install a C++ compiler, then lwc again",
)


def is_native(module: Module) -> bool:
    """Tell whether a module has operators of the dialect and this machine has their kernels.

    Where only the kernels are missing, the module gets a remark.
    """
    if DOMAIN not in module.model.graph.opset_imports:
        return False
    if _library() is None and _ABSENT not in module.remarks:
        module.remarks.emit(_ABSENT)
    return _library() is not None


def register(options: ort.SessionOptions) -> None:
    """Make the native operators known to a session to come.

    Raises:
        LwcError: They were not built here.
        UsageError: LWC_ISA names an instruction set that is not there.
    """
    file = library_file()
    if file is None:
        raise LwcError(
            "lwc's native operators were not built here",
            remedy="install a C++ compiler, then lwc again",
        )
    instruction_set()
    options.register_custom_ops_library(file)


def library_file() -> str | None:
    """Return the file that sessions register, or None where the operators were not built."""
    library = _library()
    return None if library is None else str(library.__file__)


def instruction_set() -> str | None:
    """Return the instruction set of the native kernels, or None where they were not built.

    Raises:
        UsageError: LWC_ISA names one that is not there.
    """
    library = _library()
    try:
        return None if library is None else str(library.instruction_set())
    except ValueError as error:
        raise UsageError(str(error), remedy="name one of them, or unset LWC_ISA") from error


@cache
def _library() -> Any:
    try:
        return import_module("lwc.backends.onnxruntime._native")
    except ImportError:
        return None
