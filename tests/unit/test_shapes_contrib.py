"""Shape rules of ONNX Runtime's own operators, against what it computes."""

# ruff: noqa: E501 (a table reads best a case to a line)

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from shape_oracle import compare

from lwc.core.module import Module

Arrays = dict[str, np.ndarray[Any, Any]]


def real(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def ones(*shape: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


SCALE = np.array(0.1, np.float32)
ZERO = np.array(0, np.uint8)
LENGTHS = np.array([3, 3], np.int32)
TOTAL = np.array(4, np.int32)
X = {"x": real(2, 5, 16)}
BYTES = {"x": ones(2, 5, 16)}
KEYS = {"pk": real(2, 2, 3, 8), "pv": real(2, 2, 3, 8)}

CASES: list[tuple[str, Arrays, Arrays, str, int, dict[str, Any]]] = [
    # operator, feeds, constants, order of the inputs ("_" is absent), outputs, attributes
    ("MultiHeadAttention", {"q": real(2, 5, 16), "k": real(2, 7, 16), "v": real(2, 7, 24)}, {}, "q k v", 1, {"num_heads": 4}),
    ("MultiHeadAttention", {"q": real(2, 5, 16), "k": real(2, 5, 16), "v": real(2, 5, 16), **KEYS}, {}, "q k v _ _ _ pk pv", 3, {"num_heads": 2}),
    ("GroupQueryAttention", {"q": real(2, 1, 32), "k": real(2, 1, 16), "v": real(2, 1, 16), **KEYS}, {"n": LENGTHS, "t": TOTAL}, "q k v pk pv n t", 3, {"num_heads": 4, "kv_num_heads": 2}),
    ("GroupQueryAttention", {"q": real(2, 4, 64)}, {"n": LENGTHS, "t": TOTAL}, "q _ _ _ _ n t", 3, {"num_heads": 4, "kv_num_heads": 2}),
    ("Attention", X, {"w": real(16, 48), "b": real(48)}, "x w b", 2, {"num_heads": 4}),
    ("QAttention", BYTES, {"w": ones(16, 48, dtype=np.int8), "b": real(48), "s": SCALE, "t": SCALE}, "x w b s t", 1, {"num_heads": 4}),
    ("SkipLayerNormalization", {**X, "k": real(2, 5, 16)}, {"g": real(16)}, "x k g", 1, {}),
    ("SkipSimplifiedLayerNormalization", {**X, "k": real(2, 5, 16)}, {"g": real(16)}, "x k g", 1, {}),
    ("EmbedLayerNormalization", {"i": np.zeros((2, 5), np.int32)}, {"w": real(9, 16), "p": real(9, 16), "g": real(16), "b": real(16)}, "i _ w p _ g b", 2, {}),
    ("MatMulNBits", {"x": real(2, 5, 64)}, {"w": ones(32, 2, 16), "s": real(64)}, "x w s", 1, {"K": 64, "N": 32, "bits": 4, "block_size": 32}),
    ("GatherBlockQuantized", {"i": ones(2, 3, dtype=np.int64)}, {"w": ones(9, 32), "s": real(9, 2)}, "w i s", 1, {"bits": 4, "block_size": 32, "quantize_axis": 1}),
    ("GatherBlockQuantized", {"i": ones(2, 3, dtype=np.int64)}, {"w": ones(9, 64), "s": real(9, 2)}, "w i s", 1, {"bits": 8, "block_size": 32, "quantize_axis": 1}),
    ("FusedMatMul", X, {"w": real(8, 16)}, "x w", 1, {"transB": 1}),
    ("DynamicQuantizeMatMul", X, {"w": ones(16, 8, dtype=np.int8), "s": SCALE}, "x w s", 1, {}),
    ("MatMulIntegerToFloat", BYTES, {"w": ones(16, 8, dtype=np.int8), "s": SCALE, "t": SCALE}, "x w s t", 1, {}),
    ("QGemm", {"x": ones(5, 16)}, {"w": ones(16, 8), "s": SCALE, "z": ZERO}, "x s z w s z", 1, {}),
    ("QLinearAdd", {"x": ones(5, 16)}, {"w": ones(1, 16), "s": SCALE, "z": ZERO}, "x s z w s z s z", 1, {}),
    ("QLinearConcat", {"x": ones(2, 5, 16), "w": ones(2, 5, 16)}, {"s": SCALE, "z": ZERO}, "s z x s z w s z", 1, {"axis": 2}),
    ("QLinearWhere", {"c": ones(5, 1, dtype=bool), "x": ones(5, 16)}, {"s": SCALE, "z": ZERO}, "c x s z x s z s z", 1, {}),
    ("QLinearAveragePool", {"x": ones(1, 2, 8, 8)}, {"s": SCALE, "z": ZERO}, "x s z s z", 1, {"kernel_shape": [3, 3], "strides": [2, 2]}),
    ("QLinearGlobalAveragePool", {"x": ones(1, 2, 8, 8)}, {"s": SCALE, "z": ZERO}, "x s z s z", 1, {}),
    ("FusedGemm", {"x": real(5, 16)}, {"w": real(8, 16)}, "x w", 1, {"transB": 1, "activation": "Relu"}),
    ("TransposeMatMul", X, {"w": real(8, 16)}, "x w", 1, {"transB": 1}),
    ("GatherND", {"x": real(3, 4, 5), "i": ones(2, 2, dtype=np.int64)}, {}, "x i", 1, {}),
    ("Trilu", X, {}, "x", 1, {}),
    ("BiasGelu", X, {"b": real(16)}, "x b", 1, {}),
    ("QuickGelu", X, {}, "x", 1, {}),
    ("FastGelu", X, {}, "x", 1, {}),
    ("RotaryEmbedding", X, {"p": np.zeros(1, np.int64), "c": real(8, 2), "s": real(8, 2)}, "x p c s", 1, {"num_heads": 4}),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)]
)
def test_contrib_operator_has_the_shape_that_was_claimed(
    case: tuple[str, Arrays, Arrays, str, int, dict[str, Any]],
) -> None:
    op, feeds, constants, order, outputs, attributes = case
    # The first two axes of an input of three, batch and length, are symbols.
    inputs = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            [f"{name}_0", f"{name}_1", array.shape[2]] if array.ndim == 3 else array.shape,
        )
        for name, array in feeds.items()
    ]
    names = [f"o{index}" for index in range(outputs)]
    graph = helper.make_graph(
        [
            helper.make_node(
                op,
                ["" if name == "_" else name for name in order.split()],
                names,
                domain="com.microsoft",
                **attributes,
            )
        ],
        "g",
        inputs,
        [helper.make_empty_tensor_value_info(name) for name in names],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    result = compare(Module(ir.from_proto(model)), feeds)
    assert not result.wrong
    assert result.complete == result.values == outputs
