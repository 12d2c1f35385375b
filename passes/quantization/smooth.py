"""`smooth`: SmoothQuant's migration of outliers from activations into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lwc.core.errors import UsageError
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

if TYPE_CHECKING:
    import numpy as np

    from lwc.core.module import Module
    from lwc.passes.quantization.channel_places import Place
    from lwc.passes.quantization.migration import Pair

    Array = np.ndarray[Any, Any]

__all__ = ["Smooth"]

_LEAST = 1e-5
"""Scales and magnitudes count as at least this; as in SmoothQuant's own code."""

_WHERE = {
    "norm": "in the norm before it",
    "linear": "in the linear before it",
    "product": "by a product of its own",
}

_SETTLED = 1e-3
"""Factors within this of 1 are left out: a second run on the same data finds nothing to do."""


@dataclass(frozen=True)
class Smooth(Pass):
    """Move the spread of activations' channels into the weights behind them.

    Each channel j of an activation X that only linear layers read is divided by s_j =
    max|X_j|^alpha / max|W_j|^(1 - alpha), and row j of their weights W is multiplied by it (Xiao et
    al. 2023, SmoothQuant). The division goes into constants: scale and bias of the norm before,
    the output channels of the values before attention, or of the up projection before a gate.
    Needs calibration data. Run it after fuse-norm and fuse-attention, and before
    pack-projections and add-kv-cache.

    Attributes:
        alpha: 0 evens out the weights, 1 the activations. `auto` takes for each activation the one
            of 0, 0.05, ... 1 with which the outputs of the layers behind it change least, in the
            sum of squares, when activations are rounded to int8 per token and weights per output;
            it looks at 512 rows of the calibration data. Where none gains, the activation stays.
        products: Where no constant before an activation can take the division, or something else
            reads it too, as in post-norm models, let a product with constants divide it before the
            layers. That is an operator more when the model runs.
    """

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = Exact()
    positional: ClassVar[str | None] = "alpha"

    alpha: float | Literal["auto"] = 0.5
    products: bool = False

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha} does not lie between 0 and 1")

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.calibration.collect import collect
        from lwc.calibration.statistics import AbsMax, Sample
        from lwc.passes.quantization.migration import divide_by_product, edits, find_pairs, put
        from lwc.passes.quantization.smooth_search import ROWS

        edit = ctx.editor()
        pairs = list(find_pairs(module, edit, ctx, products=self.products))
        if not pairs:
            ctx.note("no activation whose channels could be divided")
            return PassResult(changed=False)
        magnitudes = {pair.value: AbsMax() for pair in pairs}
        samples = {pair.value: Sample(ROWS, ctx.seed) for pair in pairs if self.alpha == "auto"}
        collect(
            module,
            {value: (each, samples[value]) if samples else (each,)
             for value, each in magnitudes.items()},
            ctx,
        )  # fmt: skip
        done, strongest = 0, 1.0
        # From the back: a factor on the values or the up projection changes weights of the pair
        # before, and must be in when that one is looked at.
        for pair in reversed(pairs):
            if ctx.limit.exhausted:
                break
            sample = samples[pair.value].value if samples else None
            factors, gain = self._chosen(pair, magnitudes[pair.value].value, sample)
            place = pair.value.producer()
            if abs(factors - 1).max() <= _SETTLED:
                continue
            made = edits(pair, factors)
            if made is None:
                ctx.missed(f"'{pair.value.name}' stays: a constant would overflow its type", place)
                continue
            ctx.limit.spend("smooth", place)
            for at, array in made:
                put(module, at, array)
            if pair.source.kind == "product":
                divide_by_product(edit, pair, factors)
            done += 1
            strongest = max(strongest, float(factors.max()))
            ctx.applied(
                f"'{pair.value.name}' divided by {factors.min():.3g} to {factors.max():.3g}, "
                f"{_WHERE[pair.source.kind]}{gain}",
                place,
                "smooth",
            )
        if not done:
            ctx.note("all activations are as smooth as alpha asks for")
        return PassResult(
            changed=done > 0,
            statistics={
                "pairs found": len(pairs), "pairs smoothed": done, "largest factor": strongest
            },
        )  # fmt: skip

    def _chosen(self, pair: Pair, tops: Array, sample: Array | None) -> tuple[Array, str]:
        """Return what each channel is divided by, float64 `[channels]`, and what is said of it."""
        from lwc.passes.quantization.smooth_search import search

        weights = _largest_rows(pair)
        if sample is None or self.alpha != "auto":
            assert self.alpha != "auto"
            return _factors(pair, tops, weights, self.alpha), ""
        found = search(sample, pair.weights, lambda alpha: _factors(pair, tops, weights, alpha))
        return (
            found.factors,
            f"; alpha={found.alpha}, int8 error {found.error**0.5:.2f} of what it was",
        )


def _largest_rows(pair: Pair) -> Array:
    """Return the largest magnitude of each input over all weights of a pair, `[channels]`."""
    import numpy as np

    found: Array = np.max([_row_magnitudes(place) for place in pair.weights], axis=0)
    return found


def _factors(pair: Pair, activations: Array, weights: Array, alpha: float) -> Array:
    """Return what each channel of the activation is divided by, float64 `[channels]`.

    Args:
        pair: The activation and its weights.
        activations: Largest magnitude of each channel.
        weights: The same of the weights' rows.
        alpha: The power.
    """
    import numpy as np

    from lwc.passes.quantization.migration import shared, spread

    tops = [shared(each.astype(np.float64), pair.source.sharing) for each in (activations, weights)]
    x, w = (np.maximum(each, _LEAST) for each in tops)
    factors: Array = np.maximum(x**alpha / w ** (1 - alpha), _LEAST)
    # A dead channel has no spread to move.
    factors[(tops[0] < _LEAST) | (tops[1] < _LEAST)] = 1.0
    if pair.source.kind == "linear" and _is_half(pair):
        # What lies between the constants and the activation must not grow beyond its type.
        factors = np.maximum(factors, 1.0)
    return spread(factors, pair.source.sharing)


def _is_half(pair: Pair) -> bool:
    import onnx_ir as ir

    return any(place.source.dtype == ir.DataType.FLOAT16 for place in pair.source.places)


def _row_magnitudes(place: Place) -> Array:
    import numpy as np

    from lwc.core.weights import reading

    tensor = place.source.const_value
    assert tensor is not None
    with reading(tensor) as array:
        found: Array = np.abs(array.astype(np.float32, copy=False)).max(axis=1 - place.axis)
    return found
