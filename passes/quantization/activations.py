"""What becomes of the activations that quantized weights are multiplied with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.calibration.stages import data_values
from lwc.calibration.statistics import Sample, Statistic
from lwc.core.walk import runtime_values
from lwc.passes.quantization.int8_rounding import per_tensor, per_token, relative_error, static
from lwc.passes.quantization.layerwise import Layer, activation_of
from lwc.passes.quantization.lowering import PackedWeight, lower_per_tensor, lower_to_standard
from lwc.passes.quantization.streaming import QuantizedWeight
from lwc.passes.quantization.weight_uses import matrix
from lwc.rewrite.editor import Editor

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = [
    "Activations",
    "PerTensor",
    "Static",
    "first_readers",
    "measured",
    "observe",
    "seen",
    "step_as_stored",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

_ROWS = 256
"""Rows of each activation on which errors of outputs are measured."""

_FEEDS = 8
"""Feeds they are taken from, where nothing else is asked about all of the data."""


def measured(module: Module, layers: Iterable[Layer]) -> list[ir.Value]:
    """Return the activations of layers that calibration can see: those of the main graph."""
    seen = [layer for layer in layers if layer.weight.read_in(module.graph)]
    uses = [use for layer in seen for use in layer.weight.uses if use.role != "Gather"]
    inputs = {use.node.inputs[0] for use in uses}
    return [value for value in runtime_values(module.graph) if value in inputs]


def observe(
    module: Module,
    values: Sequence[ir.Value],
    ctx: PassContext,
    statistics: Mapping[ir.Value, Statistic],
) -> dict[ir.Value, Array]:
    """Run the calibration data; return some rows of activations, float32 `[rows, channels]`.

    Args:
        module: The model.
        values: The activations.
        ctx: Gives the data and the runner.
        statistics: What else is to be known of activations.
    """
    from lwc.calibration.collect import collect

    samples = {value: Sample(_ROWS, ctx.seed) for value in values}
    wanted = {
        value: (sample, statistics[value]) if value in statistics else (sample,)
        for value, sample in samples.items()
    }
    given = ctx.calibration
    if given is not None and not statistics:
        ctx = replace(ctx, calibration=lambda module: itertools.islice(given(module), _FEEDS))
    collect(module, wanted, ctx)
    return {value: sample.value for value, sample in samples.items()}


class Activations:
    """Activations that the operator of the product rounds itself, each token with its own scale.

    Args:
        samples: Rows of activations, float32 `[rows, channels]`, on which errors are measured;
            none where there is no calibration data.
    """

    def __init__(self, samples: Mapping[ir.Value, Array]) -> None:
        self._samples = samples

    def rounded(self, value: ir.Value, x: Array) -> Array:
        """Return rows of an activation as the product sees them."""
        return per_token(x)

    def output_error(self, layer: Layer, result: QuantizedWeight) -> float | None:
        """Return the relative error of a layer's outputs; None where its activation is not known.

        It has the rounding of both, and is the Frobenius norm of the change over that of the
        outputs, without what is added to them.
        """
        value = activation_of(layer.weight)
        x = None if value is None else self._samples.get(value)
        if value is None or x is None or layer.spec.layout not in ("qdq", "tiles"):
            return None
        wanted = x @ matrix(layer.weight.tensor, layer.spec.transposed, np.float32)
        found = self.rounded(value, x) @ result.values(layer.spec, layer.weight.extents)
        return relative_error(found, wanted)

    def prepare(self, editor: Editor, layers: Sequence[Layer]) -> None:
        """Add what all layers need, before the first of them is lowered."""

    def lower(self, editor: Editor, layer: Layer, packed: PackedWeight) -> bool:
        """Lower a layer, if this needs another form than that of its weight; tell whether it did.

        It may also change what the layer reads.
        """
        return False


class PerTensor(Activations):
    """Activations that DynamicQuantizeMatMul rounds, the whole tensor with one scale."""

    def rounded(self, value: ir.Value, x: Array) -> Array:
        """See `Activations`; the scale is that of the sample."""
        return per_tensor(x)

    def lower(self, editor: Editor, layer: Layer, packed: PackedWeight) -> bool:
        """See `Activations`."""
        if layer.spec.layout != "qdq":
            return False
        lower_per_tensor(editor, layer.weight, packed)
        return True


class Static(Activations):
    """Activations that QuantizeLinear rounds to int8, with a scale known beforehand.

    The zero point is 0, which every runtime takes.

    Args:
        samples: See `Activations`.
        steps: The scale of each activation; see `step_as_stored`.
    """

    def __init__(self, samples: Mapping[ir.Value, Array], steps: Mapping[ir.Value, float]) -> None:
        super().__init__(samples)
        self._steps = steps
        self._made: dict[ir.Value, ir.Value] = {}

    def rounded(self, value: ir.Value, x: Array) -> Array:
        """See `Activations`."""
        return static(x, self._steps[value])

    def prepare(self, editor: Editor, layers: Sequence[Layer]) -> None:
        """Put QuantizeLinear and DequantizeLinear behind every activation that is read."""
        # The operands of a product have one type.
        types = {use.node: layer.weight.tensor.dtype.numpy()
                 for layer in layers for use in layer.weight.uses}  # fmt: skip
        for value, node in first_readers(editor.module, layers).items():
            editor.at(node)
            scale = editor.constant(np.array(self._steps[value], types[node]), "activation_scale")
            zero = editor.constant(np.array(0, np.int8), "activation_zero_point")
            codes = editor.op("QuantizeLinear", [value, scale, zero])
            self._made[value] = editor.op("DequantizeLinear", [codes, scale, zero])

    def lower(self, editor: Editor, layer: Layer, packed: PackedWeight) -> bool:
        """See `Activations`."""
        for use in layer.weight.uses:
            value = use.node.inputs[0]
            assert value is not None
            editor.set_input(use.node, 0, self._made[value])
        # Left out they are 0 as well, but ONNX Runtime may turn codes into uint8, and fails then.
        zeros = editor.constant(np.zeros(packed.outputs, np.int8), "zero_points")
        lower_to_standard(editor, layer.weight, replace(packed, zero_points=zeros))
        return True


def step_as_stored(step: float, kind: ir.DataType) -> float:
    """Return a scale in the type of its activation, at least the smallest number above zero.

    That one loses nothing: all numbers of the type are its multiples.
    """
    number = kind.numpy().type
    return max(float(number(step)), float(np.nextafter(number(0), number(1))))


def first_readers(module: Module, layers: Iterable[Layer]) -> dict[ir.Value, ir.Node]:
    """Return the activations of layers, each with the first of them that reads it."""
    nodes = {use.node for layer in layers for use in layer.weight.uses}
    found: dict[ir.Value, ir.Node] = {}
    for node in module.graph:
        if node in nodes and node.inputs[0] is not None:
            found.setdefault(node.inputs[0], node)
    return found


def seen(layers: Iterable[Layer], module: Module, ctx: PassContext) -> list[Layer]:
    """Return the layers whose activations calibration sees; remarks say why others stay."""
    kept = []
    values = data_values(module)
    for layer in layers:
        weight = layer.weight
        if not weight.read_in(module.graph):
            reason = "it belongs to a subgraph, where calibration sees no activations"
        elif not weight.multiplies(values):
            reason = "it multiplies a constant, of which calibration data says nothing"
        else:
            kept.append(layer)
            continue
        ctx.missed(f"'{weight.value.name}' stays: {reason}", weight.uses[0].node)
    return kept
