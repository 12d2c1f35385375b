"""`smooth`: SmoothQuant's migration of outliers from activations into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lwc.core.errors import UsageError
from lwc.pipeline.passes import Contract, Exact, Pass, PassContext, PassResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.passes.quantization.channel_factors import Divisible, Place, Sharing
    from lwc.rewrite.editor import Editor

    Array = np.ndarray[Any, Any]

__all__ = ["Smooth"]

_LEAST = 1e-5
"""Scales and magnitudes count as at least this; as in SmoothQuant's own code."""

_SETTLED = 1e-3
"""Factors within this of 1 are left out: a second run on the same data finds nothing to do."""


class _Pair(NamedTuple):
    """An activation, what it is made of, and the weights that read it."""

    value: ir.Value
    source: Divisible
    weights: tuple[Place, ...]


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
        alpha: 0 evens out the weights, 1 the activations.
    """

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = Exact()
    positional: ClassVar[str | None] = "alpha"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha} does not lie between 0 and 1")

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """See the class."""
        from lwc.calibration.collect import collect
        from lwc.calibration.statistics import AbsMax

        edit = ctx.editor()
        pairs = list(_pairs(module, edit, ctx))
        if not pairs:
            ctx.note("no activation whose channels could be divided")
            return PassResult(changed=False)
        magnitudes = {pair.value: AbsMax() for pair in pairs}
        collect(module, {value: (each,) for value, each in magnitudes.items()}, ctx)
        done, strongest = 0, 1.0
        # From the back: a factor on the values or the up projection changes weights of the pair
        # before, and must be in when that one is looked at.
        for pair in reversed(pairs):
            if ctx.limit.exhausted:
                break
            factors = self._factors(pair, magnitudes[pair.value].value)
            place = pair.value.producer()
            if abs(factors - 1).max() <= _SETTLED:
                continue
            edits = _edits(pair, factors)
            if edits is None:
                ctx.missed(f"'{pair.value.name}' stays: a constant would overflow its type", place)
                continue
            ctx.limit.spend("smooth", place)
            for at, array in edits:
                _put(module, at, array)
            done += 1
            strongest = max(strongest, float(factors.max()))
            ctx.applied(
                f"'{pair.value.name}' divided by {factors.min():.3g} to {factors.max():.3g}, "
                f"in the {pair.source.kind} before it",
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

    def _factors(self, pair: _Pair, activations: Array) -> Array:
        """Return what each channel of the activation is divided by, float64 `[channels]`."""
        import numpy as np

        weights: Array = np.zeros(len(activations))
        for place in pair.weights:
            weights = np.maximum(weights, _row_magnitudes(place))
        tops = [
            _shared(each.astype(np.float64), pair.source.sharing) for each in (activations, weights)
        ]
        x, w = (np.maximum(each, _LEAST) for each in tops)
        factors = np.maximum(x**self.alpha / w ** (1 - self.alpha), _LEAST)
        factors[(tops[0] == 0) | (tops[1] == 0)] = 1.0  # a dead channel has no spread to move
        return _spread(factors, pair.source.sharing)


def _pairs(module: Module, edit: Editor, ctx: PassContext) -> Iterator[_Pair]:
    """Yield activations of the main graph that linear layers read, where the division is legal."""
    from lwc.passes.quantization.channel_factors import consumers, divisible
    from lwc.rewrite import Miss

    seen: set[ir.Value] = set()
    for node in module.graph:
        value = node.inputs[0] if node.inputs else None
        if value is None or value in seen or node.op_type not in ("MatMul", "Gemm"):
            continue
        seen.add(value)
        weights = consumers(value, edit)
        source = divisible(value, edit) if not isinstance(weights, Miss) else weights
        if isinstance(weights, Miss) or isinstance(source, Miss):
            miss = weights if isinstance(weights, Miss) else source
            assert isinstance(miss, Miss)
            if edit.is_constant(node.inputs[1]):
                ctx.missed(f"'{value.name}' stays: {miss.reason}", miss.node or node)
            continue
        yield _Pair(value, source, weights)


def _shared(magnitudes: Array, sharing: Sharing | None) -> Array:
    """Take the largest of those that share a factor."""
    if sharing is None:
        return magnitudes
    largest: Array = magnitudes.reshape(sharing).max(axis=1).ravel()
    return largest


def _spread(factors: Array, sharing: Sharing | None) -> Array:
    """Give each channel of the activation its factor."""
    import numpy as np

    if sharing is None:
        return factors
    grouped = factors.reshape(sharing.groups, 1, sharing.size)
    spread: Array = np.repeat(grouped, sharing.repeats, axis=1).ravel()
    return spread


def _row_magnitudes(place: Place) -> Array:
    import numpy as np

    from lwc.core.weights import reading

    tensor = place.value.const_value
    assert tensor is not None
    with reading(tensor) as array:
        found: Array = np.abs(array.astype(np.float32, copy=False)).max(axis=-3 - place.axis)
    return found


def _edits(pair: _Pair, factors: Array) -> list[tuple[Place, Array]] | None:
    """Return every constant of a pair with its new content; None where one would overflow."""
    made = []
    sharing = pair.source.sharing
    before = factors if sharing is None else factors.reshape(sharing)[:, 0].ravel()
    for place in pair.source.places:
        made.append((place, _scaled(place, 1 / before)))
    for place in pair.weights:
        made.append((place, _scaled(place, factors)))
    return None if any(array is None for _, array in made) else made  # type: ignore[return-value]


def _scaled(place: Place, factors: Array) -> Array | None:
    import numpy as np

    from lwc.core.walk import constant_tensor
    from lwc.core.weights import reading

    tensor = constant_tensor(place.value)
    assert tensor is not None
    along = factors if place.axis == -1 else factors[:, None]
    with reading(tensor) as array, np.errstate(over="ignore"):
        scaled: Array = (array.astype(np.float64) * along).astype(array.dtype)
    return scaled if np.isfinite(scaled.astype(np.float32)).all() else None


_SPILLED = 1 << 16
"""Bytes from which a new constant goes to the module's spill file."""


def _put(module: Module, place: Place, array: Array) -> None:
    """Let a node read another constant; where it is the only reader, under the same name."""
    import onnx_ir as ir

    from lwc.rewrite import use_count

    name = place.value.name or "constant"
    tensor: ir.TensorProtocol = ir.Tensor(array, name=name)
    if array.nbytes >= _SPILLED:
        tensor = module.store.put_tensor(tensor)
    if place.value.is_initializer() and use_count(place.value) == 1:
        module.replace_initializer(place.value, tensor)
        return
    fresh = module.add_initializer(name, tensor)
    place.node.replace_input_with(place.operand, fresh)
