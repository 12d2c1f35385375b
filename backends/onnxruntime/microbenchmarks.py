"""The small graphs whose run times make the kernel tables of a `Target`.

Each graph holds copies of one node: copies with their own weights, so that a product with few rows
reads its weights from memory as it does inside a model, and enough of them that what a run costs
besides the kernels vanishes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from lwc.core.dialect import DOMAIN, DynamicQuantMatMul
from lwc.core.quant_layout import TILE, packed_bytes

__all__ = ["BENCHMARKS", "Benchmark", "Graph", "build"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_MICROSOFT = "com.microsoft"
_COLD_BYTES = 64 << 20
"""Weights of a graph together: more than the last-level cache of common processors."""
_MOST_WEIGHTS = 2048
_MANY = 64
_LARGE_WORK = 1 << 24
_LARGE_PRODUCT = 1 << 29


@dataclass
class Graph:
    """One node to be repeated, and what it reads.

    Attributes:
        op: Operator type.
        inputs: One entry per input: an array that is fed, `Weight` around an array that each copy
            has its own of, or None for an absent input.
        attributes: Of the node.
        domain: Operator domain.
        outputs: Number of outputs the node has.
        calls: How many kernel problems the node solves, such as its batch times heads.
    """

    op: str
    inputs: Sequence[Array | Weight | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    outputs: int = 1
    calls: int = 1


@dataclass(frozen=True)
class Weight:
    """An input that is a weight."""

    array: Array | np.generic


@dataclass(frozen=True)
class Benchmark:
    """A kernel table to measure.

    Attributes:
        kernel: The table's name, as cost rules use it.
        grid: Problem sizes along each axis.
        make: Builds the graph of one problem.
    """

    kernel: str
    grid: tuple[tuple[int, ...], ...]
    make: Callable[..., Graph]

    def problems(self) -> Iterator[tuple[int, ...]]:
        """Yield every grid point, the last axis fastest."""
        yield from itertools.product(*self.grid)


def build(graph: Graph, work: float) -> tuple[ModelProto, dict[str, Array], int]:
    """Return a model of several copies of a node, its feeds, and how many copies there are."""
    weight_bytes = sum(w.array.nbytes for w in graph.inputs if isinstance(w, Weight))
    if weight_bytes > 1 << 14:
        enough = math.ceil(_LARGE_PRODUCT / max(work, 1))
        copies = max(2, min(_MOST_WEIGHTS, math.ceil(_COLD_BYTES / weight_bytes), enough))
    else:
        copies = min(_MANY, math.ceil(_LARGE_WORK / max(work, 1)))
    feeds: dict[str, Array] = {}
    inputs, initializers, nodes = [], [], []
    outputs: list[ValueInfoProto] = []
    for index, source in enumerate(graph.inputs):
        if source is not None and not isinstance(source, Weight):
            feeds[f"x{index}"] = source
            kind = helper.np_dtype_to_tensor_dtype(source.dtype)
            # Named extents: past and present of attention are bound at different lengths.
            extents = [f"x{index}_{axis}" for axis in range(source.ndim)]
            inputs.append(helper.make_tensor_value_info(f"x{index}", kind, extents))
    for copy in range(copies):
        names = []
        for index, source in enumerate(graph.inputs):
            if isinstance(source, Weight):
                names.append(f"w{copy}_{index}")
                content = np.asarray(source.array)
                if content.nbytes > 1 << 14:  # equal weights would be packed once for all copies
                    content = content.copy()
                    content.flat[0] = copy % 100
                initializers.append(numpy_helper.from_array(content, names[-1]))
            else:
                names.append("" if source is None else f"x{index}")
        results = [f"y{copy}_{index}" for index in range(graph.outputs)]
        nodes.append(
            helper.make_node(graph.op, names, results, domain=graph.domain, **graph.attributes)
        )
        outputs.extend(helper.make_empty_tensor_value_info(name) for name in results)
    model = helper.make_model(
        helper.make_graph(nodes, "kernel", inputs, outputs, initializers),
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid(_MICROSOFT, 1),
            helper.make_opsetid("com.microsoft.nchwc", 1),
            helper.make_opsetid(DOMAIN, 1),
        ],
        ir_version=10,
    )
    return model, feeds, copies


def _floats(*shape: int) -> Array:
    """Return ordinary numbers: no zeros, infinities or denormals, on which kernels differ."""
    rng = np.random.default_rng(0)
    values: Array = rng.uniform(0.1, 1.0, size=min(math.prod(shape), 65536)).astype(np.float32)
    return np.resize(values, shape)


def _bytes(*shape: int, dtype: Any = np.uint8) -> Array:
    rng = np.random.default_rng(0)
    values: Array = rng.integers(1, 100, size=min(math.prod(shape), 65536)).astype(dtype)
    return np.resize(values, shape)


# Matrix products


def _matmul(rows: int, depth: int, columns: int) -> Graph:
    return Graph("MatMul", [_floats(rows, depth), Weight(_floats(depth, columns))])


_HEADS = 8


def _matmul_dynamic(rows: int, depth: int, columns: int) -> Graph:
    a, b = _floats(1, _HEADS, rows, depth), _floats(1, _HEADS, depth, columns)
    return Graph("MatMul", [a, b], calls=_HEADS)


def _matmul_int8(rows: int, depth: int, columns: int) -> Graph:
    scale, zero = Weight(np.float32(0.01)), Weight(np.uint8(128))
    weight = Weight(_bytes(depth, columns, dtype=np.int8))
    scales = [weight, scale, Weight(np.int8(0)), scale, zero]
    return Graph("QLinearMatMul", [_bytes(rows, depth), scale, zero, *scales])


def _matmul_int8_dynamic(rows: int, depth: int, columns: int) -> Graph:
    scale, zero = Weight(np.float32(0.01)), Weight(np.uint8(128))
    a, b = _bytes(1, _HEADS, rows, depth), _bytes(1, _HEADS, depth, columns)
    return Graph("QLinearMatMul", [a, scale, zero, b, scale, zero, scale, zero], calls=_HEADS)


def _matmul_nbits(bits: int) -> Callable[[int, int, int], Graph]:
    block = 32

    def make(rows: int, depth: int, columns: int) -> Graph:
        blocks = depth // block
        packed = Weight(_bytes(columns, blocks, block * bits // 8))
        attributes = {
            "K": depth, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4
        }  # fmt: skip
        scales = Weight(_floats(columns * blocks))
        inputs: list[Array | Weight] = [_floats(rows, depth), packed, scales]
        return Graph("MatMulNBits", inputs, attributes, _MICROSOFT)

    return make


def _dynamic_quant_matmul(bits: Literal[2, 3, 4, 8]) -> Callable[[int, int, int], Graph]:
    def make(rows: int, depth: int, columns: int) -> Graph:
        block = 0 if bits == 8 else 32
        variant = DynamicQuantMatMul(
            depth,
            columns,
            bits,
            block_size=block,
            x_block=int(block > 0),
            zero_points=int(block > 0),
        )
        tiles, blocks = -(-columns // TILE), depth // block if block else 1
        codes = _bytes(tiles, packed_bytes(depth, columns, bits) // tiles)
        scales = _floats(tiles, blocks, TILE).astype(np.float16)
        inputs: list[Array | Weight] = [_floats(rows, depth), Weight(codes), Weight(scales)]
        if block:
            inputs.append(Weight(_bytes(tiles, blocks, TILE)))
        return Graph(variant.name, inputs, variant.attributes(), DOMAIN)

    return make


# Convolutions


def _side(positions: int) -> int:
    return math.isqrt(positions)


def _conv(taps: int) -> Callable[[int, int, int], Graph]:
    kernel = math.isqrt(taps)

    def make(positions: int, depth: int, columns: int) -> Graph:
        side, channels = _side(positions), depth // taps
        attributes = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel, kernel]}
        weight = Weight(_floats(columns, channels, kernel, kernel))
        return _blocked_conv([_floats(1, channels, side, side), weight], attributes)

    return make


def _conv_transpose(positions: int, channels: int, spread: int) -> Graph:
    side, taps = _side(positions), 4
    weight = Weight(_floats(channels, spread // taps, 2, 2))
    attributes = {"strides": [2, 2], "kernel_shape": [2, 2]}
    return Graph("ConvTranspose", [_floats(1, channels, side, side), weight], attributes)


def _conv_depthwise(positions: int, channels: int, taps: int) -> Graph:
    side, kernel = _side(positions), math.isqrt(taps)
    attributes = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel] * 2, "group": channels}
    weight = Weight(_floats(channels, 1, kernel, kernel))
    return _blocked_conv([_floats(1, channels, side, side), weight], attributes)


def _blocked_conv(inputs: list[Array | Weight], attributes: dict[str, Any]) -> Graph:
    """Use the layout that ONNX Runtime's own optimizer gives convolutions on x86."""
    return Graph("Conv", inputs, attributes, "com.microsoft.nchwc")


