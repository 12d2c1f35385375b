"""Launches that are written down instead of made, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lwc.backends.triton.architectures import Architecture

if TYPE_CHECKING:
    from lwc.backends.triton.operation import Launch

__all__ = ["Recorder", "recorder", "recording"]


@dataclass
class Recorder:
    """What is recorded.

    Attributes:
        architecture: What tilings are chosen for.
        launches: What would have been launched so far, in order.
    """

    architecture: Architecture
    launches: list[Launch] = field(default_factory=list)


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def recorder() -> Recorder | None:
    """Return what records here, None where kernels run."""
    return _active.get()


@contextmanager
def recording(architecture: Architecture) -> Iterator[Recorder]:
    """Have operations written down, with the tilings for an architecture, and not run."""
    made = Recorder(architecture)
    token = _active.set(made)
    try:
        yield made
    finally:
        _active.reset(token)
