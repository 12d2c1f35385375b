"""What `recover` trains of a module, and what of that must stay zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.diagnostics import describe
from lwc.core.errors import PassError
from lwc.core.walk import constant_tensor, op_name
from lwc.core.weights import reading
from lwc.passes.quantization.weight_uses import find_weights
from lwc.passes.training.adding import add_adapters
from lwc.passes.training.low_rank import Adapter, Factor, factor_of, find_adapters

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["Trainable", "adapters_to_train", "weights_to_train"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_SCATTERED = 0.25
"""Share of zeros, outside of rows and columns of them, from which a weight counts as pruned: what
was stored in 4 bits is 0 in an eighth of the places."""

_ALL = np.ones((1, 1), np.bool_)
"""The mask of what may be anything everywhere."""


@dataclass(frozen=True)
class Trainable:
    """A weight that is trained.

    Attributes:
        value: The initializer; others may share its tensor, which is trained once.
        mask: 0 where it is to be 0, broadcast against it; None where it may be anything.
    """

    value: ir.Value
    mask: Array | None = None


def weights_to_train(module: Module, ctx: PassContext, keep_zeros: bool) -> list[Trainable]:
    """Return the weights of MatMul, Gemm and Conv in the main graph that are initializers.

    A remark names other constants.

    Raises:
        PassError: One is not of float32 or double.
    """
    found: dict[ir.Value, None] = {}
    elsewhere: set[ir.Value] = set()
    for weight in find_weights(module):
        linear = any(use.role != "Gather" for use in weight.uses)
        rows, *_ = weight.extents if len(weight.tensor.shape) == 2 else weight.tensor.shape.numpy()
        # What multiplies a single number is a table of angles or the like.
        if linear and rows > 1:
            found[weight.value] = None
            if not weight.belongs_to(module.graph):
                elsewhere.add(weight.value)
    for node in module.graph:
        if op_name(node) in ("Conv", "ConvTranspose") and node.inputs[1] is not None:
            found[node.inputs[1]] = None
    chosen = []
    for value in found:
        tensor = constant_tensor(value)
        if tensor is None:
            continue
        if value in elsewhere or not value.is_initializer() or value.graph is not module.graph:
            ctx.missed(
                f"'{value.name}' is not trained: it is no initializer that the main graph alone "
                "reads (canonicalize makes initializers of Constants)"
            )
            continue
        _check_type(f"'{value.name}' is", tensor)
        mask = None
        if keep_zeros:
            with reading(tensor) as array:
                kept = array != 0
            mask = None if kept.all() else kept
        chosen.append(Trainable(value, mask))
    return _distinct(chosen)


def adapters_to_train(
    module: Module,
    ctx: PassContext,
    *,
    rank: int,
    alpha: float,
    layers: Sequence[str],
    keep_zeros: bool,
) -> list[Trainable]:
    """Return the factors of the adapters that are there; where there are none, they are added.

    Raises:
        PassError: They are not of float32 or double.
    """
    there = list(find_adapters(ctx.editor()))
    adapters = there or add_adapters(module, ctx, rank, alpha, layers)
    masks: dict[ir.Value, Array] = {}
    idle: set[ir.Value] = set()
    for adapter in adapters:
        if there:
            for factor in (adapter.down, adapter.up):
                _check_type(f"'{factor.value.name}' is", factor.tensor)
        else:  # of the type of its layer, which is what the user knows
            weight = factor_of(adapter.base)
            named = f"'{weight.value.name}' is" if weight else f"{describe(adapter.base)} works in"
            _check_type(named, adapter.down.tensor)
        kept = _kept(adapter, ctx, new=not there) if keep_zeros else (_ALL, _ALL)
        if kept is None:
            idle.update((adapter.down.value, adapter.up.value))
            continue
        for factor, mask in zip((adapter.down, adapter.up), kept, strict=True):
            turned = mask.T if factor.transposed else mask
            # What several layers share is to be 0 where one of them needs that.
            masks[factor.value] = turned & masks.get(factor.value, _ALL)
    for value in idle.intersection(masks):
        ctx.warn(
            f"'{value.name}' belongs to an adapter that is not trained, too: it stays as it is, "
            "also where keep-zeros would set it to 0"
        )
    return _distinct(
        Trainable(value, None if mask.all() else mask)
        for value, mask in masks.items()
        if value not in idle
    )


def _distinct(chosen: Iterable[Trainable]) -> list[Trainable]:
    """Return one for each tensor: 0 where any of those that share it is to be."""
    found: dict[int, Trainable] = {}
    for each in chosen:
        first = found.setdefault(id(each.value.const_value), each)
        masks = [mask for mask in (first.mask, each.mask) if mask is not None]
        if first is not each and masks:
            mask = np.logical_and.reduce(masks)
            found[id(each.value.const_value)] = Trainable(first.value, mask)
    return list(found.values())


def _kept(adapter: Adapter, ctx: PassContext, *, new: bool) -> tuple[Array, Array] | None:
    """Return where A and B of an adapter may be other than 0, as masks that are broadcast.

    None where zeros of its weight are in the way.
    """
    weight = factor_of(adapter.base)
    if weight is None:
        ctx.note(
            "its weights are quantized, so keep-zeros does not see which of them are 0: all change "
            "with its adapter",
            adapter.base,
        )
        return _ALL, _ALL
    down, up = _matrix(adapter.down), _matrix(adapter.up)
    with reading(weight.tensor) as array:
        kept = (array.T if weight.transposed else array) != 0
    rows, columns = kept.any(axis=1, keepdims=True), kept.any(axis=0, keepdims=True)
    filled = int(rows.sum()) * int(columns.sum())
    share = 1 - kept.sum() / filled if filled else 0.0
    if share > _SCATTERED:
        ctx.missed(
            f"its adapter is not trained: {share:.0%} of its weights are 0, which keep-zeros keeps "
            "and a product of two matrices cannot; method=full can",
            adapter.base,
        )
        if not new and down.any() and up.any():
            ctx.warn(
                "its adapter, which was there before, is not 0: merged, it fills the zeros of the "
                "weight, unless merge=false",
                adapter.base,
            )
        return None
    if share:
        ctx.note(
            f"{share:.1%} of its weights are 0 here and there, which counts as chance: they change "
            "with its adapter",
            adapter.base,
        )
    dead = down[~rows[:, 0]].any() and up.any(), up[:, ~columns[0]].any() and down.any()
    if not new and any(dead):
        ctx.warn(
            "its adapter, which was there before, is not 0 in rows and columns where its weight "
            "is: keep-zeros sets it to 0 there before it trains",
            adapter.base,
        )
    return rows, columns


def _matrix(factor: Factor) -> Array:
    with reading(factor.tensor) as array:
        return np.array(array.T if factor.transposed else array)


def _check_type(what: str, tensor: ir.TensorProtocol) -> None:
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        raise PassError(
            f"{what} {tensor.dtype.name.lower()}, in which small updates are lost",
            remedy="run recover before convert-dtype, or on the model in float32",
        )