# One pass over the elements


def _shape(elements: int, row: int) -> tuple[int, int]:
    return elements // row, row


def _unary(op: str, row: int = 64, domain: str = "", **attributes: Any) -> Callable[[int], Graph]:
    def make(elements: int) -> Graph:
        return Graph(op, [_floats(*_shape(elements, row))], attributes, domain)

    return make


def _with_vector(op: str, domain: str = "", vectors: int = 1) -> Callable[[int], Graph]:
    def make(elements: int) -> Graph:
        weights = [Weight(_floats(256)) for _ in range(vectors)]
        return Graph(op, [_floats(*_shape(elements, 256)), *weights], {}, domain)

    return make


def _skip_norm(op: str, vectors: int) -> Callable[[int], Graph]:
    def make(elements: int) -> Graph:
        array = _floats(1, *_shape(elements, 256))
        weights = [Weight(_floats(256)) for _ in range(vectors)]
        return Graph(op, [array, array.copy(), *weights], {}, _MICROSOFT)

    return make


def _binary(op: str) -> Callable[[int], Graph]:
    def make(elements: int) -> Graph:
        array = _floats(*_shape(elements, 64))
        return Graph(op, [array, array.copy()])

    return make


def _where(elements: int) -> Graph:
    array = _floats(*_shape(elements, 64))
    return Graph("Where", [array > 0.5, array, np.zeros((), np.float32)])


