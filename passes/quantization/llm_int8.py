"""`llm-int8`: int8 products beside which the channels of large activations stay in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lwc.core.errors import UsageError
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import Contract, Lossy, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.passes.quantization.layerwise import Layer
    from lwc.passes.quantization.outlier_columns import Columns

    Array = np.ndarray[Any, Any]

__all__ = ["LlmInt8"]


@dataclass(frozen=True)
class LlmInt8(Pass):
    """Compute linear layers in int8, but for the channels of large activations.

    Channels of an activation that reach the threshold on the calibration data are multiplied in
    floating point; all others in int8, with a scale for each token and each output that the
    former have no part in. The result is the sum of both (Dettmers et al. 2022, LLM.int8()). There
    the channels are found anew in each product; here they are constants of the graph, so that
    shapes stay static and weights are split once. Outliers stay in the same channels from token to
    token; one that the data did not show is rounded with the rest.

    Attributes:
        threshold: Magnitude from which on a channel stays in floating point; at 0 all do, and
            layers stay as they are.
        embeddings: Bits of tables read by Gather, and of what is tied to them, as in
            `quantize-weights`.
        ops: Operators whose weights are quantized.
        exclude: Patterns (`*`, `?`, `[...]`) of names of nodes or weights to leave alone.
    """

    name: ClassVar[str] = "llm-int8"
    contract: ClassVar[Contract] = Lossy(noise=0.1)
    positional: ClassVar[str | None] = "threshold"

    threshold: float = 6.0
    embeddings: Literal[4, 8] | None = None
    ops: tuple[str, ...] = ("MatMul", "Gemm")
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise UsageError(f"threshold={self.threshold} is no magnitude", remedy="use 6")
        self._quantizer()

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.calibration.statistics import AbsMax
        from lwc.passes.quantization.activations import measured, observe, seen
        from lwc.passes.quantization.outlier_columns import OutlierColumns

        quantizer = self._quantizer()
        found, skipped = quantizer.choose(module, ctx)
        layers = seen(found, module, ctx)
        values = measured(module, layers)
        largest = {value: AbsMax() for value in values}
        samples = observe(module, values, ctx, largest) if values else {}
        tops = {value: each.value for value, each in largest.items()}
        columns = self._columns(layers, tops, ctx)
        kept = [layer for layer in layers if layer.weight.value in columns]
        split = {value: each for value, each in columns.items() if each.channels.any()}
        result = quantizer.quantize(
            module,
            ctx,
            [each._replace(weight=columns[each.weight.value].rest) for each in kept],
            skipped=skipped + len(found) - len(kept),
            activations=OutlierColumns(samples, split),
        )
        count = sum(int(each.channels.sum()) for each in columns.values())
        total = sum(len(each.channels) for each in columns.values())
        statistics = {
            "channels in float": count,
            "share of channels in float": count / (total or 1),
        }
        return PassResult(changed=result.changed, statistics={**result.statistics, **statistics})

    def _columns(
        self, layers: list[Layer], tops: Mapping[ir.Value, Array], ctx: PassContext
    ) -> dict[ir.Value, Columns]:
        """Return which channels of each weight's activations stay in floating point.

        Args:
            layers: The layers.
            tops: Largest magnitude of each channel of what they read.
            ctx: Told of the layers that stay as they are, which the result lacks.
        """
        from lwc.passes.quantization.outlier_columns import columns_of

        found: dict[ir.Value, Columns] = {}
        for layer in layers:
            weight, node = layer.weight, layer.weight.uses[0].node
            read = [use.node.inputs[0] for use in weight.uses]
            rounds = layer.spec.layout == "tiles" and not weight.tied
            known = [tops[value] for value in read if rounds and value is not None]
            each = columns_of(layer, known, self.threshold)
            if each.channels.all():
                ctx.missed(
                    f"'{weight.value.name}' stays: every channel it reads reaches threshold="
                    f"{self.threshold:g}",
                    node,
                )
                continue
            found[weight.value] = each
        return found

    def _quantizer(self) -> QuantizeWeights:
        return QuantizeWeights(
            bits=8, block_size=0, symmetric=True, format="lwc",
            embeddings=self.embeddings, ops=self.ops, exclude=self.exclude,
        )  # fmt: skip
