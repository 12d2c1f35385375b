"""Moving a factor per channel from an activation into the weights that read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.walk import constant_tensor
from lwc.core.weights import reading
from lwc.passes.quantization.channel_factors import (
    Divisible,
    Sharing,
    consumers,
    divisible,
    linear_consumers,
)
from lwc.passes.quantization.channel_places import Place
from lwc.passes.quantization.token_operators import is_linear
from lwc.rewrite import Miss, use_count
from lwc.rewrite.editor import Editor

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["Pair", "divide_by_product", "edits", "find_pairs", "put", "shared", "spread"]

Array = np.ndarray[Any, Any]


class Pair(NamedTuple):
    """An activation, what it is made of, and the weights that read it."""

    value: ir.Value
    source: Divisible
    weights: tuple[Place, ...]


def find_pairs(
    module: Module, edit: Editor, ctx: PassContext, *, products: bool = False
) -> Iterator[Pair]:
    """Yield activations of the main graph that linear layers read, where the division is legal.

    Args:
        module: The model.
        edit: Reads facts.
        ctx: Told of the others.
        products: Yield activations that no constants can divide too; see `divide_by_product`.
    """
    seen: set[ir.Value] = set()
    for node in module.graph:
        value = node.inputs[0] if node.inputs else None
        if value is None or value in seen or node.op_type not in ("MatMul", "Gemm"):
            continue
        seen.add(value)
        weights = consumers(value, edit)
        source = divisible(value, edit) if not isinstance(weights, Miss) else weights
        if products and isinstance(source, Miss):
            weights, source = linear_consumers(value, edit), Divisible((), "product")
        if isinstance(weights, Miss) or isinstance(source, Miss):
            miss = weights if isinstance(weights, Miss) else source
            assert isinstance(miss, Miss)
            if edit.is_constant(node.inputs[1]) or is_linear(node):
                ctx.missed(f"channels of '{value.name}' stay: {miss.reason}", miss.node or node)
            continue
        assert not isinstance(weights, Miss)
        yield Pair(value, source, weights)


def divide_by_product(edit: Editor, pair: Pair, factors: Array) -> None:
    """Let the layers of a pair read the activation times the reciprocals of factors.

    All else that reads the activation goes on as before.
    """
    nodes = {place.node for place in pair.weights}
    tensor = pair.weights[0].source.const_value
    assert tensor is not None
    edit.at(next(node for node in edit.module.graph if node in nodes))
    reciprocals = edit.constant((1 / factors).astype(tensor.dtype.numpy()), "divisors")
    divided = edit.op("Mul", [pair.value, reciprocals])
    for node in nodes:
        edit.set_input(node, 0, divided)


def shared(magnitudes: Array, sharing: Sharing | None) -> Array:
    """Take the largest of those that share a factor."""
    if sharing is None:
        return magnitudes
    largest: Array = magnitudes.reshape(sharing).max(axis=1).ravel()
    return largest


def spread(factors: Array, sharing: Sharing | None) -> Array:
    """Give each channel of the activation its factor."""
    if sharing is None:
        return factors
    grouped = factors.reshape(sharing.groups, 1, sharing.size)
    spread: Array = np.repeat(grouped, sharing.repeats, axis=1).ravel()
    return spread


def edits(pair: Pair, factors: Array) -> list[tuple[Place, Array]] | None:
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
    tensor = constant_tensor(place.source)
    assert tensor is not None
    along = np.moveaxis(factors.reshape(-1, *[1] * (len(place.shape) - 1)), 0, place.axis)
    with reading(tensor) as array, np.errstate(over="ignore"):
        scaled: Array = (array.astype(np.float64) * along).astype(array.dtype)
    return scaled if np.isfinite(scaled.astype(np.float32)).all() else None


def put(module: Module, place: Place, array: Array) -> None:
    """Let a node read another constant; where it is the only reader, under the same name."""
    name = place.source.name or "constant"
    tensor = module.spilled(ir.Tensor(array, name=name))
    alone = use_count(place.source) == 1 and not place.source.is_graph_output()
    if place.source.is_initializer() and alone:
        module.replace_initializer(place.source, tensor)
        return
    reader, operand = (place.steps[0], 0) if place.steps else (place.node, place.operand)
    reader.replace_input_with(operand, module.add_initializer(name, tensor))
