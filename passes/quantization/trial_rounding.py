"""One weight at a time rounded as a quantizer would round it, all others staying floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lwc.calibration.stages import Stages
from lwc.calibration.statistics import Gram
from lwc.passes.quantization.gptq import output_error
from lwc.passes.quantization.layerwise import activation_of, unit
from lwc.passes.quantization.weight_uses import matrix

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.passes.quantization.layerwise import RoundingMethod
    from lwc.passes.quantization.streaming import WeightSpec
    from lwc.passes.quantization.weight_uses import WeightUses
    from lwc.pipeline.passes import PassContext

__all__ = ["TrialRounding"]

Array: TypeAlias = "np.ndarray[Any, Any]"


class TrialRounding:
    """Rounds weights of the main graph, one after the other, for a trial.

    What a weight is multiplied with is brought up from the calibration data when its turn comes,
    and X·Xᵀ is kept until the last weight that shares it has been rounded.

    Args:
        module: The model; it is not changed.
        weights: What is rounded, in the order of their first use.
        ctx: Gives the calibration data and the runner.
        how: How it is rounded.
    """

    def __init__(
        self, module: Module, weights: Sequence[WeightUses], ctx: PassContext, how: RoundingMethod
    ) -> None:
        self._how = how
        found = [] if how.method == "rtn" else [activation_of(weight) for weight in weights]
        self._left = Counter(value for value in found if value is not None)
        self._stages = Stages(module, list(self._left), ctx) if self._left else None
        self._grams: dict[ir.Value, Array] = {}

    def round(self, weight: WeightUses, specs: Sequence[WeightSpec]) -> list[tuple[Array, float]]:
        """Return a weight as its codes will stand for it, in its own shape and type, by spec.

        Beside each is its squared error: of the layer's outputs on the calibration data where they
        decide about the rounding, else of the weight.
        """
        gram = self._gram(weight)
        made = []
        for spec in specs:
            plain = matrix(weight.tensor, spec.transposed)
            rounded = self._how.round(plain, gram, spec)
            values = rounded.values(spec.grid, spec.block_size or len(plain))
            off = values - plain.astype(np.float32, copy=False)
            known = gram.size and np.isfinite(gram).all()
            error = output_error(off, gram) if known else float(np.vdot(off, off))
            content = (values.T if spec.transposed else values).astype(plain.dtype)
            made.append((np.ascontiguousarray(content), error))
        return made

    def _gram(self, weight: WeightUses) -> Array:
        """Return X·Xᵀ of what a weight is multiplied with, in any unit; NaN where it is unknown."""
        value = activation_of(weight)
        if self._stages is None or value is None or not self._left[value]:
            return np.full((1, 1), np.nan)
        if value not in self._grams:
            statistic = Gram()
            for batch in self._stages.activations(value):
                statistic.update(batch)
            self._grams[value] = statistic.value / unit(statistic.value)
        self._left[value] -= 1
        return self._grams[value] if self._left[value] else self._grams.pop(value)
