"""Write inferred types and shapes into the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lwc.analysis.shapes import Fact, Shapes
from lwc.core.dims import Dim, as_ir_dim
from lwc.core.module import Module
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

__all__ = ["InferShapes", "annotate"]


@dataclass(frozen=True)
class InferShapes(Pass):
    """Write the inferred type and shape on every value.

    Extents are written as expressions in the names of the graph inputs' dimensions; what depends
    on anything else is left open. Where the file claims something else, inference wins and a
    note says so. Graph inputs and outputs keep what is declared.
    """

    name: ClassVar[str] = "infer-shapes"
    contract: ClassVar[Contract] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes", "parameter-bytes"})

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Annotate the module; see the class."""
        shapes = ctx.analyses.get(Shapes)
        for node, reason in shapes.misfits:
            ctx.warn(f"its inputs do not fit the operator: {reason}", node)
        unknown = 0
        for node in module.nodes():
            for value in node.outputs:
                fact = shapes.fact(value)
                unknown += fact.shape is None and fact.element is None
                contradiction = (
                    None if _is_interface(value, module) else _contradiction(value, fact)
                )
                if contradiction:
                    ctx.note(f"the file declares {contradiction}", node)
        annotated = annotate(module, shapes)
        return PassResult(
            changed=annotated > 0,
            preserved=frozenset({Shapes}),
            statistics={"annotated": annotated, "unknown": unknown},
        )


def annotate(module: Module, shapes: Shapes) -> int:
    """Give every value its inferred type and shape; return how many of them that changed."""
    return sum(
        _annotate(value, shapes.fact(value), shapes)
        for node in module.nodes()
        for value in node.outputs
        if not _is_interface(value, module)
    )


def _is_interface(value: ir.Value, module: Module) -> bool:
    return value.is_graph_output() and value.graph is module.graph


def _annotate(value: ir.Value, fact: Fact, shapes: Shapes) -> bool:
    before = (value.type, value.shape)
    if fact.dtype is not None and value.dtype != fact.dtype:
        value.type = ir.TensorType(fact.dtype)
    if fact.shape is not None:
        value.shape = ir.Shape([_written(dim, shapes) for dim in fact.shape])
    return (value.type, value.shape) != before


def _written(dim: Dim, shapes: Shapes) -> int | ir.SymbolicDim:
    return ir.SymbolicDim(None) if shapes.mentions_fresh(dim) else as_ir_dim(dim)


def _contradiction(value: ir.Value, fact: Fact) -> str | None:
    """Return what the file says of a value that inference knows to be otherwise."""
    if fact.dtype is not None and value.dtype is not None and value.dtype != fact.dtype:
        return f"'{value.name}' as {value.dtype}, it is {fact.dtype}"
    if fact.shape is None or value.shape is None:
        return None
    numbers = (
        (a, b)
        for a, b in zip(value.shape, fact.shape, strict=False)
        if isinstance(a, int) and isinstance(b, int)
    )
    if len(value.shape) != len(fact.shape) or any(a != b for a, b in numbers):
        inferred = ", ".join(map(str, fact.shape))
        return f"'{value.name}' with shape {value.shape}, it is [{inferred}]"
    return None
