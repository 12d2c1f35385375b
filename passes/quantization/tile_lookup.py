"""Looking up rows of a table in the packed codes of the product that shares it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.core.quant_layout import STEP, TILE
from lwc.rewrite.editor import Editor

__all__ = ["lookup_in_tiles"]


def lookup_in_tiles(
    editor: Editor,
    indices: ir.Value,
    tensors: tuple[ir.Value, ir.Value, ir.Value | None],
    shape: tuple[int, int],
    *,
    bits: int,
    block_size: int,
) -> ir.Value:
    """Return float32 `[..., inputs]` for integers `[...]`, in standard operators.

    Only bytes of the rows that are asked for are read. Tensors are flat, since ONNX Runtime would
    keep a second copy of one that is reshaped.

    Args:
        editor: Makes nodes before its root.
        indices: Rows, from -rows to rows - 1.
        tensors: Codes, scales and zero points of `lwc.core.quant_layout`, flat.
        shape: Inputs of the product, and its outputs, which are the rows of the table.
        bits: 4 or 8.
        block_size: Inputs that share a scale; 0 for all.
    """
    codes, scales, zero_points = tensors
    inputs, rows = shape
    places = np.arange(inputs)
    lines = places // 4
    each = 8 // bits  # lines that share bytes
    offsets = lines // each * (4 * TILE) + places % 4
    blocks = -(-inputs // block_size) if block_size else 1
    tile_bytes = -(-inputs // STEP) * STEP * TILE * bits // 8

    def number(value: int) -> ir.Value:
        return editor.constant(np.array(value, np.int64), "number")

    last = editor.constant([-1], "last_axis")
    # A table of its own numbers takes indices as the table of weights did: from the end too, and
    # none beyond it.
    row = editor.op("Gather", [editor.constant(np.arange(rows), "rows"), indices])
    row = editor.op("Unsqueeze", [row, last])
    tile, column = (editor.op(op, [row, number(TILE)]) for op in ("Div", "Mod"))

    def taken(tensor: ir.Value, of_tile: int, of_column: int, within: list[int]) -> ir.Value:
        """Gather what lies at some places behind a row's first."""
        first = editor.op(
            "Add",
            [
                editor.op("Mul", [tile, number(of_tile)]),
                editor.op("Mul", [column, number(of_column)]),
            ],
        )
        return editor.op("Gather", [tensor, editor.op("Add", [first, editor.constant(within)])])

    found = taken(codes, tile_bytes, 4, offsets.tolist())
    if bits == 4:
        # Shifting left drops what is above a code.
        up = editor.constant((4 - 4 * (lines % 2)).astype(np.uint8), "shifts")
        found = editor.op("BitShift", [found, up], {"direction": "LEFT"})
        down = editor.constant(np.array(4, np.uint8), "shift")
        found = editor.op("BitShift", [found, down], {"direction": "RIGHT"})

    def of_blocks(tensor: ir.Value) -> ir.Value:
        per_block = taken(tensor, blocks * TILE, 1, [TILE * block for block in range(blocks)])
        real = editor.op("Cast", [per_block], {"to": ir.DataType.FLOAT})
        if blocks == 1:
            return real
        which = editor.constant((places // block_size).tolist(), "blocks")
        return editor.op("Gather", [real, which], {"axis": -1})

    if zero_points is None:
        zeros = editor.constant(np.array(1 << (bits - 1), np.float32), "middle")
    else:
        zeros = of_blocks(zero_points)
    real = editor.op("Cast", [found], {"to": ir.DataType.FLOAT})
    return editor.op("Mul", [editor.op("Sub", [real, zeros]), of_blocks(scales)])
