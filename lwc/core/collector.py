"""Python's collector of cyclic garbage, and when it should rest."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collections"]


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause the cycle collector.

    A graph is one big live structure: rescanning it again and again frees little and takes more
    than in proportion to its size, a quarter of the time of a rewrite and a seventh of that of
    tracing a decoder of thirty layers, which then takes a twentieth more memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
