"""Quantizing layer after layer on calibration data, each with the inputs that earlier ones leave.

Layers that read one activation are a group, and share what is known of it. A group's weights are
rounded and put back as floats before the next group's activation is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.calibration.checkpoint import Entry, Trail
from lwc.calibration.stages import Stages
from lwc.calibration.statistics import Gram, MeanAbs, Statistic
from lwc.passes.quantization.awq import clipped, input_factors
from lwc.passes.quantization.gptq import Rounded, gptq, output_error, round_to_nearest
from lwc.passes.quantization.migration import Pair, edits, find_pairs, put, shared, spread
from lwc.passes.quantization.rounding import LARGEST
from lwc.passes.quantization.streaming import WeightSpec
from lwc.passes.quantization.weight_uses import WeightUses, matrix

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["Layer", "LayerResult", "LayerwiseQuantizer", "RoundingMethod", "activation_of", "unit"]

Array: TypeAlias = "np.ndarray[Any, Any]"


class Layer(NamedTuple):
    """A weight to quantize, and how."""

    weight: WeightUses
    spec: WeightSpec


class RoundingMethod(NamedTuple):
    """How weights are rounded, given what they are multiplied with.

    Attributes:
        method: `rtn` needs no activations; of `awq` only the clipping is meant.
        damping: Of GPTQ.
        by_activation: Whether GPTQ rounds inputs of large activations first.
    """

    method: Literal["rtn", "gptq", "awq"]
    damping: float = 0.01
    by_activation: bool = False

    def round(self, weights: Array, gram: Array, spec: WeightSpec) -> Rounded:
        """Round weights `[inputs, outputs]`, to nearest where `gram`, X·Xᵀ, is not finite."""
        size = spec.block_size or len(weights)
        if self.method == "rtn" or not np.isfinite(gram).all():
            return round_to_nearest(weights, spec.grid, size)
        if self.method == "awq":
            return clipped(weights, gram, spec.grid, size)
        return gptq(
            weights, gram, spec.grid, size,
            damping=self.damping, by_activation=self.by_activation,
        )  # fmt: skip


@dataclass(frozen=True)
class LayerResult:
    """A layer's weight on its grid.

    Attributes:
        rounded: Codes, scales and zero points.
        weight_error: Frobenius norm of the weight's change over that of the weight.
        output_error: The same of the layer's outputs on the calibration data; None where sums of
            squares of its activation are beyond float32, and the layer is rounded to nearest.
    """

    rounded: Rounded
    weight_error: float
    output_error: float | None


def activation_of(weight: WeightUses) -> ir.Value | None:
    """Return what a weight is multiplied with, if that is one value and no table is looked up."""
    read = {use.node.inputs[0] for use in weight.uses}
    if len(read) != 1 or any(use.role == "Gather" for use in weight.uses):
        return None
    return read.pop()


class LayerwiseQuantizer:
    """Rounds layers one after the other by GPTQ or AWQ.

    The checkpoint of the context keeps each result; what is there already is not computed again.

    Args:
        module: The model.
        layers: Weights of the main graph, each with one activation; see `activation_of`.
        ctx: Gives the calibration data and the runner.
        how: How they are rounded; AWQ scales inputs too, where the factor can go into what makes
            the activation.

    Attributes:
        layers: The layers.
        factors: What the outputs of a weight must still be multiplied by, `[outputs]`, after it
            was yielded: AWQ scales inputs of the layer behind it.
        scaled: Activations whose channels AWQ scaled.
    """

    def __init__(
        self,
        module: Module,
        layers: Sequence[Layer],
        ctx: PassContext,
        how: RoundingMethod,
    ) -> None:
        self.layers = tuple(layers)
        self._module = module
        self._ctx = ctx
        self._how = how
        self._groups: dict[ir.Value, list[Layer]] = {}
        for layer in layers:
            value = activation_of(layer.weight)
            assert value is not None
            self._groups.setdefault(value, []).append(layer)
        self._pairs: dict[ir.Value, Pair] = {}
        if how.method == "awq":
            found = find_pairs(module, ctx.editor(), ctx)
            self._pairs = {pair.value: pair for pair in found}
        self.factors: dict[ir.Value, Array] = {}
        self.scaled = 0

    def run(self) -> Iterator[tuple[Layer, LayerResult | None]]:
        """Yield the layers on their grids, in the order of the graph; None for weights that are not
        rounded.

        While this runs, weights that were yielded hold the values of their grids.

        Raises:
            UsageError: There is no calibration data.
            PassError: There is no backend.
            InputError: The data has no feeds, or an activation is not finite.
        """
        stages = Stages(self._module, list(self._groups), self._ctx)
        count = sum(map(len, self._groups.values()))
        groups = self._groups.items()
        layers = [(layer.weight.value.name, layer.spec) for layer in self.layers]
        how = (*self._how, layers)
        trail = Trail.begin(self._ctx, self._module, stages.fed, how)
        # Where something is missing, every stage is run, with the weights and the divisions of an
        # uninterrupted run: what is not read from disk comes out the same to the last bit.
        finished = trail.reaches(self._steps())
        for value, group in self._ctx.progress.track(
            groups, f"quantizing {count} layers by {self._how.method}", len(groups)
        ):
            yield from self._quantize(value, group, None if finished else stages, trail)
            trail.advance()

    def _steps(self) -> Iterator[list[tuple[str, str]]]:
        """Yield what is kept, step by step, by kind and name: of each group factors, then layers.

        A layer is rounded with the factors of its group.
        """
        for value, group in self._groups.items():
            yield [("factors", value.name or "")] if value in self._pairs else []
            yield [("layers", layer.weight.value.name or "") for layer in group]

    def _quantize(
        self, value: ir.Value, group: list[Layer], stages: Stages | None, trail: Trail
    ) -> Iterator[tuple[Layer, LayerResult | None]]:
        """Yield the layers of a group, computed or as they are kept.

        Without stages no activation is computed: all is kept.
        """
        name, names = value.name or "", [layer.weight.value.name or "" for layer in group]

        def find_layers() -> list[Entry | None]:
            trail.advance()
            return [trail.get("layers", each) for each in names]

        pair = self._pairs.get(value)
        scaling = {} if pair is None else trail.get("factors", name)
        kept = [None] if scaling is None else find_layers()
        gram, means = Gram(), MeanAbs()
        wanted: tuple[Statistic, ...] = (gram,) if self._how.method == "gptq" else (gram, means)
        wanted = wanted if None in kept else ()
        for batch in stages.activations(value) if stages is not None else ():
            for statistic in wanted:
                statistic.update(batch)
        products, factors = gram.value, None
        products = products / unit(products)
        if pair is not None:
            if scaling is None:
                found = self._factors(pair, group, products, means.value)
                scaling = trail.put("factors", name, {} if found is None else {"factors": found})
                kept = find_layers()
            factors = self._scale(pair, scaling["factors"]) if scaling else None
        if factors is not None:
            if stages is not None:
                stages.divide(value, factors)
            if wanted:
                products = products / np.outer(factors, factors)
        for layer, each, entry in zip(group, names, kept, strict=True):
            made = entry
            if made is None:
                made = trail.put("layers", each, self._rounded(layer, products))
            yield layer, self._put_back(layer, made)

    def _factors(self, pair: Pair, group: list[Layer], gram: Array, means: Array) -> Array | None:
        """Return the best factors of the inputs of a group of layers, or None."""
        read = {use.node for layer in group for use in layer.weight.uses}
        if {place.node for place in pair.weights} != read:
            return None  # some layer behind the activation keeps its weights
        if not np.isfinite(gram).all():
            return None
        sharing = pair.source.sharing
        matrices = [_present(layer) for layer in group]
        if not all(map(_roundable, matrices)):
            return None
        sizes = [layer.spec.block_size or len(m) for layer, m in zip(group, matrices, strict=True)]
        alike = spread(shared(means, sharing), sharing)
        return input_factors(matrices, gram, alike, group[0].spec.grid, sizes)

    def _scale(self, pair: Pair, factors: Array) -> Array | None:
        """Scale the inputs of a group of layers; return what their activation is divided by.

        None where they stay as they are.
        """
        sharing = pair.source.sharing
        made = edits(pair, factors)
        if made is None or np.all(factors == 1):
            return None
        for place, array in made:
            put(self._module, place, array)
        once = factors if sharing is None else factors.reshape(sharing)[:, 0].ravel()
        for place in pair.source.places:
            if place.operand == 1 and place.node.op_type in ("MatMul", "Gemm"):
                before = self.factors.get(place.source, np.ones(len(once)))
                self.factors[place.source] = before / once
        self.scaled += 1
        return factors

    def _rounded(self, layer: Layer, gram: Array) -> Entry:
        """Return what makes the layer's result; nothing for weights that are not rounded."""
        spec = layer.spec
        weights = _present(layer)
        if not _roundable(weights):
            return {}
        size = spec.block_size or len(weights)
        known = bool(np.isfinite(gram).all())
        rounded = self._how.round(weights, gram, spec)
        scale = np.float32(unit(weights))
        plain = weights.astype(np.float32) / scale
        difference = plain - rounded.values(spec.grid, size) / scale
        errors = (
            _ratio(float(np.vdot(difference, difference)), float(np.vdot(plain, plain))),
            _ratio(output_error(difference, gram), output_error(plain, gram)) if known else np.nan,
        )
        return {**rounded._asdict(), "errors": np.asarray(errors)}

    def _put_back(self, layer: Layer, entry: Entry) -> LayerResult | None:
        """Let the layer's weight hold the values of its grid."""
        if not entry:
            return None
        weight, spec = layer
        rounded = Rounded(**{name: entry[name] for name in Rounded._fields})
        values = rounded.values(spec.grid, spec.block_size or len(rounded.codes))
        values = values.T if spec.transposed else values
        tensor = ir.Tensor(np.ascontiguousarray(values.astype(weight.tensor.dtype.numpy())))
        self._module.replace_initializer(weight.value, self._module.spilled(tensor))
        weight_error, output_error = map(float, entry["errors"])
        if np.isnan(output_error):
            value = activation_of(weight)
            self._ctx.note(
                f"'{weight.value.name}' is rounded to nearest: sums of squares of "
                f"'{value.name if value else ''}' over the calibration data are beyond float32",
                weight.uses[0].node,
            )
        return LayerResult(rounded, weight_error, None if np.isnan(output_error) else output_error)


def _present(layer: Layer) -> Array:
    """Return the weight as it is now, `[inputs, outputs]`."""
    tensor = layer.weight.value.const_value
    assert tensor is not None
    return matrix(tensor, layer.spec.transposed)


def _roundable(weights: Array) -> bool:
    return bool((np.abs(weights) < LARGEST).all())


def unit(array: Array) -> float:
    """Return the power of two near the largest magnitude, 1 where that is zero or not finite.

    In that unit float32 holds the squares, and the digits stay.
    """
    largest = float(np.abs(array).max(initial=0.0))
    return math.ldexp(1.0, math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def _ratio(change: float, whole: float) -> float:
    """Return the root of a quotient of squares; 0 where there is nothing to change."""
    return float(np.sqrt(max(change, 0.0) / whole)) if whole > 0 else 0.0
