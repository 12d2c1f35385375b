"""`quantize-kv-cache`: keys and values of earlier tokens in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lwc.pipeline.passes import Contract, Lossy, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.passes.quantization.cache_layers import Array, CacheLayer
    from lwc.rewrite.editor import Editor

__all__ = ["QuantizeKvCache"]


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Store the cache of fused attention as integers of 8 or 4 bits.

    Inputs `past_key_values.N.key`, `.value` and outputs `present.N.key`, `.value` become INT8
    `[batch, heads, past, size]`, or UINT8 `[batch, heads, past, size / 2]` that hold two codes of 4
    bits each. GroupQueryAttention rounds what it adds to the cache, and computes with what is
    stored. A scale is the largest magnitude of the calibration data over 127 or 7; larger ones are
    clipped. Keys are taken as the cache holds them, after their rotation. Needs calibration data,
    and a cache: run it after `add-kv-cache` and, if at all, after `pack-projections`.

    Attributes:
        bits: Bits of a number in the cache.
        scales: `channel` gives each channel of each head a scale of its own, `tensor` one to all
            keys of a layer and one to its values.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    contract: ClassVar[Contract] = Lossy(noise=0.1)
    positional: ClassVar[str | None] = "bits"

    bits: Literal[4, 8] = 8
    scales: Literal["channel", "tensor"] = "channel"

    @property
    def keeps_interface(self) -> bool:
        """The cache, which goes in and comes out, has another type."""
        return False

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.calibration.collect import collect
        from lwc.passes.quantization.cache_layers import Magnitudes, Rounding, find_layers, scales

        edit = ctx.editor()
        layers = find_layers(module, self.bits, ctx)
        if not layers:
            return PassResult(False)
        values = [value for layer in layers for value in layer.presents]
        largest = {value: Magnitudes() for value in values}
        collect(module, {value: (each,) for value, each in largest.items()}, ctx)
        chosen = {
            value: scales(each.value, self.bits, single=self.scales == "tensor")
            for value, each in largest.items()
        }
        # The second time over the data: an error is known once scales are.
        errors = {value: Rounding(chosen[value], self.bits) for value in values}
        collect(module, {value: (each,) for value, each in errors.items()}, ctx)
        done: list[CacheLayer] = []
        for layer in layers:
            if ctx.limit.exhausted:
                break
            ctx.limit.spend("cache", layer.node)
            key, value = layer.presents
            self._store(edit, layer, [chosen[key], chosen[value]])
            done.append(layer)
            ctx.applied(
                f"relative error of keys {errors[key].value:.2e}, of values "
                f"{errors[value].value:.2e}",
                layer.node,
                "cache",
            )
        ctx.analyses.invalidate()
        of_done = [errors[value].value for layer in done for value in layer.presents]
        before = sum(layer.bytes_per_token(layer.bits) for layer in done)
        after = sum(layer.bytes_per_token(self.bits) for layer in done)
        if done:
            ctx.note(f"{len(done)} layers, {before} bytes of cache per token became {after}")
        return PassResult(
            changed=bool(done),
            statistics={
                "layers": len(done),
                "cache bytes per token before": before,
                "cache bytes per token after": after,
                "mean relative error": sum(of_done) / max(len(of_done), 1),
                "worst relative error": max(of_done, default=0.0),
            },
        )

    def _store(self, edit: Editor, layer: CacheLayer, scales: list[Array]) -> None:
        """Let a layer keep integers."""
        import onnx_ir as ir

        from lwc.passes.quantization.cache_layers import SCALES

        node, kind = layer.node, ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8
        edit.at(node)
        node.resize_inputs(max(len(node.inputs), SCALES[-1] + 1))
        how = "PER_TENSOR" if self.scales == "tensor" else "PER_CHANNEL"
        for place, scale, what in zip(SCALES, scales, ("k", "v"), strict=True):
            edit.set_input(node, place, edit.constant(scale, f"{what}_scale"))
            node.attributes.add(ir.AttrString(f"{what}_quant_type", how))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", self.bits))
        for value in (*layer.pasts, *layer.presents):
            assert value.shape is not None
            value.type = ir.TensorType(kind)
            value.shape = ir.Shape([*value.shape[:3], layer.size * self.bits // 8])
