"""The cache of fused attention: which layers can keep it in integers, and by what scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.calibration.statistics import Statistic
from lwc.core.walk import op_name

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["SCALES", "Array", "CacheLayer", "Magnitudes", "Rounding", "find_layers", "scales"]

Array: TypeAlias = np.ndarray[Any, Any]

_GQA = "com.microsoft::GroupQueryAttention"
_PASTS = 3, 4
SCALES = 12, 13
"""Inputs of GroupQueryAttention that hold the scales of keys and values."""

_LARGEST = {8: 127, 4: 7}
"""The largest code. The smallest is one below its negative; scales do not count on it."""

_TINY = 1e-8
"""Scales are at least this, which only channels that are always 0 need."""


@dataclass(frozen=True)
class CacheLayer:
    """One attention with its cache.

    Attributes:
        node: The attention.
        pasts: Keys and values of earlier tokens, inputs of the graph.
        presents: Those of all tokens, outputs of the graph.
        heads: Heads of keys and values.
        size: Size of a head.
        bits: Bits of a number in the cache as it is.
    """

    node: ir.Node
    pasts: tuple[ir.Value, ir.Value]
    presents: tuple[ir.Value, ir.Value]
    heads: int
    size: int
    bits: int

    def bytes_per_token(self, bits: int) -> int:
        """Return what a token takes in the cache with so many bits for a number."""
        return 2 * self.heads * self.size * bits // 8


def find_layers(module: Module, bits: Literal[4, 8], ctx: PassContext) -> list[CacheLayer]:
    """Return the layers whose cache can be kept in integers; remarks name the others."""
    nodes = [node for node in module.graph if op_name(node) == _GQA]
    if not nodes:
        ctx.note("there is no GroupQueryAttention: fuse-attention and add-kv-cache make it")
        return []
    layers = []
    shapes = ctx.analyses.get(Shapes)
    for node in nodes:
        found = _layer(node, bits, shapes)
        if isinstance(found, CacheLayer):
            layers.append(found)
        else:
            ctx.missed(found, node)
    return layers


def _layer(node: ir.Node, bits: Literal[4, 8], shapes: Shapes) -> CacheLayer | str:
    """Return a layer, or why its cache stays as it is."""
    pasts = [node.inputs[place] if place < len(node.inputs) else None for place in _PASTS]
    key, value = pasts
    if key is None or value is None:
        return "it has no cache: run add-kv-cache first"
    if any(place < len(node.inputs) and node.inputs[place] for place in SCALES):
        return "its cache is quantized already"
    presents = node.outputs[1:3]
    if len(presents) < 2 or not all(present.is_graph_output() for present in presents):
        return "its presents are no outputs of the graph"
    if not all(past.is_graph_input() for past in (key, value)):
        return "its pasts are no inputs of the graph"
    if any(len(list(past.uses())) > 1 for past in (key, value)) or any(
        list(present.uses()) for present in presents
    ):
        return "something else reads its cache, too"
    if node.attributes.get_int("sliding_window_cache", 0):
        return "its cache is a sliding window, which lwc has not tried in integers"
    if key.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or value.dtype != key.dtype:
        return f"its cache is {key.dtype} and {value.dtype}"
    shape = shapes.shape(key)
    if shape is None or not all(isinstance(shape[axis], int) for axis in (1, 3)):
        return "the heads of its cache, or their size, are not known"
    heads, size = int(shape[1]), int(shape[3])
    if size * bits % 8:
        return f"two codes share a byte, and heads of {size} are odd"
    return CacheLayer(
        node, (key, value), (presents[0], presents[1]), heads, size, key.dtype.bitwidth
    )


class Magnitudes(Statistic):
    """The largest magnitude of each channel of each head: `value`, float32 `[heads, size]`."""

    def __init__(self) -> None:
        self.value: Array = np.zeros((1, 1), np.float32)

    def update(self, batch: Array) -> None:
        """Take `[batch, heads, tokens, size]` in."""
        found = np.abs(batch).max(axis=(0, 2), initial=0).astype(np.float32)
        self.value = np.maximum(self.value, found)


def scales(magnitudes: Array, bits: Literal[4, 8], *, single: bool) -> Array:
    """Return the scales of keys or values, float32 `[1, heads, 1, size]`, `[1]` where `single`.

    Args:
        magnitudes: The largest of each channel, `[heads, size]`.
        bits: Bits of a code.
        single: One scale for all.
    """
    tops = magnitudes.max().reshape(1) if single else magnitudes[None, :, None]
    made: Array = np.maximum(tops / _LARGEST[bits], _TINY).astype(np.float32)
    return made


class Rounding(Statistic):
    """What rounding does: `value`, the norm of the error over that of the numbers.

    Args:
        scale: By what they are divided, as `scales` gives it.
        bits: Bits of a code.
    """

    def __init__(self, scale: Array, bits: Literal[4, 8]) -> None:
        self._scale, self._top = scale, _LARGEST[bits]
        self._error = self._whole = 0.0

    def update(self, batch: Array) -> None:
        """Take `[batch, heads, tokens, size]` in."""
        wide = batch.astype(np.float32)
        codes = np.clip(np.rint(wide / self._scale), -self._top - 1, self._top)
        self._error += float(np.square(codes * self._scale - wide).sum(dtype=np.float64))
        self._whole += float(np.square(wide).sum(dtype=np.float64))

    @property
    def value(self) -> float:
        """Return it; 0 where all numbers were."""
        return float(np.sqrt(self._error / self._whole)) if self._whole else 0.0
