"""`add-lora`: low-rank adapters beside linear layers, which do nothing until they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lwc.core.errors import UsageError
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["AddLora"]


@dataclass(frozen=True)
class AddLora(Pass):
    """Add x·A·B to linear layers, with A random and B zero, so that there is something to train.

    Layers are MatMul and Gemm of a constant weight, quantized or not, in the main graph. Those that
    have an adapter get no other; `recover` trains them and `merge-lora` folds them into weights
    (Hu et al. 2022, LoRA; Dettmers et al. 2023, QLoRA).

    Attributes:
        rank: Columns of A and rows of B.
        alpha: What is added is multiplied by alpha / rank.
        layers: Patterns (`*`, `?`, `[...]`) of names of nodes or weights; by default all but those
            that give one number for each token of the vocabulary.
    """

    name: ClassVar[str] = "add-lora"
    contract: ClassVar[Contract] = Exact()

    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank={self.rank} is no number above 0")
        if not 0 < self.alpha < float("inf"):
            raise UsageError(f"alpha={self.alpha:g} is no number above 0")

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.passes.training.adding import add_adapters

        added = add_adapters(module, ctx, self.rank, self.alpha, self.layers)
        return PassResult(
            changed=bool(added),
            statistics={
                "adapters": len(added),
                "parameters": sum(each.tensor.size for one in added for each in (one.down, one.up)),
            },
        )
