"""The operators, one file per family. Importing this package registers them."""

from __future__ import annotations

from lwc.backends.fx.ops import (
    casting,
    control_flow,
    elementwise,
    indexing,
    integers,
    layout,
    linear,
    normalization,
    reduction,
)

__all__ = [
    "casting",
    "control_flow",
    "elementwise",
    "indexing",
    "integers",
    "layout",
    "linear",
    "normalization",
    "reduction",
]
