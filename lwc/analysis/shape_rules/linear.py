"""Matrix products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from lwc.analysis.shape_rules.registry import Fact, Misfit, Outcome, Site, rule
from lwc.core.dims import Dim, DimShape

__all__ = ["matmul_shape", "register_product"]

ProductShape: TypeAlias = Callable[[Site, DimShape | None, DimShape | None], DimShape | None]


def matmul_shape(site: Site, a: DimShape | None, b: DimShape | None) -> DimShape | None:
    """Return the shape of numpy's matmul, or None."""
    if a is None or b is None:
        return None
    if not a or not b:
        raise Misfit("a matrix product needs at least one axis")
    left, right = (a if len(a) > 1 else (1, *a)), (b if len(b) > 1 else (*b, 1))
    site.same(left[-1], right[-2])
    batch = site.broadcast(left[:-2], right[:-2]) or ()
    rows = (left[-2],) if len(a) > 1 else ()
    columns = (right[-1],) if len(b) > 1 else ()
    return (*batch, *rows, *columns)


def register_product(plain: str, integer: str, qlinear: str, shape_of: ProductShape) -> None:
    """Register the rules of a product of two tensors in its three forms.

    Args:
        plain: Operators whose result has the type of their operands, inputs 0 and 1.
        integer: The operator on 8-bit integers, which sums in int32.
        qlinear: The operator with a scale and a zero point after each operand, and those of the
            result at the end.
        shape_of: Gives the shape of the result from those of the operands.
    """

    @rule(plain)
    def _plain(site: Site) -> Outcome:
        return Fact(site.dtype(0), shape_of(site, site.shape(0), site.shape(1)))

    @rule(integer)
    def _integer(site: Site) -> Outcome:
        return Fact(ir.DataType.INT32, shape_of(site, site.shape(0), site.shape(1)))

    @rule(qlinear)
    def _qlinear(site: Site) -> Outcome:
        return Fact(site.dtype(7), shape_of(site, site.shape(0), site.shape(3)))


register_product("MatMul", "MatMulInteger", "QLinearMatMul", matmul_shape)


@rule("Gemm com.microsoft::FusedGemm")
def _gemm(site: Site) -> Outcome:
    a, b = site.shape(0), site.shape(1)
    rows = a[site.attribute("transA", 0) and 1] if a is not None else site.fresh()
    columns = b[0 if site.attribute("transB", 0) else 1] if b is not None else site.fresh()
    if a is not None and b is not None:
        if len(a) != 2 or len(b) != 2:
            raise Misfit("Gemm takes matrices")
        inner = a[0 if site.attribute("transA", 0) else 1]
        site.same(inner, b[1 if site.attribute("transB", 0) else 0])
    return Fact(site.dtype(0), (rows, columns))


@rule("Einsum")
def _einsum(site: Site) -> Outcome:
    equation = site.attribute("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(site.inputs):
        raise Misfit(f"equation '{equation}' does not fit {len(site.inputs)} inputs")
    extents: dict[str, Dim] = {}
    spread: DimShape = ()
    for index, term in enumerate(terms):
        shape = site.shape(index)
        if shape is None:
            return Fact(site.dtype(0))
        before, dots, after = term.partition("...")
        middle = len(shape) - len(before) - len(after)
        if middle < 0 or (middle and not dots):
            raise Misfit(f"term '{term}' does not fit rank {len(shape)}")
        if dots:
            spread = site.broadcast(spread, shape[len(before) : len(before) + middle]) or ()
        labelled = [*zip(before, shape, strict=False)]
        labelled += zip(after, shape[len(before) + middle :], strict=True)
        for label, dim in labelled:
            # numpy and ONNX Runtime let an axis of 1 stand for any extent here.
            have = extents.get(label)
            extents[label] = dim if have is None else site.shapes.broadcast_dim(have, dim)
    if not arrow:
        counts = Counter(left.replace(",", "").replace(".", ""))
        right = "".join(sorted(label for label, count in counts.items() if count == 1))
        right = "..." + right if spread else right
    before, dots, after = right.partition("...")
    shape = (*(extents[label] for label in before), *(spread if dots else ()))
    return Fact(site.dtype(0), (*shape, *(extents[label] for label in after)))


@rule("Det")
def _det(site: Site) -> Outcome:
    shape = site.shape(0)
    return Fact(site.dtype(0), None if shape is None else shape[:-2])
