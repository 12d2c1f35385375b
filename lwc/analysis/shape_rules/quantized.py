"""Quantisation, quantised products and their fused forms."""

from __future__ import annotations

import onnx_ir as ir

from lwc.analysis.shape_rules.linear import matmul_shape
from lwc.analysis.shape_rules.pieces import joined_shape
from lwc.analysis.shape_rules.registry import Fact, Misfit, Outcome, Site, axis_of, rule
from lwc.core.dims import DimShape, multiply

__all__: list[str] = []


@rule("QuantizeLinear com.microsoft::QuantizeLinear")
def _quantize(site: Site) -> Outcome:
    if site.has(2):
        dtype = site.dtype(2)
    else:
        dtype = ir.DataType(site.attribute("output_dtype", 0) or ir.DataType.UINT8)
    return Fact(dtype, site.shape(0))


@rule("DequantizeLinear com.microsoft::DequantizeLinear")
def _dequantize(site: Site) -> Outcome:
    named = site.attribute("output_dtype", 0)
    return Fact(ir.DataType(named) if named else site.dtype(1), site.shape(0))


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(site: Site) -> Outcome:
    uint8 = ir.DataType.UINT8
    return [Fact(uint8, site.shape(0)), Fact(ir.DataType.FLOAT, ()), Fact(uint8, ())]


@rule("com.microsoft::MatMulNBits com.microsoft::MatMulBnb4 lwc::DynamicQuantMatMul")
def _packed_product(site: Site) -> Outcome:
    a = site.shape(0)
    if a is None:
        return Fact(site.dtype(0))
    site.same(a[-1], site.attribute("K"))
    columns = site.attribute("N")
    return Fact(site.dtype(0), (*a[:-1], columns // 2 if site.attribute("gated", 0) else columns))


@rule("com.microsoft::GatherBlockQuantized")
def _gather_block_quantized(site: Site) -> Outcome:
    data, indices = site.shape(0), site.shape(1)
    if data is None or indices is None:
        return Fact(site.dtype(2))
    axis = axis_of(site.attribute("gather_axis", 0), len(data))
    table = list(data)
    if site.dtype(0) == ir.DataType.UINT8:
        # Elements are packed along the last axis, 8 / bits to a byte.
        table[-1] = multiply(table[-1], 8 // site.attribute("bits", 4))
    return Fact(site.dtype(2), (*table[:axis], *indices, *table[axis + 1 :]))


@rule("com.microsoft::DynamicQuantizeMatMul")
def _dynamic_quantize_matmul(site: Site) -> Outcome:
    return Fact(site.dtype(0), matmul_shape(site, site.shape(0), site.shape(1)))


@rule("com.microsoft::MatMulIntegerToFloat")
def _matmul_integer_to_float(site: Site) -> Outcome:
    return Fact(site.dtype(2), matmul_shape(site, site.shape(0), site.shape(1)))


@rule("com.microsoft::FusedMatMul com.microsoft::TransposeMatMul")
def _fused_matmul(site: Site) -> Outcome:
    if site.attribute("transBatchA", 0) or site.attribute("transBatchB", 0):
        shape = site.shape(0)
        return Fact(site.dtype(0), None if shape is None else site.fresh_shape(len(shape)))
    a = _turned(site.shape(0), site.attribute("transA", 0))
    b = _turned(site.shape(1), site.attribute("transB", 0))
    return Fact(site.dtype(0), matmul_shape(site, a, b))


def _turned(shape: DimShape | None, turn: int) -> DimShape | None:
    if shape is None or not turn or len(shape) < 2:
        return shape
    return (*shape[:-2], shape[-1], shape[-2])


@rule("com.microsoft::QLinearAdd com.microsoft::QLinearMul")
def _qlinear_binary(site: Site) -> Outcome:
    return Fact(site.dtype(0), site.broadcast(site.shape(0), site.shape(3)))


@rule("com.microsoft::QLinearConcat")
def _qlinear_concat(site: Site) -> Outcome:
    return Fact(site.dtype(1), joined_shape(site, [f for f in site.inputs[2::3] if f is not None]))


@rule("com.microsoft::QLinearWhere")
def _qlinear_where(site: Site) -> Outcome:
    return Fact(site.dtype(1), site.broadcast(site.shape(0), site.shape(1), site.shape(4)))


@rule("com.microsoft::QLinearSigmoid com.microsoft::QLinearLeakyRelu com.microsoft::QLinearSoftmax")
def _qlinear_unary(site: Site) -> Outcome:
    return Fact(site.dtype(0), site.shape(0))


@rule("com.microsoft::QGemm")
def _qgemm(site: Site) -> Outcome:
    a, b = site.shape(0), site.shape(3)
    if a is None or b is None:
        return Fact(None, site.fresh_shape(2))
    if len(a) != 2 or len(b) != 2:
        raise Misfit("QGemm takes matrices")
    rows = a[1] if site.attribute("transA", 0) else a[0]
    columns = b[0] if site.attribute("transB", 0) else b[1]
    dtype = site.dtype(8) if site.has(8) else site.dtype(1)
    return Fact(dtype, (rows, columns))
