"""Multiply-adds in floating point: matrix products, convolutions, recurrent layers, Einsum."""

from __future__ import annotations

from lwc.analysis.cost_rules.base import MS, Operands, UnknownCost, Work, cost_rule
from lwc.core.dims import Dim, DimShape, product

__all__ = ["conv_work", "matmul_work"]


def matmul_work(
    a: DimShape, b: DimShape, out: DimShape, *, constant: bool, contracted: Dim | None = None
) -> Work:
    """Return the work of `a @ b`: out elements × contracted extent multiply-adds.

    Args:
        a: Shape of the left operand `[..., m, k]`.
        b: Shape of the right operand `[..., k, n]` or `[k, n]`, as multiplied.
        out: Shape of the product.
        constant: Whether `b` is a weight, which runtimes pack once.
        contracted: The extent k where it is not the last of `a`.
    """
    depth = a[-1] if contracted is None else contracted
    macs = product(out) * depth
    columns = 1 if len(b) == 1 else b[-1]
    if len(b) <= 2:  # a single right operand: all rows are one problem
        rows = product(out) if len(b) == 1 else product(out[:-1])
        return Work(
            macs=macs,
            kernel="matmul" if constant else "matmul_dynamic",
            problem=(rows, depth, columns),
        )
    rows = 1 if len(a) == 1 else out[-2]
    return Work(
        macs=macs,
        kernel="matmul_dynamic",
        problem=(rows, depth, columns),
        repeat=product(out[:-2] if len(a) > 1 else out[:-1]),
    )


@cost_rule("MatMul")
def _matmul(node: Operands) -> Work:
    return matmul_work(node.shape(0), node.shape(1), node.out(), constant=node.constant[1])


@cost_rule(f"{MS}FusedMatMul", f"{MS}TransposeMatMul", f"{MS}FusedMatMulActivation")
def _fused_matmul(node: Operands) -> Work:
    a, b = node.shape(0), node.shape(1)
    if node.attr("transA", 0):
        a = (*a[:-2], a[-1], a[-2])
    if node.attr("transB", 0):
        b = (*b[:-2], b[-1], b[-2])
    if node.attr("transBatchA", 0) and len(a) > 2:
        depth: Dim = node.shape(0)[-2 if node.attr("transA", 0) else -1]
        return matmul_work(a, b, node.out(), constant=node.constant[1], contracted=depth)
    return matmul_work(a, b, node.out(), constant=node.constant[1])


@cost_rule("Gemm", f"{MS}FusedGemm")
def _gemm(node: Operands) -> Work:
    """One multiply-add per k; the bias is the start of the sum and one more addition."""
    a, b = node.shape(0), node.shape(1)
    rows, depth = (a[1], a[0]) if node.attr("transA", 0) else (a[0], a[1])
    columns = b[0] if node.attr("transB", 0) else b[1]
    return Work(
        macs=product((rows, depth, columns)),
        other_flops=product((rows, columns)) if node.has(2) else 0,
        kernel="matmul" if node.constant[1] else "matmul_dynamic",
        problem=(rows, depth, columns),
    )


@cost_rule("Conv", f"{MS}FusedConv", "com.microsoft.nchwc::Conv", f"{MS}NhwcFusedConv")
def _conv(node: Operands) -> Work:
    """Out elements × (channels in / group) × kernel; a bias is one addition per out element.

    Padding counts: every position of the window is a multiply-add.
    """
    weight, out = node.shape(1), node.out()
    return conv_work(weight, out, int(node.attr("group", 1)), node.has(2))


def conv_work(weight: DimShape, out: DimShape, group: int, bias: bool) -> Work:
    """Return the work of a convolution.

    Args:
        weight: Shape `[out channels, in channels / group, kernel...]`.
        out: Shape `[batch, out channels, spatial...]`.
        group: Number of groups.
        bias: Whether a bias is added.
    """
    taps = product(weight[2:])
    depth = product(weight[1:])
    elements = product(out)
    positions = product((out[0], *out[2:]))
    flops = elements if bias else 0
    if group > 1 and weight[1] == 1:
        return Work(
            macs=elements * depth,
            other_flops=flops,
            kernel="conv_depthwise",
            problem=(positions, out[1], taps),
        )
    columns = weight[0] if group == 1 else weight[0] // group
    return Work(
        macs=elements * depth,
        other_flops=flops,
        kernel="conv_pointwise" if taps == 1 else "conv",
        problem=(positions, depth, columns),
        repeat=group,
    )


@cost_rule("ConvTranspose")
def _conv_transpose(node: Operands) -> Work:
    """Every element of the input meets every weight of its channel; then the bias."""
    weight = node.shape(1)  # [in, out / group, kernel...]
    spread = product(weight[1:])
    source = node.shape(0)
    positions = product((source[0], *source[2:]))
    return Work(
        macs=node.size(0) * spread,
        other_flops=node.out_size() if node.has(2) else 0,
        scratch=product(source[2:]) * spread * 4,  # one image at a time
        kernel="conv_transpose",
        problem=(positions, source[1], spread),
    )


@cost_rule("LSTM", "GRU", "RNN")
def _recurrent(node: Operands) -> Work:
    """Input and recurrent products for each gate, then the element-wise cell.

    Per step, direction and hidden unit: the LSTM's cell has 3 sigmoids, 2 tanhs, 3 products and 1
    sum; the GRU's 2 sigmoids, 1 tanh, 3 products and 3 sums; the RNN's 1 tanh. The sum of the
    two products is one operation per gate, each bias half one more.
    """
    gates, cell = {"LSTM": (4, 9), "GRU": (3, 9), "RNN": (1, 1)}[node.op]
    weight, recurrent, source = node.shape(1), node.shape(2), node.shape(0)
    directions, hidden = weight[0], recurrent[2]
    steps, batch = (source[1], source[0]) if node.attr("layout", 0) else (source[0], source[1])
    units = product((steps, batch, directions, hidden))
    biases = 2 * gates if node.has(3) else 0
    return Work(
        macs=units * (gates * (weight[2] + hidden)),
        other_flops=units * (gates + biases + cell),
        scratch=units * gates * 4,
        kernel="matmul",
        problem=(batch, weight[2] + hidden, hidden * gates),
        repeat=product((steps, directions)),
    )


@cost_rule("Einsum")
def _einsum(node: Operands) -> Work:
    """Product of every index extent: exact for one or two operands without a better order."""
    equation = node.attr("equation", "")
    equation = equation.decode() if isinstance(equation, bytes) else equation
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "..." in equation or len(terms) > 2:
        raise UnknownCost("an Einsum with '...' or more than two operands")
    extents: dict[str, Dim] = {}
    for index, term in enumerate(terms):
        extents.update(zip(term, node.shape(index), strict=True))
    points = product(extents.values())
    if len(terms) == 1:
        return Work(other_flops=points, kernel="reduce", problem=(points,))
    kept = set(equation.replace(" ", "").split("->")[-1])
    depth = product(size for name, size in extents.items() if name not in kept)
    columns = product(s for name, s in extents.items() if name in kept and name not in terms[0])
    rows = product(s for name, s in extents.items() if name in kept and name not in terms[1])
    batch = product(s for n, s in extents.items() if n in kept and n in terms[0] and n in terms[1])
    return Work(macs=points, kernel="matmul_dynamic", problem=(rows, depth, columns), repeat=batch)


@cost_rule("DFT", "STFT")
def _transform(node: Operands) -> Work:
    raise UnknownCost("its FLOPs depend on the factors of the transform's length")
