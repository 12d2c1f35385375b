"""`recover`: training that regains what other passes lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lwc.core.errors import InputError, PassError, UsageError
from lwc.pipeline.passes import Contract, Lossy, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Recover"]


@dataclass(frozen=True)
class Recover(Pass):
    """Train the model on the calibration data, so that it regains what other passes lost.

    It trains adapters or weights with AdamW on next tokens, on what a teacher gives, or on both.
    Part of the data is held out: unless the loss falls there, the module stays as it is. Weights
    must be float32; quantized ones stay as they are and get adapters, which stay beside them.

    Attributes:
        method: `lora` trains low-rank adapters, those that are there or else new ones as of
            `add-lora`; `full` the weights of MatMul, Gemm and Conv, with embeddings that are tied
            to one of them.
        rank: Of new adapters.
        alpha: Of new adapters: they are multiplied by alpha / rank.
        layers: Of new adapters: see `add-lora`.
        steps: Updates.
        learning_rate: The highest one, after a warm-up; by default 1e-3 for adapters and 1e-5 for
            weights.
        batch: Feeds whose gradients are averaged for an update.
        teacher: A model, by its file or folder; `auto` is the module as it was before the first
            pass of the pipeline, where that gives something else; `none` is none.
        loss: `kl` is the divergence of the teacher's logits from the model's, `reverse-kl` that of
            the model's from the teacher's, `mse` the relative squared error of all outputs,
            `cross-entropy` that of next tokens. `auto` is `kl` with a teacher of a model with
            logits for tokens, `mse` with another, `cross-entropy` without.
        kd_weight: Share of the teacher in the loss, where next tokens can be predicted too.
        temperature: What logits are divided by in divergences.
        held_out: Share of the feeds, the last ones, that are not trained on.
        merge: Whether adapters become part of the weights afterwards, as of `merge-lora`.
        keep_zeros: Whether weights that are 0 stay 0. Adapters, also those that are there, leave
            rows and columns that are 0 altogether; where more than a quarter of the other weights
            of a layer are, its adapter is not trained.
            Fewer count as chance, and change with an adapter, as all of a quantized weight does.
    """

    name: ClassVar[str] = "recover"
    contract: ClassVar[Contract] = Lossy()
    changes_again: ClassVar[str | None] = "it goes on training"

    method: Literal["lora", "full"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ()
    steps: int = 100
    learning_rate: float | None = None
    batch: int = 1
    teacher: str | None = "auto"
    loss: Literal["auto", "cross-entropy", "kl", "reverse-kl", "mse"] = "auto"
    kd_weight: float = 0.5
    temperature: float = 1.0
    held_out: float = 0.1
    merge: bool = True
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        for name, number in (("rank", self.rank), ("steps", self.steps), ("batch", self.batch)):
            if number < 1:
                raise UsageError(f"{name}={number} is no number above 0")
        for name, rate in (
            ("alpha", self.alpha),
            ("learning-rate", self.learning_rate),
            ("temperature", self.temperature),
        ):
            if rate is not None and not 0 < rate < float("inf"):
                raise UsageError(f"{name}={rate:g} is no number above 0")
        if not 0 <= self.kd_weight <= 1:
            raise UsageError(f"kd-weight={self.kd_weight:g} is no share from 0 to 1")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held-out={self.held_out:g} is no share above 0 and below 1")
        if self.loss == "cross-entropy" and self.teacher not in (None, "auto"):
            raise UsageError("loss=cross-entropy has no use for a teacher", remedy="use loss=kl")
        if not self.kd_weight and (
            self.teacher not in (None, "auto") or self.loss not in ("auto", "cross-entropy")
        ):
            raise UsageError(
                "kd-weight=0 leaves no share to a teacher, whom teacher= or loss= asks for",
                remedy="raise it, or leave out what asks for one",
            )
        if self.method == "full" and self.layers:
            raise UsageError(
                "layers= is of new adapters, which method=full has none of",
                remedy="leave it out, or use method=lora",
            )

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.passes.training.recovery import recover

        try:
            return recover(module, ctx, self)
        except (InputError, PassError) as error:
            error.file = error.file or module.source.path
            raise
