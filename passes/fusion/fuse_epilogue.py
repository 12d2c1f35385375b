"""fuse-epilogue: bias, activation and gate go into the quantized product before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from lwc.core.dialect import Activation, DynamicQuantMatMul
from lwc.core.quant_layout import TILE
from lwc.core.walk import constant_tensor, op_name
from lwc.core.weights import reading
from lwc.passes.fusion.pieces import orders
from lwc.passes.quantization.dialect_ops import dynamic_quant_matmul, variant_of
from lwc.pipeline.passes import Exact
from lwc.pipeline.rule_pass import AnyRule, RulePass
from lwc.rewrite import Editor, Miss, Outcome, attribute, producer_of, rule

__all__ = ["FuseEpilogue"]

_MS = "com.microsoft"
_ACTIVATIONS = (
    "Relu", "Gelu", f"{_MS}::Gelu", f"{_MS}::FastGelu", f"{_MS}::BiasGelu", f"{_MS}::QuickGelu",
)  # fmt: skip

Array = np.ndarray[Any, Any]


class _Product(NamedTuple):
    """A `lwc::DynamicQuantMatMul`."""

    node: ir.Node
    variant: DynamicQuantMatMul

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the sum yet."""
        return self.variant.activation == "none" and not self.variant.gated

    @property
    def weights(self) -> list[ir.Value | None]:
        """Codes, scales, and zero points if there are any."""
        return list(self.node.inputs[1 : 3 + self.variant.zero_points])

    @property
    def bias(self) -> ir.Value | None:
        """What is added."""
        return self.node.inputs[3 + self.variant.zero_points] if self.variant.bias else None


@rule("Add")
def bias(node: ir.Node, edit: Editor) -> Outcome:
    """product + row becomes the product with a bias."""
    for value, row in orders(node):
        found = _product(value, edit)
        if found is None or not found.is_bare or found.bias is not None:
            continue
        return _with(found, edit, bias=row)
    return None


@rule(*_ACTIVATIONS)
def activation(node: ir.Node, edit: Editor) -> Outcome:
    """activation(product) becomes one operator."""
    kind = _activation(node)
    found = _product(node.inputs[0], edit)
    if found is None or not found.is_bare:
        return None
    if kind is None:
        return Miss("the operator has no such activation")
    row = node.inputs[1] if len(node.inputs) > 1 else None
    if row is not None and found.bias is not None:
        return Miss("it adds a second bias")
    return _with(found, edit, bias=row, activation=kind)


@rule("Mul")
def gate(node: ir.Node, edit: Editor) -> Outcome:
    """activation(product) * product of one source becomes one gated product."""
    for opened, other in orders(node):
        gates, others = _product(opened, edit), _product(other, edit)
        if gates is None or others is None or gates.variant.activation == "none":
            continue
        if others.node is gates.node or gates.node.inputs[0] is not others.node.inputs[0]:
            continue
        if gates.variant.gated or not others.is_bare:
            continue
        if _kind(gates.variant) != _kind(others.variant):
            return Miss("both products are quantized in different ways")
        if gates.variant.N % TILE:
            return Miss(f"{gates.variant.N} columns are no whole tiles of {TILE}")
        parts = [(gates.weights, gates.bias), (others.weights, others.bias)]
        stacked = [[_tiles(value, gates.variant.N) for value in weights] for weights, _ in parts]
        rows = [None if row is None else _read(row) for _, row in parts]
        return _gated(gates, stacked, rows, edit)
    return None


@rule("Mul")
def split_gate(node: ir.Node, edit: Editor) -> Outcome:
    """activation(half of a product) * other half becomes one gated product."""
    for opened, other in orders(node):
        act = opened.producer()
        if act is None or op_name(act) not in _ACTIVATIONS or not edit.single_use(opened):
            continue
        half = act.inputs[0]
        cut = producer_of(half, "Split")
        if cut is None or half is None or other.producer() is not cut or len(act.inputs) > 1:
            continue
        found = _product(cut.inputs[0], edit)
        kind = _activation(act)
        if found is None or not found.is_bare or kind is None or len(cut.outputs) != 2:
            continue
        if half is other or not all(edit.single_use(each) for each in cut.outputs):
            return Miss("something else reads a half of the product", cut)
        rank = edit.rank(found.node.outputs[0])
        if rank is None or attribute(cut, "axis", 0) not in (-1, rank - 1):
            continue
        width = found.variant.N // 2
        if not edit.same_shape(half, other) or width % TILE:
            return Miss(f"its halves are not of the same whole tiles of {TILE} columns", cut)
        halves = [np.split(_tiles(value, found.variant.N), 2) for value in found.weights]
        rows = [None, None] if found.bias is None else np.split(_read(found.bias), 2)
        first = list(cut.outputs).index(half)
        stacked = [[each[place] for each in halves] for place in (first, 1 - first)]
        made = replace(found.variant, N=width, activation=kind)
        return _gated(_Product(found.node, made), stacked, [rows[first], rows[1 - first]], edit)
    return None


