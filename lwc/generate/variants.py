"""What a cache that is cut needs of a model: told positions, and the attention each entry gets.

Both are copies of the module with a few nodes changed; weights are shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.backends.decoding import CacheInterface
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError
from lwc.core.walk import op_name
from lwc.generate.interface import GQA, POSITIONS

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["check_no_windows", "told_positions", "weighed"]

_LENGTHS, _TOTAL, _IDS = 5, 6, 9
"""Inputs of GroupQueryAttention that say how long sequences are, and where tokens are."""

_CAST, _OF_KEYS = {"Cast", "Identity"}, {"Expand", "Reshape", "Squeeze", "Tile", "Transpose"}
_KEY_OPS = _CAST | _OF_KEYS | {"Div", "Mul", "Unsqueeze"}
_SCORE_OPS = _CAST | {"Add", "Clip", "Div", "Max", "Mul", "Reshape", "Sub", "Tanh", "Where"}
_PRODUCTS = {"MatMul", "com.microsoft::FusedMatMul"}

_AS_IT_IS = 0
"""What Reshape takes for the extent that is there."""

_FUSED = {GQA: ("qk_output", 2), "Attention": ("qk_matmul_output_mode", 3)}
"""The attribute and its value that let an operator give probabilities as its fourth output."""


# Positions


def check_no_windows(module: Module) -> None:
    """Check that no layer attends to a window of the cache, counted over its entries.

    Raises:
        LwcError: One does; the message names the node.
    """
    for node in module.graph:
        if op_name(node) == GQA and _integer(node, "local_window_size", -1) > 0:
            raise LwcError(
                "attention has a window of its own, counted over the cache",
                file=module.source.path,
                node=describe(node),
                remedy="keep the full cache",
            )


def told_positions(module: Module, interface: CacheInterface) -> tuple[Module, CacheInterface]:
    """Return a module whose tokens have the positions they are told, however much is cached.

    A model that counts positions from the number of cached tokens would give new tokens earlier
    positions than they have once entries are dropped. GroupQueryAttention, where it turns queries
    and keys itself, counts so unless it is told.

    Raises:
        LwcError: Positions are counted elsewhere; the message names the node.
    """
    if not any(_counts(node) for node in module.graph):
        named = next((v for v in module.graph.inputs if v.name == POSITIONS), None)
        if named is None or not named.uses():
            raise LwcError(
                f"positions are counted from the cache: there is no input '{POSITIONS}' in use",
                file=module.source.path,
                remedy="export the model with one, or keep the full cache of one sequence",
            )
        return module, interface
    _check_lengths(module, interface)
    twin = module.clone()
    positions = next((v for v in twin.graph.inputs if v.name == POSITIONS), None)
    if positions is None:
        shape = next(v.shape for v in twin.graph.inputs if v.name == interface.ids)
        kind = ir.TensorType(ir.DataType.INT64)
        positions = ir.Value(name=POSITIONS, shape=shape, type=kind)
        twin.graph.inputs.append(positions)
    for node in twin.graph:
        if op_name(node) == GQA and _counts(node):
            node.resize_inputs(max(len(node.inputs), _IDS + 1))
            node.replace_input_with(_IDS, positions)
    return twin, replace(interface, positions=POSITIONS)


def _counts(node: ir.Node) -> bool:
    """Tell whether attention turns queries and keys by positions that it counts."""
    told = len(node.inputs) > _IDS and node.inputs[_IDS] is not None
    return op_name(node) == GQA and _integer(node, "do_rotary", 0) == 1 and not told


def _check_lengths(module: Module, interface: CacheInterface) -> None:
    """Check that the number of cached tokens is read for the extents of the cache alone."""
    start = [value for value in module.graph.inputs if value.name == interface.mask]
    seen, outputs = set(start), set(module.graph.outputs)
    while start:
        for use in start.pop().uses():
            if op_name(use.node) == GQA and use.idx in (_LENGTHS, _TOTAL):
                continue
            for value in use.node.outputs:
                if value in outputs:
                    raise LwcError(
                        "something else than attention counts the cached tokens",
                        file=module.source.path,
                        node=describe(use.node),
                        remedy="keep the full cache of one sequence",
                    )
                if value not in seen:
                    seen.add(value)
                    start.append(value)


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes.get_int(name, default)


# Masses


def weighed(module: Module, interface: CacheInterface) -> tuple[Module, CacheInterface]:
    """Return a module with one more output: the attention that every entry got, by layer and head.

    It is the sum of the probabilities over the new tokens, and over the queries that share a head
    of keys: `[layers, heads, past + new]` for one sequence. Fused operators give the probabilities
    themselves; elsewhere they are what the Softmax of each layer gives.

    Raises:
        LwcError: A layer has no such probabilities, or layers have different numbers of heads.
    """
    heads = {tensor.heads for tensor in interface.tensors}
    if len(heads) != 1:
        raise LwcError(
            f"layers have {' and '.join(map(str, sorted(heads)))} heads of keys",
            file=module.source.path,
            remedy="use a window, or keep the full cache",
        )
    twin = module.clone()
    outputs = {value.name: value for value in twin.graph.outputs}
    keys = [outputs[tensor.present] for tensor in interface.tensors[::2]]
    infer = functools.cache(lambda: Shapes.build(twin))
    parts = [_mass(twin, key, interface, infer) for key in keys]
    masses = _append(twin, "Concat", parts, "attention_masses", {"axis": 0})
    masses.type = ir.TensorType(ir.DataType.FLOAT)
    masses.shape = ir.Shape([len(keys), *heads, None])
    twin.graph.outputs.append(masses)
    return twin, replace(interface, masses=str(masses.name))


def _mass(
    module: Module, key: ir.Value, interface: CacheInterface, infer: Callable[[], Shapes]
) -> ir.Value:
    """Add what sums the probabilities of a layer to `[1, heads, past + new]`."""
    shares, heads = _shares(module, key, infer), interface.tensors[0].heads
    if shares.dtype != ir.DataType.FLOAT:
        shares = _append(module, "Cast", [shares], "shares", {"to": int(ir.DataType.FLOAT)})
    if interface.in_place:  # the present has entries to spare
        grouped = _constant(module, [1, heads, -1, _AS_IT_IS])
    else:  # ONNX infers for the probabilities of Attention that they are of no entries
        extents = _append(module, "Shape", [key], "extents")
        entries = _append(module, "Gather", [extents, _constant(module, [2])], "entries")
        parts = [_constant(module, [1, heads, -1]), entries]
        grouped = _append(module, "Concat", parts, "grouped", {"axis": 0})
    shares = _append(module, "Reshape", [shares, grouped], "grouped_shares")
    return _append(module, "ReduceSum", [shares, _constant(module, [2])], "masses", {"keepdims": 0})


def _constant(module: Module, numbers: list[int]) -> ir.Value:
    return module.add_initializer("masses_constant", np.array(numbers, np.int64))


def _shares(module: Module, key: ir.Value, infer: Callable[[], Shapes]) -> ir.Value:
    """Return the attention probabilities of a layer, `[batch, heads, new, past + new]`."""
    maker = key.producer()
    while maker is not None and op_name(maker) in _CAST and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    found = {maker} if maker is not None and op_name(maker) in _FUSED else set(_readers(key))
    if len(found) != 1:
        raise LwcError(
            f"the attention probabilities that belong to '{key.name}' are not to be found",
            file=module.source.path,
            remedy="run fuse-attention and add-kv-cache, use a window, or keep the full cache",
        )
    node = found.pop()
    if op_name(node) not in _FUSED:
        return node.outputs[0]
    attribute, mode = _FUSED[op_name(node)]
    node.attributes[attribute] = ir.AttrInt64(attribute, mode)
    node.resize_outputs(4)
    shares = node.outputs[3]
    shares.name = module.fresh_name("shares")
    shares.type = node.outputs[0].type or key.type
    if shares.dtype is None or not shares.dtype.is_floating_point():  # keys may be integers
        dtype = infer().dtype(node.outputs[0])
        shares.type = None if dtype is None else ir.TensorType(dtype)
    return shares


def _readers(key: ir.Value) -> Iterator[ir.Node]:
    """Follow keys to the attention they are in: an operator, or the Softmax of their scores."""
    seen = {(key, False)}
    stack = [(key, False)]
    while stack:
        value, scores = stack.pop()
        for use in value.uses():
            op = op_name(use.node)
            if op == ("Softmax" if scores else "Attention"):
                yield use.node
                continue
            if op in _PRODUCTS and not scores:
                following = (use.node.outputs[0], True)
            elif op in (_SCORE_OPS if scores else _KEY_OPS):
                following = (use.node.outputs[0], scores)
            else:
                continue
            if following not in seen:
                seen.add(following)
                stack.append(following)


def _append(
    module: Module,
    op: str,
    inputs: list[ir.Value],
    name: str,
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    """Add a standard node at the end of the main graph; return what it makes."""
    made = [ir.AttrInt64(key, value) for key, value in (attributes or {}).items()]
    node = ir.Node("", op, inputs, made, num_outputs=1, name=module.fresh_name(f"node_{name}"))
    node.outputs[0].name = module.fresh_name(name)
    module.graph.append(node)
    return node.outputs[0]
