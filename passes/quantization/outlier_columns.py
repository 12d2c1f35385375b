"""Linear layers some of whose inputs stay in floating point beside the product in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.walk import op_name
from lwc.passes.quantization.activations import Activations, first_readers
from lwc.passes.quantization.dialect_ops import MATMUL
from lwc.passes.quantization.int8_rounding import relative_error
from lwc.passes.quantization.layerwise import Layer, activation_of
from lwc.passes.quantization.lowering import PackedWeight, lower_to_dialect
from lwc.passes.quantization.streaming import QuantizedWeight
from lwc.passes.quantization.weight_uses import WeightUse, WeightUses, matrix
from lwc.rewrite.editor import Editor, attribute, producer_of

__all__ = ["Columns", "OutlierColumns", "columns_of", "is_outlier_part"]

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Columns:
    """Which inputs of a layer stay in floating point.

    Attributes:
        channels: bool `[inputs]`.
        whole: The weight.
        rest: The weight with their rows zero.
        transposed: Whether the weight lies as `[outputs, inputs]`.
    """

    channels: Array
    whole: WeightUses
    rest: WeightUses
    transposed: bool

    def rows(self) -> Array:
        """Return the weight's rows of these inputs, float32 `[channels, outputs]`."""
        return matrix(self.whole.tensor, self.transposed, np.float32)[self.channels]


def columns_of(layer: Layer, tops: Sequence[Array], threshold: float) -> Columns:
    """Say which inputs reach a threshold in any of the activations that a weight is read with.

    Args:
        layer: The layer.
        tops: Largest magnitude of each channel, one array for each activation; none of them where
            no channel is to be looked at.
        threshold: The magnitude.
    """
    weight, transposed = layer.weight, layer.spec.transposed
    channels = np.zeros(weight.extents[0], bool)
    for each in tops:
        channels |= each >= threshold
    rest = weight
    if channels.any() and not channels.all():

        def zeroed() -> ir.TensorProtocol:
            made = matrix(weight.tensor, transposed, np.float32)
            made[channels] = 0
            return ir.Tensor(np.ascontiguousarray(made.T if transposed else made))

        # Made when it is read: not all layers at once.
        shape = ir.Shape(weight.tensor.shape.numpy())
        rest = replace(weight, tensor=ir.LazyTensor(zeroed, dtype=weight.tensor.dtype, shape=shape))
    return Columns(channels, weight, rest, transposed)


def is_outlier_part(use: WeightUse, editor: Editor) -> bool:
    """Tell whether a product is of the channels that an int8 product beside it sees as zeros.

    So `OutlierColumns` writes them: a Gather of an activation, and a Where on it.
    """
    gather = producer_of(use.node.inputs[0], "Gather") if use.role == "MatMul" else None
    if gather is None:
        return False
    value, where = gather.inputs
    channels = editor.tensor(where)
    rank = editor.rank(value)
    axis = attribute(gather, "axis", 0)
    if value is None or channels is None or axis not in (-1, None if rank is None else rank - 1):
        return False
    return any(
        node.op_type == "Where"
        and index == 2
        and (mask := editor.tensor(node.inputs[0])) is not None
        and np.array_equal(np.flatnonzero(mask.numpy()), channels.numpy())
        and _feeds_int8(node.outputs[0])
        for node, index in value.uses()
    )


def _feeds_int8(value: ir.Value) -> bool:
    """Tell whether an int8 product reads a value, through a Cast at most."""
    readers = [reader for reader, _ in value.uses()]
    behind = [
        use.node for each in readers if each.op_type == "Cast" for use in each.outputs[0].uses()
    ]
    return any(op_name(reader) == MATMUL for reader in (*readers, *behind))


class OutlierColumns(Activations):
    """Activations whose outlier channels go around the product in int8.

    Args:
        samples: See `Activations`.
        columns: The layers that have such channels, by the weight's value.
    """

    def __init__(
        self, samples: Mapping[ir.Value, Array], columns: Mapping[ir.Value, Columns]
    ) -> None:
        super().__init__(samples)
        self._columns = columns
        self._parts: dict[tuple[ir.Value, bytes], tuple[ir.Value, ir.Value]] = {}

    def output_error(self, layer: Layer, result: QuantizedWeight) -> float | None:
        """See `Activations`."""
        columns = self._columns.get(layer.weight.value)
        value = activation_of(layer.weight)
        if columns is None or value is None:
            return super().output_error(layer, result)
        x = self._samples[value]
        rest = np.where(columns.channels, np.float32(0), x)
        found = self.rounded(value, rest) @ result.values(layer.spec, layer.weight.extents)
        found += x[:, columns.channels] @ columns.rows()
        whole = matrix(columns.whole.tensor, columns.transposed, np.float32)
        return relative_error(found, x @ whole)

    def prepare(self, editor: Editor, layers: Sequence[Layer]) -> None:
        """Split every activation whose outlier channels some layer leaves in floating point."""
        readers = first_readers(editor.module, layers)
        for layer in layers:
            columns = self._columns.get(layer.weight.value)
            for use in layer.weight.uses if columns is not None else ():
                value = use.node.inputs[0]
                assert columns is not None
                assert value is not None
                key = value, columns.channels.tobytes()
                if key not in self._parts:
                    editor.at(readers[value])
                    self._parts[key] = _split(editor, value, columns.channels)

    def lower(self, editor: Editor, layer: Layer, packed: PackedWeight) -> bool:
        """See `Activations`."""
        columns = self._columns.get(layer.weight.value)
        if columns is None:
            return False
        outliers: dict[ir.Node, ir.Value] = {}
        for use in layer.weight.uses:
            value = use.node.inputs[0]
            assert value is not None
            large, rest = self._parts[value, columns.channels.tobytes()]
            outliers[use.node] = large
            editor.set_input(use.node, 0, rest)
        weights: dict[float, ir.Value] = {}

        def beside(use: WeightUse) -> ir.Value:
            alpha = attribute(use.node, "alpha", 1.0) if use.role == "Gemm" else 1.0
            if alpha not in weights:
                rows = (columns.rows() * np.float32(alpha)).astype(np.float32)
                name = f"{layer.weight.value.name}_outliers"
                tensor = editor.module.spilled(ir.Tensor(rows))
                weights[alpha] = editor.module.add_initializer(name, tensor)
            return editor.op("MatMul", [outliers[use.node], weights[alpha]])

        lower_to_dialect(editor, layer.weight, packed, beside)
        return True


def _split(editor: Editor, value: ir.Value, channels: Array) -> tuple[ir.Value, ir.Value]:
    """Return some channels of an activation, and the activation with zeros in their place.

    By Where and not by a product with zeros, which would keep infinities.
    """
    where = editor.constant(np.flatnonzero(channels).astype(np.int64), "outlier_channels")
    large = editor.op("Gather", [value, where], {"axis": -1})
    mask = editor.constant(channels, "is_outlier")
    zero = editor.constant(np.array(0, np.float32), "zero")
    return large, editor.op("Where", [mask, zero, value])
