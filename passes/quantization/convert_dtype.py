"""`convert-dtype`: float32 weights and computation to float16 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from lwc.pipeline.passes import Approximate, Contract, Pass, PassContext, PassResult

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.module import Module

__all__ = ["ConvertDtype"]


@dataclass(frozen=True)
class ConvertDtype(Pass):
    """Compute in half precision where operators admit it and the numbers allow it.

    Weights are converted one at a time. What must stay float32 (see
    `lwc.passes.quantization.half_plan`) gets a Cast before and after it. Finite numbers beyond
    the half type's range become its largest: in the constants of operators that only move,
    choose or add them, elsewhere where the float32 result becomes half. A single number that
    would round to zero, such as a norm's epsilon, becomes the smallest. All with a warning.

    The contract's tolerance is for outputs of the order of one; a deep network in bfloat16 may
    need more.

    Attributes:
        dtype: The half type.
        keep_io: Whether graph inputs and outputs stay float32, behind a Cast.
        exclude: Patterns (`*`, `?`, `[...]`) of names or operators of nodes that stay float32.
    """

    name: ClassVar[str] = "convert-dtype"
    contract: ClassVar[Contract] = Approximate(rtol=5e-2, atol=5e-2)
    positional: ClassVar[str] = "dtype"

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep_io: bool = True
    exclude: tuple[str, ...] = ()

    @property
    def keeps_interface(self) -> bool:
        """Whether inputs and outputs stay float32."""
        return self.keep_io

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        import onnx_ir as ir

        from lwc.analysis.shapes import Shapes
        from lwc.passes.quantization.half_conversion import HalfConversion
        from lwc.passes.quantization.half_plan import plan_half

        half = ir.DataType.FLOAT16 if self.dtype == "float16" else ir.DataType.BFLOAT16
        shapes = ctx.analyses.get(Shapes)
        for pattern in self.exclude:
            if not any(_matches(node, pattern) for node in module.nodes()):
                ctx.warn(f"exclude={pattern} matches no node")
        plan = plan_half(module, shapes, half, self._excluded, ctx.limit)
        conversion = HalfConversion(module, shapes, plan, ctx, keep_io=self.keep_io)
        conversion.run()
        for node, reason in plan.kept.items():
            if reason is not None:
                ctx.missed(f"stays float32: {reason}", node)
        if not conversion.changed:
            ctx.note("nothing to convert")
            return PassResult(changed=False)
        if half == ir.DataType.BFLOAT16:
            ctx.warn(
                "ONNX Runtime has no bfloat16 MatMul on the CPU: the model is for other devices"
            )
        return PassResult(changed=True, statistics=conversion.statistics())

    def _excluded(self, node: ir.Node) -> bool:
        return any(_matches(node, pattern) for pattern in self.exclude)


def _matches(node: ir.Node, pattern: str) -> bool:
    names = (node.name, node.op_type)
    return any(name is not None and fnmatchcase(name, pattern) for name in names)
