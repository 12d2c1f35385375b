"""Putting quantized weights into the graph.

ONNX Runtime's operators are MatMulNBits, MatMulBnb4, GatherBlockQuantized and
DynamicQuantizeMatMul, the standard ones DequantizeLinear, or a Gather of levels; lwc's own is
`lwc::DynamicQuantMatMul`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.core.dialect import DynamicQuantMatMul
from lwc.core.walk import constant_tensor
from lwc.passes.quantization.dialect_ops import dynamic_quant_matmul
from lwc.passes.quantization.rounding import Grid
from lwc.passes.quantization.streaming import QuantizedWeight
from lwc.passes.quantization.tile_lookup import lookup_in_tiles
from lwc.passes.quantization.weight_uses import WeightUse, WeightUses
from lwc.rewrite.editor import Editor, attribute

if TYPE_CHECKING:
    from lwc.passes.quantization.activations import Activations
    from lwc.passes.quantization.layerwise import Layer

__all__ = [
    "PackedWeight",
    "lower",
    "lower_per_tensor",
    "lower_to_contrib",
    "lower_to_dialect",
    "lower_to_standard",
]

_CONTRIB = "com.microsoft"
_NF4 = 1
"""MatMulBnb4's `quant_type`."""


@dataclass(frozen=True)
class PackedWeight:
    """The initializers of a quantized weight.

    Attributes:
        codes: See `QuantizedWeight`.
        scales: See `QuantizedWeight`.
        zero_points: See `QuantizedWeight`.
        inputs: Inputs of the layer, or the width of the embedding.
        outputs: Outputs of the layer, or the rows of the table.
        grid: What codes stand for.
        block_size: Weights per block; 0 is one block for all inputs.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    inputs: int
    outputs: int
    grid: Grid
    block_size: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.grid.bits

    @classmethod
    def register(
        cls,
        editor: Editor,
        name: str,
        weight: QuantizedWeight,
        shape: tuple[int, int],
        *,
        grid: Grid,
        block_size: int,
    ) -> PackedWeight:
        """Add the tensors to the main graph; `shape` is (inputs, outputs)."""
        add = editor.module.add_initializer
        zeros = weight.zero_points
        suffix = f"q{grid.bits}" if grid.codebook == "uniform" else grid.codebook
        return cls(
            codes=add(f"{name}_{suffix}", weight.codes),
            scales=add(f"{name}_scales", weight.scales),
            zero_points=None if zeros is None else add(f"{name}_zero_points", zeros),
            inputs=shape[0],
            outputs=shape[1],
            grid=grid,
            block_size=block_size,
        )


def lower(
    editor: Editor,
    layer: Layer,
    result: QuantizedWeight,
    accuracy_level: int,
    activations: Activations | None,
) -> None:
    """Put a quantized weight into the graph, by its layout, and take what nothing reads out.

    Args:
        editor: Edits the module.
        layer: The weight.
        result: What became of it.
        accuracy_level: Of MatMulNBits.
        activations: What becomes of the activations; None leaves them to the operators.
    """
    weight, spec = layer
    packed = PackedWeight.register(
        editor,
        weight.value.name or "weight",
        result,
        weight.extents,
        grid=spec.grid,
        block_size=spec.block_size,
    )
    transposes = [user for user, _ in weight.value.uses() if user.op_type == "Transpose"]
    if activations is not None and activations.lower(editor, layer, packed):
        pass
    elif spec.layout == "qdq":
        lower_to_standard(editor, weight, packed)
    elif spec.layout == "tiles":
        lower_to_dialect(editor, weight, packed)
    else:
        lower_to_contrib(editor, weight, packed, accuracy_level)
    for node in transposes:
        _erase_dead(editor, node)
    _remove_constant(editor, weight.value)


def lower_to_contrib(
    editor: Editor, weight: WeightUses, packed: PackedWeight, accuracy_level: int
) -> None:
    """Replace every use of `weight` by an operator of ONNX Runtime that reads packed codes."""
    editor.module.import_opset(_CONTRIB, 1)
    for use in weight.uses:
        editor.root = use.node
        if use.role == "Gather":
            result = _gather(editor, use.node, packed, shared=weight.tied)
        else:
            result = _linear(editor, use, packed, accuracy_level)
        _replace(editor, use.node, result)


def _linear(editor: Editor, use: WeightUse, packed: PackedWeight, accuracy_level: int) -> ir.Value:
    node = use.node
    inputs = [node.inputs[0], packed.codes, packed.scales]
    attributes = {"K": packed.inputs, "N": packed.outputs, "block_size": packed.block_size}
    even = packed.grid.codebook == "uniform"
    op = "MatMulNBits" if even else "MatMulBnb4"
    if even:
        inputs.append(packed.zero_points)
        attributes |= {"bits": packed.bits, "accuracy_level": accuracy_level}
    else:
        attributes |= {"quant_type": _NF4}
    if use.role == "MatMul":
        return editor.op(op, inputs, attributes, domain=_CONTRIB)
    bias = _own_bias(node, packed) if even else None  # MatMulBnb4 has none
    if bias is not None:
        inputs += [None, bias]
    result = editor.op(op, inputs, attributes, domain=_CONTRIB)
    return result if bias is not None else _with_terms(editor, node, result)


def lower_to_dialect(
    editor: Editor,
    weight: WeightUses,
    packed: PackedWeight,
    beside: Callable[[WeightUse], ir.Value] | None = None,
) -> None:
    """Replace products by `lwc::DynamicQuantMatMul`; an embedding looks up its tiles.

    What `beside` makes for a product, before its node, is added to the result.
    """
    for use in weight.uses:
        editor.root = use.node
        if use.role == "Gather":
            indices = use.node.inputs[1]
            assert indices is not None
            tensors = (packed.codes, packed.scales, packed.zero_points)
            shape = (packed.inputs, packed.outputs)
            rows = lookup_in_tiles(
                editor, indices, tensors, shape, bits=packed.bits, block_size=packed.block_size
            )
            _replace(editor, use.node, rows)
            continue
        bias = _own_bias(use.node, packed) if use.role == "Gemm" else None
        assert packed.grid.bits != 7  # codes of int8, in which other operators have room to add
        variant = DynamicQuantMatMul(
            K=packed.inputs,
            N=packed.outputs,
            bits=packed.grid.bits,
            block_size=packed.block_size,
            x_block=int(packed.block_size > 0),
            zero_points=int(packed.zero_points is not None),
            bias=int(bias is not None),
        )
        inputs = [use.node.inputs[0], packed.codes, packed.scales, packed.zero_points, bias]
        result = dynamic_quant_matmul(editor, variant, inputs)
        if use.role == "Gemm" and bias is None:
            result = _with_terms(editor, use.node, result)
        if beside is not None:
            result = editor.op("Add", [result, beside(use)])
        _replace(editor, use.node, result)


def lower_per_tensor(editor: Editor, weight: WeightUses, packed: PackedWeight) -> None:
    """Replace every use of `weight` by com.microsoft::DynamicQuantizeMatMul.

    Codes are int8 in the shape of the weight, `[inputs, outputs]` or transposed, scales
    `[outputs]`.
    """
    if weight.uses[0].transposed:
        tensor = packed.codes.const_value
        assert tensor is not None
        turned = ir.Tensor(np.ascontiguousarray(tensor.numpy().T))
        editor.module.replace_initializer(packed.codes, editor.module.spilled(turned))
    for use in weight.uses:
        editor.root = use.node
        bias = _own_bias(use.node, packed) if use.role == "Gemm" else None
        inputs = [use.node.inputs[0], packed.codes, packed.scales, None, bias]
        result = editor.op("DynamicQuantizeMatMul", _trim(_trim(inputs)), domain=_CONTRIB)
        if use.role == "Gemm" and bias is None:
            result = _with_terms(editor, use.node, result)
        _replace(editor, use.node, result)


def _own_bias(node: ir.Node, packed: PackedWeight) -> ir.Value | None:
    """Return what a Gemm adds where it is a constant row and nothing is multiplied."""
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    addend = node.inputs[2] if len(node.inputs) > 2 and beta != 0 else None
    bias = constant_tensor(addend)
    plain = alpha == beta == 1 and bias is not None and tuple(bias.shape) == (packed.outputs,)
    return addend if plain else None


def _with_terms(editor: Editor, node: ir.Node, result: ir.Value) -> ir.Value:
    """Write out alpha * (x @ W) + beta * C of a Gemm, given x @ W."""
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    addend = node.inputs[2] if len(node.inputs) > 2 and beta != 0 else None
    if alpha != 1:
        result = editor.op("Mul", [result, _scalar(editor, alpha, node)])
    if addend is not None:
        if beta != 1:
            addend = editor.op("Mul", [addend, _scalar(editor, beta, node)])
        result = editor.op("Add", [result, addend])
    return result


def _gather(editor: Editor, node: ir.Node, packed: PackedWeight, *, shared: bool) -> ir.Value:
    """Look up rows.

    A table shared with a linear layer keeps MatMulNBits' three axes, and the *result* is
    reshaped, which costs nothing. Reshaping the table instead makes ONNX Runtime fold a second
    copy of it when the model is loaded.
    """
    indices = node.inputs[1]
    attributes = {"bits": packed.bits, "block_size": packed.block_size, "gather_axis": 0}
    if not shared:
        inputs = [packed.codes, indices, packed.scales, packed.zero_points]
        return editor.op(
            "GatherBlockQuantized", inputs, attributes | {"quantize_axis": 1}, domain=_CONTRIB
        )
    last = editor.constant([2], "last_axis")
    scales = editor.op("Unsqueeze", [packed.scales, last])
    zeros = None
    if packed.zero_points is not None:
        assert packed.bits == 8, "a shared 4-bit table has no packed zero points"
        zeros = editor.op("Unsqueeze", [packed.zero_points, last])
    rows = editor.op(
        "GatherBlockQuantized",
        [packed.codes, indices, scales, zeros],
        attributes | {"quantize_axis": 2},
        domain=_CONTRIB,
    )
    rank = editor.rank(indices)
    if rank is None:
        return editor.op("Reshape", [rows, _shape_of_rows(editor, indices, packed)])
    shape = editor.constant([0] * rank + [packed.inputs], "embedding_shape")
    return editor.op("Reshape", [rows, shape])


def _shape_of_rows(editor: Editor, indices: ir.Value | None, packed: PackedWeight) -> ir.Value:
    width = editor.constant([packed.inputs], "embedding_width")
    return editor.op("Concat", [editor.op("Shape", [indices]), width], {"axis": 0})


def lower_to_standard(editor: Editor, weight: WeightUses, packed: PackedWeight) -> None:
    """Put DequantizeLinear between the codes and what read the weight, or its like for a codebook.

    An embedding looks up codes and scales first and dequantizes only the rows it found. What
    subgraphs read is dequantized once, in the main graph: ONNX Runtime fails where a
    DequantizeLinear lies in another graph than its codes.
    """
    transposed = weight.uses[0].transposed
    shared: ir.Value | None = None
    for user, index in list(weight.value.uses()):
        editor.root = user
        if user.op_type == "Gather":
            _replace(editor, user, _dequantized_rows(editor, user.inputs[1], packed))
            continue
        if user.graph is editor.module.graph:
            editor.set_input(user, index, _dequantized(editor, packed, transposed))
            continue
        if shared is None:
            editor.root = editor.module.graph[0]
            shared = _dequantized(editor, packed, transposed)
        editor.set_input(user, index, shared)


def _dequantized_rows(editor: Editor, indices: ir.Value | None, packed: PackedWeight) -> ir.Value:
    # One row of one block has one scale, and ONNX Runtime refuses blocks then, unless it is a
    # matrix.
    flat = packed.block_size == packed.inputs and not editor.rank(indices)
    tensors = (packed.codes, packed.scales, packed.zero_points)
    places = editor.op("Reshape", [indices, editor.constant([-1])]) if flat else indices
    found = [v if v is None else editor.op("Gather", [v, places]) for v in tensors]
    attributes = {"axis": -1, "block_size": packed.block_size}
    rows = editor.op("DequantizeLinear", _trim(found), attributes)
    if not flat:
        return rows
    return editor.op("Reshape", [rows, _shape_of_rows(editor, indices, packed)])


def _dequantized(editor: Editor, packed: PackedWeight, transposed: bool) -> ir.Value:
    if packed.grid.levels is not None:
        shape = [packed.inputs, packed.outputs]
        return _levels(editor, packed, shape[::-1] if transposed else shape)
    inputs = _trim([packed.codes, packed.scales, packed.zero_points])
    if packed.block_size:
        attributes = {"axis": int(transposed), "block_size": packed.block_size}
    else:
        attributes = {"axis": int(not transposed)}
    return editor.op("DequantizeLinear", inputs, attributes)


def _levels(editor: Editor, packed: PackedWeight, shape: list[int]) -> ir.Value:
    """Look up the levels of all codes and scale them: a weight of a shape."""
    levels = packed.grid.levels
    assert levels is not None
    table = editor.constant(levels.astype(_dtype(packed)), f"{packed.grid.codebook}_levels")
    # Gather takes no codes of 4 bits.
    codes = editor.op("Cast", [packed.codes], {"to": ir.DataType.INT32})
    scaled = editor.op("Mul", [editor.op("Gather", [table, codes]), packed.scales])
    return editor.op("Reshape", [scaled, editor.constant(shape, "weight_shape")])


def _replace(editor: Editor, node: ir.Node, result: ir.Value) -> None:
    old = node.outputs[0]
    result.type = result.type or old.type
    editor.replace(old, result)
    editor.erase(node)


def _trim(values: list[ir.Value | None]) -> list[ir.Value | None]:
    return values[:-1] if values[-1] is None else values


def _scalar(editor: Editor, number: float, node: ir.Node) -> ir.Value:
    """Return a number of the type that a node gives."""
    dtype = editor.dtype(node.outputs[0]) or ir.DataType.FLOAT
    return editor.constant(np.array(number, dtype=dtype.numpy()), "factor")


def _dtype(packed: PackedWeight) -> np.dtype[Any]:
    return packed.scales.dtype.numpy() if packed.scales.dtype else np.dtype(np.float32)


def _erase_dead(editor: Editor, node: ir.Node) -> None:
    """Erase a Transpose, and those that read it, if nothing else does."""
    for user, _ in list(node.outputs[0].uses()):
        if user.op_type == "Transpose":
            _erase_dead(editor, user)
    if editor.is_dead(node):
        editor.erase(node)


def _remove_constant(editor: Editor, value: ir.Value) -> None:
    """Take a constant that nothing reads any more out of its graph."""
    if value.uses() or value.is_graph_output():
        return
    producer = value.producer()
    if producer is not None:
        editor.erase(producer)
    elif value.graph is not None and value.name is not None:
        value.graph.initializers.pop(value.name)
