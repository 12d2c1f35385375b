"""Make a llama-shaped ONNX model of any size with random weights, at the speed of the disk.

    tools/make_llama.py -o llama7b/model.onnx
    tools/make_llama.py --layers 2 --hidden 64 --ffn 128 --heads 4 --vocab 100 -o tiny/model.onnx

The defaults are Llama-2-7B's: 6.7 billion parameters, 13.5 GB in float16. The graph is a real
one: RMS norms, rotary positions, causal attention with grouped keys, a gated MLP, an untied head;
inputs `input_ids` and `position_ids` [batch, sequence], output `logits` [batch, sequence, vocab].
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

_POOL = 1 << 24
_DTYPES: dict[str, tuple[int, Any]] = {
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama; `kv_heads=0` means as many as `heads`.

    Raises:
        ValueError: A size is not positive, the heads do not divide the hidden size into even
            parts, or the kv-heads do not divide the heads.
    """

    layers: int = 32
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    kv_heads: int = 0
    vocab: int = 32000

    def __post_init__(self) -> None:
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if min(vars(self).values()) < 1:
            raise ValueError("sizes are positive")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} gives {self.heads} heads no even size")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} kv-heads do not divide {self.heads} heads")

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


class WeightFile:
    """Writes random weights one after another; each is a stretch of one pool of normal numbers."""

    def __init__(self, path: Path, dtype: str, seed: int) -> None:
        self._file = path.open("wb")
        self._name = path.name
        self._element, self._dtype = _DTYPES[dtype]
        self._rng = np.random.default_rng(seed)
        pool = self._rng.standard_normal(_POOL, dtype=np.float32).astype(self._dtype)
        self._pools = {1.0: pool}
        self.initializers: list[TensorProto] = []
        self.parameters = 0

    def random(self, name: str, shape: Sequence[int]) -> str:
        """Add a weight of standard deviation 1 / sqrt(rows), or .02 for an embedding."""
        deviation = 0.02 if name == "embed" else 1 / math.sqrt(shape[0])
        pool = self._pools.get(deviation)
        if pool is None:
            unit = self._pools[1.0].astype(np.float32)
            pool = self._pools[deviation] = (unit * deviation).astype(self._dtype)
        left = math.prod(shape)
        start = int(self._rng.integers(len(pool)))
        position = self._file.tell()
        while left:
            piece = pool[start : start + left]
            self._file.write(piece.data)
            left -= len(piece)
            start = 0
        self._declare(name, shape, position)
        return name

    def ones(self, name: str, size: int) -> str:
        """Add a norm's weight."""
        position = self._file.tell()
        self._file.write(np.ones(size, self._dtype).data)
        self._declare(name, (size,), position)
        return name

    def close(self) -> None:
        self._file.close()

    def _declare(self, name: str, shape: Sequence[int], position: int) -> None:
        tensor = TensorProto(name=name, data_type=self._element, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = self._file.tell() - position
        for key, value in (("location", self._name), ("offset", position), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.parameters += math.prod(shape)
        # Page-aligned, so that the file can be mapped at each weight.
        self._file.seek(-(-self._file.tell() // 4096) * 4096)


class GraphBuilder:
    """Collects nodes and small constants."""

    def __init__(self, dtype: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._dtype = _DTYPES[dtype][1]

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [output], name=output, **attributes)
        )
        return output

    def ints(self, *values: int) -> str:
        return self._constant("_".join(["ints", *map(str, values)]), np.array(values, np.int64))

    def real(self, value: float) -> str:
        return self._constant(f"real_{value:.3g}", np.array(value, self._dtype))

    def array(self, name: str, value: np.ndarray[Any, Any]) -> str:
        return self._constant(name, value)

    def _constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.constants.setdefault(name, onnx.numpy_helper.from_array(value, name))
        return name


def make_llama(path: Path, shape: Shape, dtype: str = "float16", seed: int = 0) -> int:
    """Write the model and its data file; return the number of parameters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = WeightFile(path.with_name(path.name + ".data"), dtype, seed)
    graph = GraphBuilder(dtype)
    element = _DTYPES[dtype][0]
    hidden = graph.op(
        "Gather", [weights.random("embed", (shape.vocab, shape.hidden)), "input_ids"], "embedded"
    )
    cos, sin = _rotary_tables(graph, shape, element)
    mask = _causal_mask(graph, dtype)
    for index in range(shape.layers):
        hidden = _layer(graph, weights, shape, f"layer{index}", hidden, cos, sin, mask)
    hidden = _norm(graph, weights, shape, "final", hidden)
    graph.op("MatMul", [hidden, weights.random("head", (shape.hidden, shape.vocab))], "logits")
    weights.close()
    tokens = ["batch", "sequence"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "llama",
            [
                helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens),
                helper.make_tensor_value_info("position_ids", TensorProto.INT64, tokens),
            ],
            [helper.make_tensor_value_info("logits", element, [*tokens, shape.vocab])],
            [*graph.constants.values(), *weights.initializers],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    path.write_bytes(model.SerializeToString())
    return weights.parameters


def _rotary_tables(graph: GraphBuilder, shape: Shape, element: int) -> tuple[str, str]:
    """Return cos and sin [batch, 1, sequence, head_size]."""
    half = shape.head_size // 2
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    positions = graph.op("Cast", ["position_ids"], "positions_real", to=TensorProto.FLOAT)
    column = graph.op("Unsqueeze", [positions, graph.ints(1, 3)], "positions_column")
    angles = graph.op("Mul", [column, graph.array("frequencies", frequencies)], "angles_half")
    angles = graph.op("Concat", [angles, angles], "angles", axis=-1)
    tables = []
    for function in ("Cos", "Sin"):
        table = graph.op(function, [angles], f"{function.lower()}_wide")
        tables.append(graph.op("Cast", [table], function.lower(), to=element))
    return tables[0], tables[1]


def _causal_mask(graph: GraphBuilder, dtype: str) -> str:
    """Return [sequence, sequence]: 0 on and under the diagonal, a large negative number above."""
    length = graph.op("Shape", ["input_ids"], "length", start=1, end=2)
    square = graph.op("Concat", [length, length], "mask_shape", axis=0)
    full = graph.op(
        "ConstantOfShape",
        [square],
        "mask_full",
        value=onnx.numpy_helper.from_array(np.array([-30000.0], _DTYPES[dtype][1])),
    )
    one = graph.array("one", np.array(1, np.int64))
    return graph.op("Trilu", [full, one], "mask", upper=1)


def _norm(graph: GraphBuilder, weights: WeightFile, shape: Shape, name: str, value: str) -> str:
    """x / sqrt(mean(x^2) + eps) * weight, in float32 as llama computes it."""
    wide = graph.op("Cast", [value], f"{name}.wide", to=TensorProto.FLOAT)
    square = graph.op("Mul", [wide, wide], f"{name}.square")
    mean = graph.op("ReduceMean", [square, graph.ints(-1)], f"{name}.mean", keepdims=1)
    epsilon = graph.array("epsilon", np.array(1e-5, np.float32))
    root = graph.op("Sqrt", [graph.op("Add", [mean, epsilon], f"{name}.mean_eps")], f"{name}.rms")
    normal = graph.op("Div", [wide, root], f"{name}.normal_wide")
    weight = weights.ones(f"{name}.weight", shape.hidden)
    normal = graph.op("CastLike", [normal, weight], f"{name}.normal")
    return graph.op("Mul", [normal, weight], f"{name}.norm")


def _layer(  # noqa: PLR0917
    graph: GraphBuilder,
    weights: WeightFile,
    shape: Shape,
    name: str,
    hidden: str,
    cos: str,
    sin: str,
    mask: str,
) -> str:
    def linear(value: str, kind: str, inputs: int, outputs: int) -> str:
        weight = weights.random(f"{name}.{kind}.weight", (inputs, outputs))
        return graph.op("MatMul", [value, weight], f"{name}.{kind}")

    def heads(value: str, count: int) -> str:
        split = graph.op("Reshape", [value, graph.ints(0, 0, count, -1)], f"{value}.split")
        return graph.op("Transpose", [split], f"{value}.heads", perm=[0, 2, 1, 3])

    def rotate(value: str) -> str:
        half = shape.head_size // 2
        parts = [f"{value}.first", f"{value}.second"]
        graph.nodes.append(
            helper.make_node(
                "Split", [value, graph.ints(half, half)], parts, value + ".parts", axis=3
            )
        )
        turned = graph.op(
            "Concat",
            [graph.op("Neg", [parts[1]], f"{value}.neg"), parts[0]],
            f"{value}.turned",
            axis=3,
        )
        even = graph.op("Mul", [value, cos], f"{value}.cos")
        odd = graph.op("Mul", [turned, sin], f"{value}.sin")
        return graph.op("Add", [even, odd], f"{value}.rotary")

    def repeat(value: str) -> str:
        times = shape.heads // shape.kv_heads
        if times == 1:
            return value
        wide = graph.op("Unsqueeze", [value, graph.ints(2)], f"{value}.wide")
        wide = graph.op("Expand", [wide, graph.ints(1, 1, times, 1, 1)], f"{value}.repeated")
        joined = graph.ints(0, shape.heads, -1, shape.head_size)
        return graph.op("Reshape", [wide, joined], f"{value}.grouped")

    kv_size = shape.kv_heads * shape.head_size
    normal = _norm(graph, weights, shape, f"{name}.attention", hidden)
    query = rotate(heads(linear(normal, "q", shape.hidden, shape.hidden), shape.heads))
    key = repeat(rotate(heads(linear(normal, "k", shape.hidden, kv_size), shape.kv_heads)))
    value = repeat(heads(linear(normal, "v", shape.hidden, kv_size), shape.kv_heads))
    key = graph.op("Transpose", [key], f"{name}.keys", perm=[0, 1, 3, 2])
    scores = graph.op("MatMul", [query, key], f"{name}.products")
    scores = graph.op("Mul", [scores, graph.real(shape.head_size**-0.5)], f"{name}.scores")
    scores = graph.op("Add", [scores, mask], f"{name}.masked")
    shares = graph.op("Softmax", [scores], f"{name}.shares", axis=-1)
    mixed = graph.op("MatMul", [shares, value], f"{name}.mixed")
    mixed = graph.op("Transpose", [mixed], f"{name}.tokens", perm=[0, 2, 1, 3])
    mixed = graph.op("Reshape", [mixed, graph.ints(0, 0, shape.hidden)], f"{name}.joined")
    mixed = linear(mixed, "o", shape.hidden, shape.hidden)
    hidden = graph.op("Add", [hidden, mixed], f"{name}.attended")

    normal = _norm(graph, weights, shape, f"{name}.mlp", hidden)
    gate = linear(normal, "gate", shape.hidden, shape.ffn)
    gate = graph.op("Mul", [gate, graph.op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
    gate = graph.op("Mul", [gate, linear(normal, "up", shape.hidden, shape.ffn)], f"{name}.gated")
    return graph.op("Add", [hidden, linear(gate, "down", shape.ffn, shape.hidden)], f"{name}.out")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every size."""
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)


def shape_of(parser: argparse.ArgumentParser, options: dict[str, Any]) -> Shape:
    """Take the sizes out of parsed options; end the program where they do not fit together."""
    try:
        return Shape(**{field.name: options.pop(field.name) for field in fields(Shape)})
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_shape_options(parser)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = vars(parser.parse_args())
    output, dtype, seed = (options.pop(name) for name in ("output", "dtype", "seed"))
    parameters = make_llama(output, shape_of(parser, options), dtype, seed)
    print(f"{output}: {parameters / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
