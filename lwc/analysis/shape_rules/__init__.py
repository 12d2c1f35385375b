"""Shape rules by family of operators. Importing the package registers them all."""

from lwc.analysis.shape_rules import (
    attention,
    blocked,
    control_flow,
    elementwise,
    generators,
    layout,
    linear,
    quantized,
    reduction,
    sequences,
    spatial,
)

__all__ = [
    "attention",
    "blocked",
    "control_flow",
    "elementwise",
    "generators",
    "layout",
    "linear",
    "quantized",
    "reduction",
    "sequences",
    "spatial",
]
