"""Putting adapters into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.passes.training.low_rank import Adapter, Factor, find_adapters, product_extents
from lwc.rewrite import Editor
from lwc.train.objective import vocabulary

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["add_adapters"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def add_adapters(
    module: Module, ctx: PassContext, rank: int, alpha: float, layers: Sequence[str]
) -> list[Adapter]:
    """Add an adapter to every layer that has none; for arguments see `AddLora`."""
    edit = ctx.editor()
    there = list(find_adapters(edit))
    taken = {adapter.base for adapter in there} | {
        use.node
        for adapter in there
        for use in (*adapter.down.value.uses(), *adapter.up.value.uses())
    }
    classes = None if layers else vocabulary(module)
    for pattern in layers:
        if not any(_matches(node, pattern) for node in module.graph):
            ctx.warn(f"layers={pattern} matches no node and no weight")
    added: list[Adapter] = []
    for node in list(module.nodes()):
        extents = product_extents(node, edit)
        if extents is None or node in taken:
            continue
        if ctx.limit.exhausted:
            break
        if layers and not any(_matches(node, pattern) for pattern in layers):
            continue
        reason = _obstacle(node, extents, edit, rank=rank, alpha=alpha, classes=classes)
        if reason is not None:
            ctx.missed(f"no adapter: {reason}", node)
            continue
        ctx.limit.spend("add-lora", node)
        ctx.applied(f"an adapter of rank {rank}, {extents[0]} to {extents[1]}", node, "add-lora")
        seed = [ctx.seed, len(added)]
        drawn = np.random.default_rng(seed)
        added.append(_add(node, extents, edit, rank=rank, alpha=alpha, drawn=drawn))
    return added


def _matches(node: ir.Node, pattern: str) -> bool:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    names = [node.name, None if weight is None else weight.name]
    return any(name is not None and fnmatchcase(name, pattern) for name in names)


def _obstacle(
    node: ir.Node,
    extents: tuple[int, int],
    edit: Editor,
    *,
    rank: int,
    alpha: float,
    classes: int | None,
) -> str | None:
    if node.graph is not edit.module.graph:
        return "it does not belong to the main graph"
    kind = edit.dtype(node.inputs[0])
    if kind is None or kind not in _FLOATS:
        return "what it multiplies is of no floating-point type"
    with np.errstate(over="ignore", under="ignore"):
        scale = float(np.array(alpha / rank).astype(kind.numpy()))
    if not 0 < scale < float("inf"):
        return f"alpha / rank = {alpha / rank:g} is {scale:g} in {kind.name.lower()}"
    if extents[1] == classes:
        return "it gives a number for each token of the vocabulary, and layers= does not name it"
    if rank >= min(extents):
        return f"its {extents[0]} inputs and {extents[1]} outputs are no more than rank={rank}"
    return None


def _add(
    node: ir.Node,
    extents: tuple[int, int],
    edit: Editor,
    *,
    rank: int,
    alpha: float,
    drawn: np.random.Generator,
) -> Adapter:
    inputs, outputs = extents
    source, kind = node.inputs[0], edit.dtype(node.inputs[0])
    assert source is not None
    assert kind is not None
    name = node.inputs[1].name if node.inputs[1] is not None else None
    # Kaiming's uniform initialization with slope sqrt(5), as torch.nn.Linear has it.
    bound = 1 / np.sqrt(inputs)
    parts = {
        "A": drawn.uniform(-bound, bound, (inputs, rank)).astype(kind.numpy()),
        "B": np.zeros((rank, outputs), kind.numpy()),
    }
    down, up = (
        edit.module.add_initializer(
            f"{name or 'weight'}.lora_{part}", edit.module.spilled(ir.Tensor(array, dtype=kind))
        )
        for part, array in parts.items()
    )
    edit.at(node)
    scale = edit.constant(np.array(alpha / rank, kind.numpy()), "lora_scale")
    base = edit.op(node.op_type, node.inputs, dict(node.attributes.items()), domain=node.domain)
    made = base.producer()
    assert made is not None
    made.overload = node.overload
    made.metadata_props.update(node.metadata_props)
    low = edit.op("Mul", [edit.op("MatMul", [source, down]), scale])
    total = edit.op("Add", [base, edit.op("MatMul", [low, up])])
    old = node.name
    edit.replace(node.outputs[0], total)
    edit.erase(node)
    made.name = old
    sum_ = total.producer()
    assert sum_ is not None
    return Adapter(sum_, 1, made, _factor(down), _factor(up), alpha / rank)


def _factor(value: ir.Value) -> Factor:
    assert value.const_value is not None
    return Factor(value, value.const_value, transposed=False)
