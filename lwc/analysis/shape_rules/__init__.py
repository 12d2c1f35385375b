"""Shape rules by family of operators. Importing the package registers them all."""

from lwc.analysis.shape_rules import elementwise, layout, linear, reduction, spatial

__all__ = ["elementwise", "layout", "linear", "reduction", "spatial"]
