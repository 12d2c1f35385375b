"""`merge-lora`: low-rank adapters become part of the weights beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["MergeLora"]


@dataclass(frozen=True)
class MergeLora(Pass):
    """Fold adapters x·A·B, added to a linear layer x·W, into its weight.

    The new weight W + s·A·B is computed in float64 and rounded once. A weight that others read
    too is stored anew for this layer; a quantized one stays as it is, with its adapter.
    """

    name: ClassVar[str] = "merge-lora"
    contract: ClassVar[Contract] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes", "flops"})

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.passes.training.merging import merge

        hits = merge(module, ctx)
        if not hits:
            ctx.note("no adapter to merge")
        return PassResult(changed=bool(hits), rewrites=hits)
