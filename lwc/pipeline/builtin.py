"""The built-in passes as data, so that listing them imports none of them.

`tests/unit/test_registry.py` compares this table with the classes and prints the right entry.
"""

from __future__ import annotations

from lwc.pipeline.registry import PassInfo

__all__ = ["BUILTIN"]

BUILTIN: tuple[PassInfo, ...] = ()
