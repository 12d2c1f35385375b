"""`quantize-weights`: weight-only quantization in blocks: rounding to nearest, GPTQ, AWQ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from lwc.core.errors import PassError, UsageError
from lwc.pipeline.passes import Contract, Lossy, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.passes.quantization.activations import Activations
    from lwc.passes.quantization.layerwise import Layer, LayerwiseQuantizer, RoundingMethod
    from lwc.passes.quantization.streaming import QuantizedWeight, WeightSpec
    from lwc.passes.quantization.weight_forms import WeightForms
    from lwc.passes.quantization.weight_uses import WeightUses
    from lwc.rewrite.editor import Editor

__all__ = ["Bits", "QuantizeWeights"]

Bits: TypeAlias = Literal[2, 3, 4, 8]

_LARGEST_BLOCK = 1 << 15
"""Sums over a block of lwc's operator fit 32 bits; and a block is never cut short in memory."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round the weights of linear layers and embeddings to a few bits, in blocks.

    Weights are processed one at a time from the memory-mapped file to the module's spill file.
    A weight that several nodes share is packed once; where an embedding and a linear layer share
    it, `embeddings` says its bits. A weight is quantized for all that reads it or not at all:
    otherwise it would be stored twice.

    GPTQ and AWQ need calibration data. They take one layer after the other, each with the inputs
    that the quantized layers before it give, and minimise the error of its outputs on that data. A
    weight that is read by an embedding or with several activations is rounded to nearest.

    Attributes:
        bits: Bits of the weights of MatMul and Gemm.
        codebook: `uniform` has evenly spaced levels; `nf4` the 16 of NormalFloat, quantiles of the
            normal distribution, times the largest magnitude of a block (Dettmers et al. 2023,
            QLoRA). It needs 4 bits and whole blocks; tables read by Gather stay uniform.
        method: `rtn` rounds to nearest; `gptq` lets the weights that are not rounded yet make up
            for each error (Frantar et al. 2023); `awq` scales up inputs that see large activations,
            where what makes the activation can take the factor, and clips blocks (Lin et al. 2024).
        embeddings: Bits of tables read by Gather; none leaves them, and what is tied to them.
        block_size: Weights that share a scale; a power of two from 16 (32 in `lwc` and `auto`)
            to 32768. With `format=qdq` or `lwc`, 0 gives each output channel one scale. By default
            32, with `codebook=nf4` 64, but 16 for 8-bit weights of MatMulNBits whose layer reads a
            product of activations, as after a gate: its spread within a block decides the error at
            accuracy level 4.
        symmetric: Whether the zero point is fixed in the middle. That saves a byte or half a
            byte per block.
        search: How scales are chosen: `mse` tries a few grids per block (of nf4, the levels and
            their mirror image) and keeps the one of least squared error, `none` takes the block's
            range.
        ops: Operators whose weights are quantized.
        damping: Of GPTQ: added to the diagonal of X·Xᵀ, as a share of its mean, up to 1.
        act_order: Of GPTQ: round the inputs of the largest activations first.
        exclude: Patterns (`*`, `?`, `[...]`) of names of nodes or weights to leave alone.
        format: `matmulnbits` lowers to ONNX Runtime's MatMulNBits (of nf4, MatMulBnb4) and
            GatherBlockQuantized, `qdq` to the standard DequantizeLinear (of nf4, Gather and Mul,
            which ONNX Runtime computes when it loads the model: the file is small, the memory not),
            `lwc` to lwc::DynamicQuantMatMul, the only one with 3 bits; an embedding alone stays
            GatherBlockQuantized. `auto` takes for each weight the faster of
            `matmulnbits` and `lwc` on the measured target, for one token and a prompt of 512
            together, and leaves a weight alone that neither makes as fast as float32 in both.
        accuracy_level: How products are computed: 4 rounds activations to int8 per block, which
            is fast and adds about 0.5 % relative error to a layer's output; 1 is float32, which
            `lwc` does not have.
    """

    name: ClassVar[str] = "quantize-weights"
    contract: ClassVar[Contract] = Lossy(noise=0.1)

    bits: Bits = 4
    codebook: Literal["uniform", "nf4"] = "uniform"
    method: Literal["rtn", "gptq", "awq"] = "rtn"
    embeddings: Literal[4, 8] | None = 8
    block_size: int | None = None
    symmetric: bool = False
    search: Literal["none", "mse"] = "mse"
    damping: float = 0.01
    act_order: bool = True
    ops: tuple[str, ...] = ("MatMul", "Gemm")
    exclude: tuple[str, ...] = ()
    format: Literal["matmulnbits", "qdq", "lwc", "auto"] = "matmulnbits"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4

    def __post_init__(self) -> None:
        size = self.block_size
        whole = size == 0 and self.format in ("qdq", "lwc")
        least = 32 if self.format in ("lwc", "auto") else 16
        if size is not None and not whole and (size < least or size & (size - 1)):
            raise UsageError(
                f"block-size={size} is no power of two from {least}",
                remedy="use 32; 0, one block per channel, needs format=qdq or lwc",
            )
        if size is not None and size > _LARGEST_BLOCK:
            raise UsageError(
                f"block-size={size} is more than {_LARGEST_BLOCK}",
                remedy="use 32; 0, one block per channel, needs format=qdq or lwc",
            )
        if not 0 < self.damping <= 1:
            raise UsageError(
                f"damping={self.damping:g} is no share above 0 and up to 1", remedy="use 0.01"
            )
        if self.bits == 3 and self.format not in ("lwc", "auto"):
            raise UsageError(
                f"format={self.format} has no 3 bits", remedy="use format=lwc, or 2 or 4 bits"
            )
        if self.format in ("lwc", "auto") and self.accuracy_level != 4:
            raise UsageError(
                f"format={self.format} does not compute at accuracy-level={self.accuracy_level}",
                remedy="leave it at 4, or use another format",
            )
        if self.codebook == "nf4":
            self._check_nf4()
        for op in self.ops:
            if op not in ("MatMul", "Gemm"):
                raise UsageError(
                    f"ops={op} has no quantized form", remedy="choose from MatMul, Gemm"
                )

    def _check_nf4(self) -> None:
        if self.bits != 4:
            raise UsageError(f"codebook=nf4 has codes of 4 bits, not {self.bits}")
        if self.format in ("lwc", "auto"):
            raise UsageError(
                f"format={self.format} has no codebook=nf4", remedy="use format=matmulnbits or qdq"
            )
        if self.format == "matmulnbits" and self.block_size is not None and self.block_size > 256:
            raise UsageError(
                f"block-size={self.block_size} is more than the 256 of MatMulBnb4",
                remedy="use 64, or format=qdq",
            )

    def form(
        self, weight: WeightUses, editor: Editor, assigned: Mapping[ir.Value, Bits] | None = None
    ) -> tuple[WeightSpec, int] | str:
        """Say what a weight would become and the bytes that takes, or why it would stay.

        Args:
            weight: The weight.
            editor: Knows the module.
            assigned: See `choose`.

        Raises:
            PassError: The module's opset cannot express it.
        """
        forms = self._forms(editor, assigned)
        reason = forms.obstacle(weight)
        return (forms.spec(weight), forms.packed_bytes(weight)) if reason is None else reason

    @property
    def how(self) -> RoundingMethod:
        """How the weights of layers are rounded."""
        from lwc.passes.quantization.layerwise import RoundingMethod

        return RoundingMethod(self.method, self.damping, self.act_order)

    def _forms(self, editor: Editor, assigned: Mapping[ir.Value, Bits] | None) -> WeightForms:
        from lwc.passes.quantization.weight_forms import WeightForms

        return WeightForms(self, assigned or {}, editor)

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        layers, skipped = self.choose(module, ctx)
        return self.quantize(module, ctx, layers, skipped=skipped)

    def choose(
        self, module: Module, ctx: PassContext, assigned: Mapping[ir.Value, Bits] | None = None
    ) -> tuple[list[Layer], int]:
        """Return the layers to quantize, and how many stay, for which remarks say why.

        Args:
            module: The model.
            ctx: What the pass may use.
            assigned: Bits of some weights of linear layers, in place of those of the pass.

        Raises:
            PassError: The module's opset or a weight's type cannot express what is asked for.
        """
        from lwc.passes.quantization.layerwise import Layer
        from lwc.passes.quantization.weight_forms import matches
        from lwc.passes.quantization.weight_uses import find_weights

        editor = ctx.editor()
        chosen: list[Layer] = []
        skipped = 0
        weights = list(find_weights(module))
        for pattern in self.exclude:
            if not any(matches(weight, pattern) for weight in weights):
                ctx.warn(f"exclude={pattern} matches no weight and none of their nodes")
        for weight in weights:
            own = self._for(weight, ctx, editor, assigned)
            form = own if isinstance(own, str) else own.form(weight, editor, assigned)
            if isinstance(form, str):
                skipped += 1
                place = weight.uses[0].node if weight.uses else None
                ctx.missed(f"'{weight.value.name}' stays: {form}", place)
            else:
                chosen.append(Layer(weight, form[0]))
        return chosen, skipped

    def quantize(
        self,
        module: Module,
        ctx: PassContext,
        chosen: list[Layer],
        *,
        skipped: int = 0,
        activations: Activations | None = None,
    ) -> PassResult:
        """Quantize layers; `choose` finds them.

        Args:
            module: The model.
            ctx: What the pass may use.
            chosen: The layers, of which a tensor may differ from the one in the graph.
            skipped: Weights that stay, for the statistics.
            activations: What becomes of activations; None leaves them to the lowered operators.
        """
        from lwc.passes.quantization.layerwise import Layer
        from lwc.passes.quantization.lowering import lower
        from lwc.passes.quantization.tally import Tally

        editor = ctx.editor()
        done: list[tuple[Layer, QuantizedWeight]] = []
        tally = Tally(requested=self.bits, skipped=skipped)
        quantizer = self._quantizer(module, chosen, ctx)
        results = self._results(chosen, quantizer, ctx)
        # Asked for one by one: a calibrated weight is rounded in the module when its turn comes.
        while not ctx.limit.exhausted and (found := next(results, None)) is not None:
            layer, result, output_error = found
            weight, spec = layer
            if result is not None and activations is not None:
                output_error = activations.output_error(layer, result)
            node = weight.uses[0].node
            if result is None:
                tally.skipped += 1
                ctx.missed(
                    f"'{weight.value.name}' stays: it holds infinities or NaN, or magnitudes "
                    "above 1e19",
                    node,
                )
                continue
            # In this thread, so that the order in the file is that of the graph.
            done.append((layer, result.spill(module.store)))
            tally.add(weight, spec, result, output_error)
            ctx.limit.spend(f"quantize-{weight.uses[0].role.lower()}", node)
            grid = spec.grid
            kind = f"{grid.bits} bits" if grid.codebook == "uniform" else grid.codebook
            outputs = "" if output_error is None else f", of its outputs {output_error:.2e}"
            ctx.applied(
                f"'{weight.value.name}' in {kind}, relative error "
                f"{result.relative_error:.2e}{outputs}",
                node,
                weight.uses[0].role,
            )
        results.close()
        if activations is not None:
            activations.prepare(editor, [layer for layer, _ in done])
        for (weight, spec), result in done:
            factors = None if quantizer is None else quantizer.factors.get(weight.value)
            final = result if factors is None else result.scaled(factors, spec)
            lower(editor, Layer(weight, spec), final, self.accuracy_level, activations)
        if not chosen:
            ctx.note("no weight to quantize")
        statistics = tally.statistics()
        if quantizer is not None and self.method == "awq":
            statistics["activations scaled"] = quantizer.scaled
        return PassResult(changed=tally.layers > 0, statistics=statistics)

    def _quantizer(
        self, module: Module, chosen: list[Layer], ctx: PassContext
    ) -> LayerwiseQuantizer | None:
        from lwc.calibration.stages import data_values
        from lwc.passes.quantization.layerwise import LayerwiseQuantizer, activation_of

        if self.method == "rtn":
            return None
        layers = []
        values = data_values(module)
        for layer in chosen:
            own = activation_of(layer.weight) is not None and layer.weight.multiplies(values)
            if own and layer.weight.belongs_to(module.graph):
                layers.append(layer)
            else:
                ctx.note(
                    f"'{layer.weight.value.name}' is rounded to nearest: it is no weight of one "
                    "activation of the main graph",
                    layer.weight.uses[0].node,
                )
        if not layers:
            return None
        return LayerwiseQuantizer(module, layers, ctx, self.how)

    def _results(
        self, chosen: list[Layer], quantizer: LayerwiseQuantizer | None, ctx: PassContext
    ) -> Generator[tuple[Layer, QuantizedWeight | None, float | None]]:
        """Yield layers, what became of their weights, and the error of their outputs."""
        from lwc.core.weights import prefetch
        from lwc.passes.quantization.streaming import in_threads, packed, quantize

        plain = chosen
        if quantizer is not None:
            calibrated = {layer.weight.value for layer in quantizer.layers}
            plain = [layer for layer in chosen if layer.weight.value not in calibrated]
        results = in_threads(
            lambda layer: quantize(layer.weight.tensor, layer.spec),
            plain,
            upcoming=lambda layer: prefetch(layer.weight.tensor),
        )
        tracked = ctx.progress.track(results, "quantizing weights", len(plain))
        for layer, result in zip(plain, tracked, strict=True):
            yield layer, result, None
        for layer, made in quantizer.run() if quantizer is not None else ():
            if made is None:
                yield layer, None, None
                continue
            dtype = layer.weight.tensor.dtype.numpy()
            yield (
                layer,
                packed(made.rounded, layer.spec, dtype, made.weight_error),
                made.output_error,
            )

    def _for(
        self,
        weight: WeightUses,
        ctx: PassContext,
        editor: Editor,
        assigned: Mapping[ir.Value, Bits] | None,
    ) -> QuantizeWeights | str:
        """Return the pass with the format that suits a weight, or why it should stay as it is.

        Raises:
            PassError: The target is not measured.
        """
        from lwc.passes.quantization.kernel_choice import choose_operator

        if self.format != "auto":
            return self
        if weight.obstacle is not None or all(use.role == "Gather" for use in weight.uses):
            return replace(self, format="lwc")
        target = ctx.find_target()
        if target is None:
            raise PassError(
                "format=auto chooses by measured times, and this machine was not measured",
                remedy="a report with --measure measures it, or name a format",
            )
        bits = self._forms(editor, assigned).bits(weight)
        operator, objection = choose_operator(target, bits, *weight.extents)
        return objection if operator is None else replace(self, bits=bits, format=operator)
