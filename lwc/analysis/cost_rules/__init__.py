"""How much work each operator does: one module per family. Importing the package registers all."""

from lwc.analysis.cost_rules import (
    attention,
    contraction,
    elementwise,
    movement,
    quantized,
    reduction,
)

__all__ = ["attention", "contraction", "elementwise", "movement", "quantized", "reduction"]
