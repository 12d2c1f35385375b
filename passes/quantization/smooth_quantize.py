"""`smooth-quantize`: activations and weights in 8 bits, after SmoothQuant's migration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.passes.quantization.smooth import Smooth
from lwc.pipeline.passes import Contract, Lossy, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from lwc.calibration.statistics import Histogram
    from lwc.core.module import Module
    from lwc.passes.quantization.activations import Activations
    from lwc.passes.quantization.layerwise import Layer

__all__ = ["SmoothQuantize"]


@dataclass(frozen=True)
class SmoothQuantize(Pass):
    """Compute linear layers in int8: smooth activations, then round them and the weights.

    `smooth` runs first; then weights are rounded to int8 with one scale for each output, and
    activations as `activations` says (Xiao et al. 2023, SmoothQuant). Static scales, smoothing and
    the errors of outputs that are reported need calibration data.

    Attributes:
        alpha: See `smooth`; `none` leaves activations as they are.
        products: See `smooth`.
        activations: `per-token` gives each token a scale when the model runs, by
            lwc::DynamicQuantMatMul; `per-tensor` each tensor, by ONNX Runtime's
            DynamicQuantizeMatMul; `static` takes scales from calibration data and writes standard
            QuantizeLinear and DequantizeLinear, which any runtime loads.
        clip: Of `static`: where activations are cut off; `mse` at the least squared error,
            `entropy` where their distribution diverges least (Migacz 2017), `percentile` so that
            99.99 % of them lie within, `max` nowhere.
        weight_bits: By default 8 per token, and 7 otherwise: without VNNI, ONNX Runtime adds
            products of uint8 and int8 in pairs in 16 bits, which overflow where weights
            exceed ±64.
        method: How weights are rounded, as in `quantize-weights`.
        embeddings: Bits of tables read by Gather, and of what is tied to them, as in
            `quantize-weights`; `static` leaves them.
        ops: Operators whose weights are quantized.
        exclude: Patterns (`*`, `?`, `[...]`) of names of nodes or weights to leave alone.
    """

    name: ClassVar[str] = "smooth-quantize"
    contract: ClassVar[Contract] = Lossy(noise=0.1)
    positional: ClassVar[str | None] = "alpha"

    alpha: float | Literal["auto"] | None = "auto"
    products: bool = False
    activations: Literal["per-token", "per-tensor", "static"] = "per-token"
    clip: Literal["mse", "entropy", "percentile", "max"] = "mse"
    weight_bits: Literal[7, 8] | None = None
    method: Literal["rtn", "gptq"] = "rtn"
    embeddings: Literal[4, 8] | None = 8
    ops: tuple[str, ...] = ("MatMul", "Gemm")
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.alpha is not None:
            Smooth(self.alpha)
        self._quantizer()

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.passes.quantization.activations import seen

        smoothed = PassResult(changed=False)
        if self.alpha is not None:
            smoothed = Smooth(self.alpha, self.products).run(module, ctx)
            ctx.analyses.invalidate()
        quantizer = self._quantizer()
        found, skipped = quantizer.choose(module, ctx)
        kept = seen(found, module, ctx) if self.activations == "static" else found
        skipped += len(found) - len(kept)
        layers = [self._in_columns(layer) for layer in kept]
        result = quantizer.quantize(
            module, ctx, layers, skipped=skipped, activations=self._activations(module, layers, ctx)
        )
        return PassResult(
            changed=smoothed.changed or result.changed,
            statistics={**smoothed.statistics, **result.statistics},
        )

    def _quantizer(self) -> QuantizeWeights:
        static = self.activations == "static"
        return QuantizeWeights(
            bits=8,
            method=self.method,
            block_size=0,
            symmetric=True,
            format="qdq" if static else "lwc",
            embeddings=None if static else self.embeddings,
            ops=self.ops,
            exclude=self.exclude,
        )

    def _in_columns(self, layer: Layer) -> Layer:
        """Return a layer with the weights' form that the way of rounding activations asks for."""
        if layer.spec.layout not in ("tiles", "qdq"):
            return layer
        dynamic = self.activations == "per-token" or layer.weight.tied
        layout = layer.spec.layout if dynamic else "qdq"
        grid = replace(
            layer.spec.grid,
            bits=self.weight_bits or (8 if dynamic else 7),
            short_scales=layout == "tiles",
        )
        return layer._replace(spec=replace(layer.spec, grid=grid, layout=layout))

    def _activations(self, module: Module, layers: list[Layer], ctx: PassContext) -> Activations:
        from lwc.calibration.statistics import Histogram
        from lwc.passes.quantization.activations import (
            Activations,
            PerTensor,
            Static,
            measured,
            observe,
            step_as_stored,
        )

        static = self.activations == "static"
        values = measured(module, layers)
        histograms = {value: Histogram() for value in values if static}
        samples = {}
        if values and (static or ctx.calibration is not None):
            samples = observe(module, values, ctx, histograms)
        if static:
            # The operands of a product have one type.
            types = {use.node.inputs[0]: layer.weight.tensor.dtype
                     for layer in layers for use in layer.weight.uses}  # fmt: skip
            steps = {
                value: step_as_stored(self._step(each), types[value])
                for value, each in histograms.items()
            }
            return Static(samples, steps)
        return (PerTensor if self.activations == "per-tensor" else Activations)(samples)

    def _step(self, histogram: Histogram) -> float:
        if self.clip == "mse":
            limit = histogram.least_squares(127)
        elif self.clip == "entropy":
            limit = histogram.entropy(127)
        else:
            limit = histogram.percentile(0.9999 if self.clip == "percentile" else 1.0)
        return limit / 127 or 1.0