def _pow(elements: int) -> Graph:
    return Graph("Pow", [_floats(*_shape(elements, 64)), Weight(np.float32(2.0))])


def _cast(elements: int) -> Graph:
    array = np.ones(_shape(elements, 64), np.int64)
    return Graph("Cast", [array], {"to": TensorProto.FLOAT})


def _quantize(elements: int) -> Graph:
    scale, zero = Weight(np.float32(0.01)), Weight(np.uint8(128))
    return Graph("QuantizeLinear", [_floats(*_shape(elements, 64)), scale, zero])


def _dequantize(elements: int) -> Graph:
    scale, zero = Weight(np.float32(0.01)), Weight(np.uint8(128))
    return Graph("DequantizeLinear", [_bytes(*_shape(elements, 64)), scale, zero])


def _reduce(elements: int) -> Graph:
    axes = Weight(np.array([-1], np.int64))
    return Graph("ReduceMean", [_floats(*_shape(elements, 256)), axes], {"keepdims": 1})


def _resize(mode: str) -> Callable[[int], Graph]:
    def make(elements: int) -> Graph:
        side = math.isqrt(elements // 16 // 4)
        scales = Weight(np.array([1, 1, 2, 2], np.float32))
        return Graph("Resize", [_floats(1, 16, side, side), None, scales], {"mode": mode})

    return make


# Moving bytes


def _copy(nbytes: int) -> Graph:
    half = _floats(*_shape(nbytes // 8, 64))
    return Graph("Concat", [half, half.copy()], {"axis": -1})


def _transpose(nbytes: int) -> Graph:
    heads, width = 8, 32
    array = _floats(1, nbytes // 4 // (heads * width), heads, width)
    return Graph("Transpose", [array], {"perm": [0, 2, 1, 3]})


def _gather(nbytes: int) -> Graph:
    width = 256
    rows = nbytes // 4 // width
    index = np.random.default_rng(0).integers(0, 8192, rows)
    return Graph("Gather", [Weight(_floats(8192, width)), index])


# Attention


def _group_query(queries: int, keys: int, head: int) -> Graph:
    heads, kv_heads = 8, 2
    keys = max(keys, queries)
    past = keys - queries
    q = _floats(1, queries, heads * head)
    k = _floats(1, queries, kv_heads * head)
    cache = _floats(1, kv_heads, past, head)
    lengths, longest = np.array([keys - 1], np.int32), np.array(keys, np.int32)
    inputs = [q, k, k.copy(), cache, cache.copy(), lengths, longest]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads}
    return Graph("GroupQueryAttention", inputs, attributes, _MICROSOFT, 3, heads)


def _multi_head(queries: int, keys: int, head: int) -> Graph:
    q, k = _floats(1, queries, _HEADS * head), _floats(1, max(keys, queries), _HEADS * head)
    attributes = {"num_heads": _HEADS}
    return Graph("MultiHeadAttention", [q, k, k.copy()], attributes, _MICROSOFT, 1, _HEADS)


def _attention(queries: int, keys: int, head: int) -> Graph:
    q, k = _floats(1, _HEADS, queries, head), _floats(1, _HEADS, max(keys, queries), head)
    return Graph("Attention", [q, k, k.copy()], calls=_HEADS)


_BITS: tuple[Literal[2, 3, 4, 8], ...] = (2, 3, 4, 8)
_ELEMENTS = ((4096, 65536, 1048576, 8388608),)
_MOVED = ((16384, 262144, 4194304, 33554432),)
_RESIZED = ((16384, 262144),)
_PRODUCTS = ((1, 4, 16, 64, 512), (128, 768, 3072), (128, 768, 3072))
_BATCHED = ((1, 16, 128, 512), (32, 128, 512), (32, 128, 512))
_QUANTIZED = ((1, 16, 64, 512), (256, 2048), (256, 2048))
_ATTENTION = ((1, 32, 256), (32, 256, 1024), (64, 128))

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("matmul", _PRODUCTS, _matmul),
    Benchmark("matmul_dynamic", _BATCHED, _matmul_dynamic),
    Benchmark("matmul_nbits4", _QUANTIZED, _matmul_nbits(4)),
    Benchmark("matmul_nbits8", _QUANTIZED, _matmul_nbits(8)),
    *(Benchmark(f"lwc_matmul{b}", _QUANTIZED, _dynamic_quant_matmul(b)) for b in _BITS),
    Benchmark("matmul_int8", _QUANTIZED, _matmul_int8),
    Benchmark("matmul_int8_dynamic", ((16, 128), (32, 128), (32, 128)), _matmul_int8_dynamic),
    Benchmark("conv", ((196, 3136), (144, 576, 2304), (16, 64, 256)), _conv(9)),
    Benchmark("conv_pointwise", ((196, 3136), (32, 128, 512), (32, 128, 512)), _conv(1)),
    Benchmark("conv_transpose", ((196, 3136), (64, 384), (64, 512)), _conv_transpose),
    Benchmark("conv_depthwise", ((196, 3136), (32, 256), (9, 25)), _conv_depthwise),
    Benchmark("attention", _ATTENTION, _attention),
    Benchmark("gqa", _ATTENTION, _group_query),
    Benchmark("mha", _ATTENTION, _multi_head),
    Benchmark("binary", _ELEMENTS, _binary("Add")),
    Benchmark("compare", _ELEMENTS, _binary("Greater")),
    Benchmark("where", _ELEMENTS, _where),
    Benchmark("relu", _ELEMENTS, _unary("Relu")),
    Benchmark("sigmoid", _ELEMENTS, _unary("Sigmoid")),
    Benchmark("tanh", _ELEMENTS, _unary("Tanh")),
    Benchmark("erf", _ELEMENTS, _unary("Erf")),
    Benchmark("exp", _ELEMENTS, _unary("Exp")),
    Benchmark("pow", _ELEMENTS, _pow),
    Benchmark("gelu", _ELEMENTS, _with_vector("BiasGelu", _MICROSOFT)),
    Benchmark("softmax", _ELEMENTS, _unary("Softmax", row=128)),
    Benchmark("layer_norm", _ELEMENTS, _with_vector("LayerNormalization", vectors=2)),
    Benchmark("rms_norm", _ELEMENTS, _with_vector("SimplifiedLayerNormalization")),
    Benchmark("skip_layer_norm", _ELEMENTS, _skip_norm("SkipLayerNormalization", 2)),
    Benchmark("skip_rms_norm", _ELEMENTS, _skip_norm("SkipSimplifiedLayerNormalization", 1)),
    Benchmark("reduce", _ELEMENTS, _reduce),
    Benchmark("resize_nearest", _RESIZED, _resize("nearest")),
    Benchmark("resize_linear", _RESIZED, _resize("linear")),
    Benchmark("resize_cubic", _RESIZED, _resize("cubic")),
    Benchmark("cast", _ELEMENTS, _cast),
    Benchmark("quantize", _ELEMENTS, _quantize),
    Benchmark("dequantize", _ELEMENTS, _dequantize),
    Benchmark("copy", _MOVED, _copy),
    Benchmark("transpose", _MOVED, _transpose),
    Benchmark("gather", _MOVED, _gather),
)
