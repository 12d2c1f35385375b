"""Random tensors, and detection operators that cut by region."""

from __future__ import annotations

import onnx_ir as ir

from lwc.analysis.shape_rules.registry import Fact, Outcome, Site, rule

__all__: list[str] = []


@rule("RandomNormal RandomUniform")
def _random(site: Site) -> Outcome:
    dtype = ir.DataType(site.attribute("dtype", ir.DataType.FLOAT))
    return Fact(dtype, tuple(site.attribute("shape")))


@rule("RandomNormalLike RandomUniformLike Bernoulli EyeLike")
def _like(site: Site) -> Outcome:
    named = site.attribute("dtype")
    return Fact(site.dtype(0) if named is None else ir.DataType(named), site.shape(0))


@rule("Multinomial")
def _multinomial(site: Site) -> Outcome:
    source = site.shape(0)
    rows = site.fresh() if source is None else source[0]
    dtype = ir.DataType(site.attribute("dtype", ir.DataType.INT32))
    return Fact(dtype, (rows, site.attribute("sample_size", 1)))


@rule("NonMaxSuppression")
def _non_max_suppression(site: Site) -> Outcome:
    return Fact(ir.DataType.INT64, (site.fresh(), 3))


@rule("RoiAlign")
def _roi_align(site: Site) -> Outcome:
    data, rois = site.shape(0), site.shape(1)
    count = site.fresh() if rois is None else rois[0]
    channels = site.fresh() if data is None else data[1]
    size = (site.attribute("output_height", 1), site.attribute("output_width", 1))
    return Fact(site.dtype(0), (count, channels, *size))


@rule("GridSample")
def _grid_sample(site: Site) -> Outcome:
    data, grid = site.shape(0), site.shape(1)
    if data is None or grid is None:
        return Fact(site.dtype(0))
    return Fact(site.dtype(0), (*data[:2], *grid[1:-1]))
