"""Keep GGUF's quantized blocks in ONNX: the same integers and scales, not quantized again.

A block of 32 weights along a row is `d * (q - z)` in Q4_0 (z = 8) and Q8_0 (signed q), and
`d * q + m` in Q4_1, with d and m in float16. The first two are com.microsoft::MatMulNBits with
its default zero points. Q4_1 is that plus a block-sum term, centred as `d * (q - 8) + (m + 8 d)`:

    y[n] = sum_k d[n, k/32] (q[n, k] - 8) x[k]  +  sum_b (m + 8 d)[n, b] (sum of x over block b)

Centred, the first sum is as small as it can be, and so is what accuracy_level 4 adds by rounding
x to int8 (.6 % of SmolLM2's perplexity over 1,536 tokens; zero points 0: 1.9 %).
Scales stay float16 in the file and are cast where they are used, which ONNX Runtime does once,
when it loads the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.diagnostics import Remark
from lwc.core.module import Module
from lwc.frontend.gguf_file import GgufFile, GgufTensor

__all__ = ["BLOCK_SIZE", "PackedBlocks", "StoredWeight", "keep_quantized_blocks", "repack"]

BLOCK_SIZE = 32
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_MICROSOFT = "com.microsoft"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredWeight:
    """Where a parameter's content lies.

    Attributes:
        tensor: The tensor in the file.
        row_order: The stored row of each row, or None when the parameter is not the stored
            matrix with its rows moved.
    """

    tensor: GgufTensor
    row_order: Array | None


@dataclass(frozen=True)
class PackedBlocks:
    """A matrix `[rows, columns]` in MatMulNBits' layout.

    Attributes:
        bits: 4 or 8.
        values: uint8 `[rows, columns / 32, 4 * bits]`; of two 4-bit values the first is low.
        scales: float16 `[rows, columns / 32]`.
        offsets: float32 `[rows, columns / 32]`, what each weight of a block has on top of its
            centred value, for Q4_1; else None.
    """

    bits: int
    values: Array
    scales: Array
    offsets: Array | None


def repack(blocks: Array, kind: str) -> PackedBlocks:
    """Turn the stored rows of a Q4_0, Q4_1 or Q8_0 tensor into MatMulNBits' layout.

    GGUF's 4-bit blocks hold element j in the low and element j + 16 in the high half of byte j.

    Args:
        blocks: uint8 `[rows, bytes per row]`.
        kind: The block format.
    """
    halves = 2 if kind == "Q4_1" else 1
    bits = _BITS[kind]
    fields = blocks.reshape(len(blocks), -1, 2 * halves + 4 * bits)
    scales = fields[..., :2].copy().view(np.float16)[..., 0]
    offsets = None
    if kind == "Q4_1":
        minima = fields[..., 2:4].copy().view(np.float16)[..., 0]
        offsets = minima.astype(np.float32) + 8 * scales.astype(np.float32)
    payload = fields[..., 2 * halves :]
    if bits == 8:
        return PackedBlocks(bits, payload ^ np.uint8(0x80), scales, offsets)
    elements = np.concatenate([payload & 0x0F, payload >> 4], axis=-1)
    return PackedBlocks(bits, elements[..., 0::2] | elements[..., 1::2] << 4, scales, offsets)


def keep_quantized_blocks(
    module: Module, file: GgufFile, stored: Mapping[str, StoredWeight], *, accuracy_level: int
) -> None:
    """Replace linears and embeddings over quantized weights by operators on the blocks.

    A weight that an embedding and a linear share stays one tensor, reshaped between the two
    operators' layouts. Weights in other block formats, or used in another way, stay decoded to
    float32, with a remark.

    Args:
        module: The traced model, its initializers bound to the file.
        file: The file.
        stored: The tensor behind each initializer, by the initializer's name.
        accuracy_level: MatMulNBits' attribute.
    """
    keeper = _Keeper(module, file, accuracy_level)
    decoded: Counter[str] = Counter()
    for name, weight in stored.items():
        value = module.graph.initializers[name]
        if not keeper.keep(value, weight) and len(weight.tensor.shape) == 2:
            decoded[weight.tensor.kind] += 1
    if keeper.kept:
        message = f"kept {keeper.kept} weights in GGUF blocks; accuracy_level={accuracy_level}"
        module.remarks.emit(Remark("applied", "gguf", message))
    for kind, count in sorted(decoded.items()):
        message = f"decoded {count} matrices to float32 that are in {kind} or not plain linears"
        module.remarks.emit(Remark("missed", "gguf", message, rule="keep-blocks"))


class _Keeper:
    def __init__(self, module: Module, file: GgufFile, accuracy_level: int) -> None:
        self.module = module
        self.graph = module.graph
        self.file = file
        self.accuracy_level = accuracy_level
        self.kept = 0
        self._block_sums: dict[ir.Value, ir.Value] = {}

    def keep(self, value: ir.Value, weight: StoredWeight) -> bool:
        """Replace every use of `value`, or none: then return False."""
        kind = weight.tensor.kind
        uses = _plain_uses(value)
        if weight.row_order is None or kind not in _BITS or uses is None:
            return False
        linears, gathers = uses
        if gathers and kind == "Q4_1":  # GatherBlockQuantized has no offsets
            return False
        packed = repack(self.file.blocks(weight.tensor)[weight.row_order], kind)
        table = self._initializer(f"{value.name}.blocks", packed.values)
        scales = self._float32(f"{value.name}.scales", packed.scales)
        offsets = None
        if packed.offsets is not None:
            offsets = self._initializer(f"{value.name}.offsets", packed.offsets.T.copy())
        for transpose, matmul in linears:
            self._linear(matmul, packed, table, scales, offsets)
            if not transpose.outputs[0].uses():
                self.graph.remove(transpose, safe=True)
        for gather in gathers:
            self._embedding(gather, packed, table, scales)
        del self.graph.initializers[str(value.name)]
        self.kept += 1
        return True

    def _linear(
        self,
        matmul: ir.Node,
        packed: PackedBlocks,
        table: ir.Value,
        scales: ir.Value,
        offsets: ir.Value | None,
    ) -> None:
        rows, blocks, _ = packed.values.shape
        x = matmul.inputs[0]
        assert x is not None
        product = self._node(
            _MICROSOFT,
            "MatMulNBits",
            [x, table, scales],
            {
                "K": blocks * BLOCK_SIZE,
                "N": rows,
                "bits": packed.bits,
                "block_size": BLOCK_SIZE,
                "accuracy_level": self.accuracy_level,
            },
            before=matmul,
        )
        if offsets is not None:
            sums = self._sums_over_blocks(x, blocks)
            term = self._node("", "MatMul", [sums, offsets], {}, before=matmul)
            product = self._node("", "Add", [product, term], {}, before=matmul)
        self._replace(matmul, product)

    def _embedding(
        self, gather: ir.Node, packed: PackedBlocks, table: ir.Value, scales: ir.Value
    ) -> None:
        rows = len(packed.values)
        layout = self._initializer("blocks_as_rows", np.array([rows, -1], np.int64))
        data = self._node("", "Reshape", [table, layout], {}, before=gather)
        found = self._node(
            _MICROSOFT,
            "GatherBlockQuantized",
            [data, gather.inputs[1], scales],
            {
                "gather_axis": 0,
                "quantize_axis": 1,
                "block_size": BLOCK_SIZE,
                "bits": packed.bits,
            },
            before=gather,
        )
        self._replace(gather, found)

    def _sums_over_blocks(self, x: ir.Value, blocks: int) -> ir.Value:
        """Return `x` `[..., K]` summed over blocks of K, `[..., K / 32]`; one per value."""
        if x not in self._block_sums:
            assert x.shape is not None
            dims = [0] * (len(x.shape) - 1) + [blocks, BLOCK_SIZE]
            layout = self._initializer("blocks_apart", np.array(dims, np.int64))
            last = self._initializer("last_axis", np.array([-1], np.int64))
            # Right after `x`, since its users come to this in any order.
            apart = self._node("", "Reshape", [x, layout], {}, after=x.producer())
            self._block_sums[x] = self._node(
                "", "ReduceSum", [apart, last], {"keepdims": 0}, after=apart.producer()
            )
        return self._block_sums[x]

    def _float32(self, name: str, content: Array) -> ir.Value:
        stored = self._initializer(name, content)
        return self._node("", "Cast", [stored], {"to": int(ir.DataType.FLOAT)})

    def _initializer(self, name: str, content: Array) -> ir.Value:
        return self.module.add_initializer(name, self.module.store.put(content))

    def _node(
        self,
        domain: str,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int],
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
    ) -> ir.Value:
        """Insert a node with one output, at the front by default, and return that output."""
        if domain:
            self.module.import_opset(domain, 1)
        output = ir.Value(name=self.module.fresh_name(f"{op}_blocks"))
        made = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        node = ir.Node(domain, op, inputs, made, outputs=[output])
        node.name = self.module.fresh_name(f"node_{op}_blocks")
        if after is not None:
            self.graph.insert_after(after, node)
        else:
            self.graph.insert_before(before or self.graph[0], node)
        return output

    def _replace(self, old: ir.Node, new: ir.Value) -> None:
        """Let `new` take the place and the name of the output of `old`."""
        output = old.outputs[0]
        new.type, new.shape = output.type, output.shape
        producer = new.producer()
        if producer is not None:
            producer.metadata_props.update(old.metadata_props)
        ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
        name = output.name
        self.graph.remove(old, safe=True)
        new.name = name


def _plain_uses(value: ir.Value) -> tuple[list[tuple[ir.Node, ir.Node]], list[ir.Node]] | None:
    """Return the (Transpose, MatMul) pairs and the Gathers that use a weight, or None."""
    linears: list[tuple[ir.Node, ir.Node]] = []
    gathers: list[ir.Node] = []
    for use in value.uses():
        node = use.node
        if node.op_type == "Gather" and use.idx == 0 and _axis(node) == 0:
            gathers.append(node)
        elif node.op_type == "Transpose":
            products = list(node.outputs[0].uses())
            if any(p.node.op_type != "MatMul" or p.idx != 1 for p in products):
                return None
            linears.extend((node, product.node) for product in products)
        else:
            return None
    return linears, gathers


def _axis(gather: ir.Node) -> int:
    attribute = gather.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int()
