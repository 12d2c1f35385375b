"""What others make known to lwc by decorators: operators in PyTorch, kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["extends_lwc", "is_again", "note_extension", "noting_import"]

_REGISTERED: list[str] = []
"""The modules in which functions that were registered are defined."""

_EXTENDING: set[str] = set()
"""The modules during whose import some were."""


def note_extension(function: Callable[..., Any]) -> str:
    """Note a function that is registered; return the module in which it is defined."""
    name = str(getattr(function, "__module__", None) or "")
    _REGISTERED.append(name)
    return name


@contextlib.contextmanager
def noting_import(name: str) -> Iterator[None]:
    """Note whether functions are registered while a module is imported."""
    before = len(_REGISTERED)
    yield
    if any(not each.startswith("lwc.") for each in _REGISTERED[before:]):
        _EXTENDING.add(name)


def extends_lwc(module: str) -> bool:
    """Tell whether a module registers functions, or one inside of that package does."""
    return module in _EXTENDING or any(f"{name}.".startswith(f"{module}.") for name in _REGISTERED)


def is_again(known: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Tell whether a function is a known one once more: its file or its cell was run again.

    Two of one name in one file are two.
    """
    one, other = (
        (each.__module__, each.__qualname__, code.co_filename, code.co_firstlineno)
        if (code := getattr(each, "__code__", None)) is not None
        else None
        for each in (known, function)
    )
    if one is None or other is None or "<" in one[1]:
        return False
    return one == other or (one[:2] == other[:2] and one[2] != other[2])
