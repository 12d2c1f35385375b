"""lwc's native operators, where they were built: `lwc::DynamicQuantMatMul` in C++.

Without them ONNX Runtime computes the operators by their functions, which is slower.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lwc.core.dialect import DOMAIN

if TYPE_CHECKING:
    import onnxruntime as ort

    from lwc.core.module import Module

__all__ = ["instruction_set", "is_native", "register"]


def is_native(module: Module) -> bool:
    """Tell whether a module has operators of the dialect and this machine has their kernels."""
    return DOMAIN in module.model.opset_imports and _library() is not None


def register(options: ort.SessionOptions) -> None:
    """Make the native operators known to a session to come."""
    library = _library()
    assert library is not None
    options.register_custom_ops_library(library.__file__)


def instruction_set() -> str | None:
    """Return the instruction set of the native kernels, or None where they were not built."""
    library = _library()
    return None if library is None else str(library.instruction_set())


@cache
def _library() -> Any:
    try:
        return import_module("lwc.backends.onnxruntime._native")
    except ImportError:
        return None
