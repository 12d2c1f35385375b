"""Modules of one `lwc::DynamicQuantMatMul`, and what it should compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.dialect import DOMAIN, DynamicQuantMatMul
from lwc.core.module import Module
from lwc.core.quant_layout import TILE, pack_codes, pack_columns

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A variant with weights."""

    variant: DynamicQuantMatMul
    codes: Array
    scales: Array
    zeros: Array
    bias: Array

    @property
    def blocks(self) -> Array:
        """The block of each input."""
        size = self.variant.block_size or self.variant.K
        found: Array = np.arange(self.variant.K) // size
        return found

    def weight(self) -> Array:
        """The weight as floats, `[K, N]`, float64."""
        zeros = self.zeros if self.variant.zero_points else 1 << (self.variant.bits - 1)
        scales = self.scales.astype(np.float64)[self.blocks]
        wide = zeros[self.blocks].astype(float) if isinstance(zeros, np.ndarray) else zeros
        found: Array = scales * (self.codes.astype(float) - wide)
        return found


def draw_case(rng: np.random.Generator, variant: DynamicQuantMatMul, scale_type: Any) -> Case:
    """Draw weights for a variant."""
    blocks = -(-variant.K // variant.block_size) if variant.block_size else 1
    top = 1 << variant.bits
    return Case(
        variant,
        rng.integers(0, top, (variant.K, variant.N)).astype(np.uint8),
        rng.uniform(-0.02, 0.02, (blocks, variant.N)).astype(scale_type),
        rng.integers(0, top, (blocks, variant.N)).astype(np.uint8),
        rng.normal(size=variant.N).astype(np.float32),
    )


def module_of(case: Case, opset: int = 21) -> Module:
    """Make a module that computes y of x `[rows, K]`."""
    variant = case.variant
    x = ir.Value(
        name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", variant.K])
    )
    arrays = {"codes": pack_codes(case.codes, variant.bits), "scales": pack_columns(case.scales)}
    if variant.zero_points:
        arrays["zero_points"] = pack_columns(case.zeros)
    if variant.bias:
        arrays["bias"] = case.bias
    weights = [
        ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        for name, array in arrays.items()
    ]
    attributes = ir.convenience.convert_attributes(variant.attributes())
    node = ir.Node(DOMAIN, variant.name, [x, *weights], attributes, name="product")
    node.overload = variant.overload
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape(["rows", variant.N // 2 if variant.gated else variant.N])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=weights, opset_imports={"": opset}, name="one"
    )
    module = Module(ir.Model(graph, ir_version=10))
    variant.declare(module)
    return module


def expected(case: Case, x: Array) -> Array:
    """Compute the formula of `DynamicQuantMatMul` in float64, rounding x in float32."""
    variant = case.variant
    rounded = np.empty(x.shape)
    per_block = variant.x_block and variant.block_size
    parts = case.blocks if per_block else np.zeros(variant.K, int)
    for part in np.unique(parts):
        here = x[:, parts == part]
        step = np.abs(here).max(axis=1, keepdims=True) / np.float32(127)
        step = np.where(step == 0, np.float32(1), step)
        rounded[:, parts == part] = np.rint(here / step) * step.astype(float)
    y = rounded @ case.weight()
    if variant.bias:
        y = y + case.bias
    if not variant.gated:
        return activated(y, variant.activation)
    tiles = y.reshape(len(y), -1, 2, TILE)
    gate, other = (tiles[:, :, place].reshape(len(y), -1) for place in (0, 1))
    return activated(gate, variant.activation) * other


def activated(y: Array, kind: str) -> Array:
    """Apply an activation in float64."""
    from math import erf

    with np.errstate(over="ignore"):
        if kind == "relu":
            return np.maximum(y, 0)
        if kind == "silu":
            return np.asarray(y / (1 + np.exp(-y)))
        if kind == "gelu":
            return np.asarray(y / 2 * (1 + np.vectorize(erf)(y / np.sqrt(2))))
        if kind == "gelu_tanh":
            inner = np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)
            return np.asarray(y / 2 * (1 + np.tanh(inner)))
    return y


def variants(rng: np.random.Generator, count: int) -> list[DynamicQuantMatMul]:
    """Draw variants of all kinds."""
    found = []
    for _ in range(count):
        gated = int(rng.integers(2))
        block = int(rng.choice([0, 32, 64, 128]))
        pick: Any = rng.choice
        found.append(
            DynamicQuantMatMul(
                K=int(rng.choice([1, 31, 32, 40, 96, 300])),
                N=int(rng.choice([32, 64, 160]))
                if gated
                else int(rng.choice([1, 15, 16, 33, 100])),
                bits=int(pick([2, 3, 4, 8])),  # type: ignore[arg-type]
                block_size=block,
                x_block=int(rng.integers(2)) if block else 0,
                zero_points=int(rng.integers(2)),
                bias=int(rng.integers(2)),
                activation=str(pick(["none", "silu", "gelu", "gelu_tanh", "relu"])),  # type: ignore[arg-type]
                gated=gated,
            )
        )
    return found
