"""What `quantize-weights` makes of a weight: bits, blocks, layout, and why some stay."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from lwc.core.diagnostics import describe
from lwc.core.errors import PassError
from lwc.core.quant_layout import TILE, packed_bytes
from lwc.passes.quantization.outlier_columns import is_outlier_part
from lwc.passes.quantization.rounding import Grid
from lwc.passes.quantization.streaming import Layout, WeightSpec
from lwc.passes.quantization.weight_uses import WeightUse, WeightUses
from lwc.rewrite import producer_of
from lwc.rewrite.editor import Editor

if TYPE_CHECKING:
    from lwc.passes.quantization.quantize_weights import Bits, QuantizeWeights

__all__ = ["WeightForms", "matches"]

_WORTHWHILE = 0.75
"""A weight stays as it is if its quantized form takes more than this fraction of its bytes."""


class WeightForms:
    """Decides for each weight, by the options of the pass.

    Args:
        options: The pass.
        assigned: Bits of some weights of linear layers, over those of the pass.
        editor: Knows the module.
    """

    def __init__(
        self,
        options: QuantizeWeights,
        assigned: Mapping[ir.Value, Bits],
        editor: Editor,
    ) -> None:
        self._options = options
        self._assigned = assigned
        self._editor = editor

    def obstacle(self, weight: WeightUses) -> str | None:
        """Say why a weight stays as it is, or return None."""
        if weight.obstacle is not None:
            return weight.obstacle
        roles = {use.role for use in weight.uses}
        if "Gather" in roles and self._options.embeddings is None:
            return "it is an embedding table, and embeddings=none"
        unwanted = sorted(roles - {"Gather"} - set(self._options.ops))
        if unwanted:
            return f"{unwanted[0]} is not among ops"
        if any(is_outlier_part(use, self._editor) for use in weight.uses):
            return "it multiplies the channels that an int8 product leaves in floating point"
        pattern = self._excluded(weight)
        if pattern is not None:
            return f"exclude={pattern} matches"
        if any(self._editor.in_function(use.node) for use in weight.uses):
            return "it belongs to a function body, which holds no initializers"
        layout = self._layout(weight)
        if layout == "tiles" and weight.tensor.dtype != ir.DataType.FLOAT:
            return f"its type is {weight.tensor.dtype}, and products in int8 take float32"
        if weight.tensor.dtype == ir.DataType.BFLOAT16 and layout != "qdq":
            raise PassError(
                f"'{weight.value.name}' is bfloat16, for which ONNX Runtime has no CPU kernel",
                node=describe(weight.uses[0].node),
                remedy="run this before convert-dtype, or use float16 or format=qdq",
            )
        if weight.tensor.dtype not in (
            ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
        ):  # fmt: skip
            return f"its type is {weight.tensor.dtype}"
        inputs, _ = weight.extents
        size = self._block(weight)
        whole = self._is_nf4(weight) or ("Gather" in roles and layout != "tiles")
        if whole and size and inputs % size:
            return f"rows of {inputs} do not divide into blocks of {size}"
        if "Gather" in roles and layout == "qdq" and (size == 0 or self._options.embeddings == 4):
            return "a standard embedding needs 8 bits in blocks"
        if any(
            use.role == "MatMul" and self._editor.rank(use.node.inputs[0]) == 1
            for use in weight.uses
        ):
            return "the left operand is a vector"
        small = self.packed_bytes(weight)
        if small > _WORTHWHILE * weight.tensor.nbytes:
            return f"it is too small: {weight.tensor.nbytes} bytes would become {small}"
        return None

    def _excluded(self, weight: WeightUses) -> str | None:
        return next((each for each in self._options.exclude if matches(weight, each)), None)

    def bits(self, weight: WeightUses) -> Bits:
        """Return the bits of a weight."""
        table = any(use.role == "Gather" for use in weight.uses)
        if table and self._options.embeddings:
            return self._options.embeddings
        return self._assigned.get(weight.value, self._options.bits)

    def _block(self, weight: WeightUses) -> int:
        """Return the block size of a weight; 0 is one block for all inputs."""
        layout = self._layout(weight)
        if self._options.block_size or (self._options.block_size == 0 and layout == "qdq"):
            return self._options.block_size
        if self._options.block_size == 0 and layout == "tiles" and not weight.tied:
            return 0
        if layout == "tiles":
            return 32
        if self._is_nf4(weight):
            return 64
        rounds = layout != "qdq" and self._options.accuracy_level == 4
        fine = rounds and self.bits(weight) == 8
        return 16 if fine and all(_reads_product(use, self._editor) for use in weight.uses) else 32

    def _layout(self, weight: WeightUses) -> Layout:
        if self._options.format == "qdq":
            return "qdq"
        if all(use.role == "Gather" for use in weight.uses):
            return "table"
        if self._is_nf4(weight):
            return "bnb4"
        return "matmulnbits" if self._options.format == "matmulnbits" else "tiles"

    def _is_nf4(self, weight: WeightUses) -> bool:
        return self._options.codebook == "nf4" and all(use.role != "Gather" for use in weight.uses)

    def _is_symmetric(self, weight: WeightUses) -> bool:
        # A shared 4-bit table would need its zero points packed in two ways.
        shared = weight.tied and self.bits(weight) == 4 and self._layout(weight) != "tiles"
        return self._options.symmetric or shared or self._is_nf4(weight)

    def packed_bytes(self, weight: WeightUses) -> int:
        """Return the bytes that a weight's codes, scales and zero points take."""
        bits = self.bits(weight)
        inputs, outputs = weight.extents
        size = self._block(weight) or inputs
        blocks = -(-inputs // size)
        if self._layout(weight) == "tiles":
            each = 2 if self._is_symmetric(weight) else 3  # of a scale and a zero point
            return packed_bytes(inputs, outputs, bits) + -(-outputs // TILE) * TILE * blocks * each
        zeros = 0 if self._is_symmetric(weight) else -(-blocks * bits // 8)
        codes = blocks * size * bits // 8
        return outputs * (codes + zeros + blocks * weight.tensor.dtype.bitwidth // 8)

    def spec(self, weight: WeightUses) -> WeightSpec:
        """Say how to quantize a weight.

        Raises:
            PassError: The module's opset cannot express it.
        """
        bits, size = self.bits(weight), self._block(weight)
        layout = self._layout(weight)
        codebook: Literal["uniform", "nf4"] = "nf4" if self._is_nf4(weight) else "uniform"
        grid = Grid(
            bits, self._is_symmetric(weight), self._options.search, codebook,
            short_scales=layout == "tiles",
        )  # fmt: skip
        if layout == "qdq":
            self._check_opset(weight, bits, size, self._editor.module.opset)
        return WeightSpec(grid, size, weight.uses[0].transposed, layout)

    def _check_opset(self, weight: WeightUses, bits: int, size: int, opset: int) -> None:
        if bits == 2:
            raise PassError(
                "DequantizeLinear with 2 bits needs opset 25, for which lwc does not write it",
                node=describe(weight.uses[0].node),
                remedy="use format=matmulnbits",
            )
        if bits == 4 or size:
            needed, what = 21, "a standard form in blocks or with 4 bits"
        else:
            half = weight.tensor.dtype != ir.DataType.FLOAT
            needed, what = (19, "DequantizeLinear to float16") if half else (13, "")
        if opset < needed:
            raise PassError(
                f"{what} needs opset {needed}, the model has {opset}",
                node=describe(weight.uses[0].node),
                remedy="export the model at that opset, use format=matmulnbits, or, for 8-bit "
                "layers, block-size=0 embeddings=none",
            )


def _reads_product(use: WeightUse, editor: Editor) -> bool:
    """Tell whether a layer's input is a product of two activations of one shape.

    The gate of a norm has an extent of one, and a weight is no activation: norms are none.
    """
    product = producer_of(use.node.inputs[0], "Mul") if use.role != "Gather" else None
    if product is None or any(editor.tensor(factor) is not None for factor in product.inputs):
        return False
    return editor.same_shape(*product.inputs)


def matches(weight: WeightUses, pattern: str) -> bool:
    """Tell whether a pattern of `exclude` names a weight or a node that reads it."""
    names = [weight.value.name, *(use.node.name for use in weight.uses)]
    return any(name is not None and fnmatchcase(name, pattern) for name in names)
