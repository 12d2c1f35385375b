"""Who makes something known to lwc by a decorator: operators in PyTorch, kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["extends_lwc", "is_again", "note_extension"]

_MODULES: set[str] = set()


def note_extension() -> str:
    """Note, for a decorator that calls this, the module in which it is used; return its name."""
    name = str(sys._getframe(2).f_globals.get("__name__", ""))
    _MODULES.add(name)
    return name


def extends_lwc(module: str) -> bool:
    """Tell whether a module, or one inside of that package, used such a decorator."""
    return any(f"{name}.".startswith(f"{module}.") for name in _MODULES)


def is_again(known: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Tell whether a function is a known one once more: its file or its cell was run again."""
    places = {
        (getattr(each, "__module__", None), getattr(each, "__qualname__", "<unnamed>"))
        for each in (known, function)
    }
    return len(places) == 1 and "<" not in next(iter(places))[1]
