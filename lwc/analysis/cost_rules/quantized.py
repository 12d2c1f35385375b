"""Matrix products and convolutions on quantized operands.

An integer multiply-add is one MAC like a floating-point one; bringing operands and results to and
from integers counts separately, per element.
"""

from __future__ import annotations

from dataclasses import replace

from lwc.analysis.cost_rules.base import MS, Operands, Work, cost_rule
from lwc.analysis.cost_rules.contraction import conv_work, matmul_work
from lwc.core.dims import Dim, product

__all__: list[str] = []

_REQUANTIZE = 4
"""FLOPs to bring a sum to 8 bits: scale, round, add the zero point, clamp (as one)."""


def _integer(work: Work, other_flops: Dim, scratch: Dim = 0) -> Work:
    kernel = {"matmul": "matmul_int8", "matmul_dynamic": "matmul_int8_dynamic"}[work.kernel]
    return replace(work, kernel=kernel, other_flops=other_flops, scratch=scratch)


@cost_rule("MatMulInteger", f"{MS}MatMulInteger16")
def _matmul_integer(node: Operands) -> Work:
    work = matmul_work(node.shape(0), node.shape(1), node.out(), constant=node.constant[1])
    return _integer(work, 0)


@cost_rule("QLinearMatMul", f"{MS}QLinearMatMul")
def _qlinear_matmul(node: Operands) -> Work:
    work = matmul_work(node.shape(0), node.shape(3), node.out(), constant=node.constant[3])
    return _integer(work, node.out_size() * _REQUANTIZE, scratch=node.out_size() * 4)


@cost_rule(f"{MS}DynamicQuantizeMatMul")
def _dynamic_quantize_matmul(node: Operands) -> Work:
    """Quantize the activations (range, divide, round, clamp), multiply, scale back."""
    work = matmul_work(node.shape(0), node.shape(1), node.out(), constant=node.constant[1])
    bias = int(node.has(4))
    flops = node.size(0) * 7 + node.out_size() * (1 + bias)
    return _integer(work, flops, scratch=node.size(0))


@cost_rule(f"{MS}MatMulIntegerToFloat")
def _matmul_integer_to_float(node: Operands) -> Work:
    work = matmul_work(node.shape(0), node.shape(1), node.out(), constant=node.constant[1])
    return _integer(work, node.out_size() * (1 + int(node.has(6))))


@cost_rule(f"{MS}QGemm")
def _qgemm(node: Operands) -> Work:
    a, b = node.shape(0), node.shape(3)
    rows, depth = (a[1], a[0]) if node.attr("transA", 0) else (a[0], a[1])
    columns = b[0] if node.attr("transB", 0) else b[1]
    return Work(
        macs=product((rows, depth, columns)),
        other_flops=node.out_size() * _REQUANTIZE,
        kernel="matmul_int8",
        problem=(rows, depth, columns),
    )


@cost_rule("QLinearConv", f"{MS}QLinearConv", f"{MS}NhwcMaxPool")
def _qlinear_conv(node: Operands) -> Work:
    if node.op == f"{MS}NhwcMaxPool":
        elements = node.out_size() * product(node.attr("kernel_shape", ()))
        return Work(other_flops=elements, kernel="reduce", problem=(elements,))
    weight, out = node.shape(3), node.out()
    if node.attr("channels_last", 0):
        out = (out[0], out[-1], *out[1:-1])
    work = conv_work(weight, out, int(node.attr("group", 1)), node.has(8))
    return replace(work, other_flops=work.other_flops + node.out_size() * _REQUANTIZE)


@cost_rule("ConvInteger")
def _conv_integer(node: Operands) -> Work:
    return conv_work(node.shape(1), node.out(), int(node.attr("group", 1)), bias=False)


@cost_rule("lwc::DynamicQuantMatMul")
def _dynamic_quant_matmul(node: Operands) -> Work:
    """Multiply-adds of the product, and a bias; activations are as in `_matmul_nbits`."""
    depth, columns, size = (int(node.attr(name)) for name in ("K", "N", "block_size"))
    rows = product(node.shape(0)[:-1])
    sums = -(-depth // size) if size else 1
    gate = node.out_size() if node.attr("gated") else 0
    return Work(
        macs=product((rows, depth, columns)),
        other_flops=(product((rows, columns)) if node.attr("bias") else 0) + gate,
        scratch=product((rows, depth + 8 * sums)),
        kernel=f"lwc_matmul{node.attr('bits')}",
        problem=(rows, depth, columns),
    )


@cost_rule(f"{MS}MatMulNBits", f"{MS}MatMulBnb4", f"{MS}MatMulFpQ4")
def _matmul_nbits(node: Operands) -> Work:
    """Multiply-adds of the product; unpacking codes into weights is not counted.

    The attributes K and N give the size of the weight; its tensor is packed in blocks. At
    accuracy level 4 the activations are quantized first: a byte each, and a float32 scale and sum
    for every block.
    """
    source = node.shape(0)
    depth, columns = int(node.attr("K")), int(node.attr("N"))
    rows = product(source[:-1])
    bits = int(node.attr("bits", 4))
    bias = product((rows, columns)) if node.has(5) else 0
    scratch: Dim = 0
    if node.attr("accuracy_level", 0) == 4:
        blocks = -(-depth // int(node.attr("block_size", 32)))
        scratch = product((rows, depth + 8 * blocks))
    return Work(
        macs=product((rows, depth, columns)),
        other_flops=bias,
        scratch=scratch,
        kernel=f"matmul_nbits{8 if bits > 4 else 4}",
        problem=(rows, depth, columns),
    )
