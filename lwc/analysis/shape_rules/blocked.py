"""ONNX Runtime's operators on images whose channels are stored in blocks.

Its optimizer makes them on x86. Shapes are those of the plain layout, channels padded to whole
blocks where the optimizer padded the weights.
"""

from __future__ import annotations

import onnx_ir as ir

from lwc.analysis.shape_rules import spatial
from lwc.analysis.shape_rules.registry import RULES, Fact, Outcome, Site, rule
from lwc.core.dims import multiply

__all__ = ["DOMAIN"]

DOMAIN = "com.microsoft.nchwc"

for _op in ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"):
    rule(f"{DOMAIN}::{_op}")(RULES[_op])

_FLOAT = ir.DataType.FLOAT
_ = spatial  # its rules must be registered first


@rule(f"{DOMAIN}::ReorderInput")
def _reorder_input(site: Site) -> Outcome:
    shape = site.shape(0)
    if shape is not None and site.attribute("channels_last", 0):
        shape = (shape[0], shape[-1], *shape[1:-1])
    return Fact(_FLOAT, shape)


@rule(f"{DOMAIN}::ReorderOutput")
def _reorder_output(site: Site) -> Outcome:
    shape = site.shape(0)
    if shape is None:
        return Fact(_FLOAT)
    channels = int(site.attribute("channels", 0)) or shape[1]
    if site.attribute("channels_last", 0):
        return Fact(_FLOAT, (shape[0], *shape[2:], channels))
    return Fact(_FLOAT, (shape[0], channels, *shape[2:]))


@rule(f"{DOMAIN}::Upsample")
def _upsample(site: Site) -> Outcome:
    shape, scales = site.shape(0), site.attribute("scales")
    if shape is None or not scales:
        return Fact(_FLOAT, shape)
    return Fact(_FLOAT, tuple(multiply(dim, n) for dim, n in zip(shape, scales, strict=True)))
