"""Shape rules by family of operators. Importing the package registers them all."""

from lwc.analysis.shape_rules import (
    attention,
    blocked,
    content,
    control_flow,
    elementwise,
    generators,
    layout,
    linear,
    pieces,
    quantized,
    reduction,
    sequences,
    spatial,
)

__all__ = [
    "attention",
    "blocked",
    "content",
    "control_flow",
    "elementwise",
    "generators",
    "layout",
    "linear",
    "pieces",
    "quantized",
    "reduction",
    "sequences",
    "spatial",
]