class FuseEpilogue(RulePass):
    """Compute what follows a `lwc::DynamicQuantMatMul` in that operator.

    That is a constant row that is added, ReLU, GELU or SiLU, and the product of a gated network,
    activation(x @ gate) * (x @ up), whose two weights are then read as one. Run it after
    fuse-activation and the pass that quantizes.
    """

    rules: ClassVar[tuple[AnyRule, ...]] = (bias, activation, gate, split_gate)
    contract: ClassVar[Exact] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"parameter-bytes"})


def _product(value: ir.Value | None, edit: Editor) -> _Product | None:
    """Return the product that a value comes from and that nothing else reads."""
    node = None if value is None else value.producer()
    variant = variant_of(node)
    if value is None or node is None or variant is None or not edit.single_use(value):
        return None
    return None if edit.in_function(node) else _Product(node, variant)


def _activation(node: ir.Node) -> Activation | None:
    name = op_name(node)
    if name == "Relu":
        return "relu"
    if name == f"{_MS}::QuickGelu":
        return "silu" if attribute(node, "alpha", 1.702) == 1 else None
    tanh = name == f"{_MS}::FastGelu" or attribute(node, "approximate", "none") == "tanh"
    return "gelu_tanh" if tanh else "gelu"


def _kind(variant: DynamicQuantMatMul) -> DynamicQuantMatMul:
    """Return what two products must have in common."""
    return replace(variant, activation="none", bias=0)


def _with(
    product: _Product,
    edit: Editor,
    *,
    bias: ir.Value | None = None,
    activation: Activation = "none",
) -> ir.Value | Miss | None:
    """Write a product with a bias, an activation, or both."""
    variant = replace(product.variant, activation=activation)
    added = product.bias
    if bias is not None:
        tensor = edit.tensor(bias)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            return None
        *leading, columns = tensor.shape.numpy() or (1,)
        if columns != variant.N or any(extent != 1 for extent in leading):
            return Miss("what it adds is no row of the product's columns")
        if len(leading) >= (edit.rank(product.node.outputs[0]) or 0):
            return Miss("what it adds has more axes than the product")
        added = bias if not leading else edit.constant(_read(bias).reshape(-1), "bias")
        variant = replace(variant, bias=1)
    return dynamic_quant_matmul(edit, variant, [product.node.inputs[0], *product.weights, added])


def _gated(
    gates: _Product,
    stacked: Sequence[Sequence[Array]],
    rows: Sequence[Array | None],
    edit: Editor,
) -> ir.Value:
    """Write gate and what it gates as one: tiles of both in turn."""
    variant = replace(
        gates.variant, N=2 * gates.variant.N, gated=1, bias=int(any(r is not None for r in rows))
    )
    inputs: list[ir.Value | None] = [gates.node.inputs[0]]
    for value, both in zip(gates.weights, zip(*stacked, strict=True), strict=True):
        assert value is not None
        inputs.append(_initializer(value, np.stack(both, axis=1).reshape(-1), edit))
    if variant.bias:
        zeros = np.zeros(gates.variant.N, np.float32)
        tiles = [(zeros if row is None else row).reshape(-1, TILE) for row in rows]
        inputs.append(edit.constant(np.stack(tiles, axis=1).reshape(-1), "gated_bias"))
    return dynamic_quant_matmul(edit, variant, inputs)


def _initializer(value: ir.Value, array: Array, edit: Editor) -> ir.Value:
    tensor = edit.module.spilled(ir.Tensor(array))
    return edit.module.add_initializer(f"{value.name}_gated", tensor)


def _tiles(value: ir.Value | None, columns: int) -> Array:
    """Read codes, scales or zero points, `[tiles, ...]`."""
    return _read(value).reshape(-(-columns // TILE), -1)


def _read(value: ir.Value | None) -> Array:
    tensor = constant_tensor(value)
    assert tensor is not None
    with reading(tensor) as array:
        return np.array(array)
