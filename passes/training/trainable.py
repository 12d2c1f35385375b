"""What `recover` trains of a module, and what of that must stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.errors import PassError
from lwc.core.walk import constant_tensor, op_name
from lwc.core.weights import reading
from lwc.passes.quantization.weight_uses import find_weights
from lwc.passes.training.adding import add_adapters
from lwc.passes.training.low_rank import Adapter, factor_of, find_adapters

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["Trainable", "adapters_to_train", "weights_to_train"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_SCATTERED = 0.25
"""Share of zeros, outside of rows and columns of them, from which a weight counts as pruned: what
was stored in 4 bits is 0 in an eighth of the places."""


@dataclass(frozen=True)
class Trainable:
    """A weight that is trained.

    Attributes:
        value: The initializer.
        mask: 0 where it must stay as it is, broadcast against it; None where it need not anywhere.
    """

    value: ir.Value
    mask: Array | None = None


def weights_to_train(module: Module, keep_zeros: bool) -> list[Trainable]:
    """Return the weights of MatMul, Gemm and Conv in the main graph that are initializers.

    Raises:
        PassError: One is not of float32 or double.
    """
    found: dict[ir.Value, None] = {}
    for weight in find_weights(module):
        linear = any(use.role != "Gather" for use in weight.uses)
        rows, *_ = weight.extents if len(weight.tensor.shape) == 2 else weight.tensor.shape.numpy()
        # What multiplies a single number is a table of angles or the like.
        if linear and rows > 1 and weight.belongs_to(module.graph):
            found[weight.value] = None
    for node in module.graph:
        if op_name(node) in ("Conv", "ConvTranspose") and node.inputs[1] is not None:
            found[node.inputs[1]] = None
    chosen = []
    for value in found:
        tensor = constant_tensor(value)
        if tensor is None or not value.is_initializer() or value.graph is not module.graph:
            continue
        _check_type(value, tensor)
        mask = None
        if keep_zeros:
            with reading(tensor) as array:
                kept = array != 0
            mask = None if kept.all() else kept
        chosen.append(Trainable(value, mask))
    return chosen


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
    found: dict[ir.Value, Trainable] = {}
    for adapter in adapters:
        for factor in (adapter.down, adapter.up):
            _check_type(factor.value, factor.tensor)
        for each in _factors(module, ctx, adapter, keep_zeros=keep_zeros, new=not there):
            found.setdefault(each.value, each)
    return list(found.values())


def _factors(
    module: Module, ctx: PassContext, adapter: Adapter, *, keep_zeros: bool, new: bool
) -> Iterator[Trainable]:
    """Yield both factors of an adapter, unless zeros of its weight are in the way."""
    down, up = adapter.down, adapter.up
    weight = factor_of(adapter.base)
    if not keep_zeros or weight is None:
        yield from (Trainable(down.value), Trainable(up.value))
        return
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
        return
    if share:
        ctx.note(
            f"{share:.1%} of its weights are 0 here and there, which counts as chance: they change "
            "with its adapter",
            adapter.base,
        )
    for factor, kept in ((down, rows), (up, columns)):
        mask = kept.T if factor.transposed else kept
        if new and not mask.all():
            with reading(factor.tensor) as array:
                zeroed = ir.Tensor(array * mask.astype(array.dtype), dtype=factor.tensor.dtype)
            module.replace_initializer(factor.value, module.spilled(zeroed))
        yield Trainable(factor.value, None if mask.all() else mask)


def _check_type(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        raise PassError(
            f"'{value.name}' is {tensor.dtype.name.lower()}, in which small updates are lost",
            remedy="run it before convert-dtype",
        )
