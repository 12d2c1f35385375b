"""ONNX Runtime's operators of quantized tensors in PyTorch, beside what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")

from fx_agreement import assert_agrees, one_node, parsed, run_fx

from lwc.core.errors import LwcError

MS = "com.microsoft"
RANDOM = np.random.default_rng(5)
TYPES = pytest.mark.parametrize("dtype", [np.uint8, np.int8])


def integers(low: int, high: int, *shape: int, dtype: Any = np.uint8) -> Any:
    return RANDOM.integers(low, high, shape).astype(dtype)


def quantized(name: str, *shape: int, scale: float, zero: int, dtype: Any) -> dict[str, Any]:
    """Return a tensor with its scale and its zero point, which counts from the least number."""
    low = np.iinfo(dtype).min
    return {
        name: integers(low, low + 256, *shape, dtype=dtype),
        f"{name}_scale": np.float32(scale),
        f"{name}_zero": dtype(low + zero),
    }


def result(scale: float, zero: int, dtype: Any) -> dict[str, Any]:
    """Return scale and zero point of a result. Scales are odd, so that no quotient is a tie."""
    return {"scale": np.float32(scale), "zero": dtype(np.iinfo(dtype).min + zero)}


def check(op: str, given: dict[str, Any], **attributes: Any) -> None:
    constant = [name for name in given if name.endswith(("scale", "zero"))]
    assert_agrees(*one_node(op, given, domain=MS, constant=constant, **attributes))


@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_quantized_arithmetic(op: str) -> None:
    one, other = np.float32(0.1), np.uint8(100)
    a = {"a": integers(0, 255, 4, 8), "a_scale": one, "a_zero": other}
    b = {"b": integers(0, 255, 4, 8), "b_scale": one, "b_zero": other}
    module, feed = one_node(
        op, {**a, **b, "y_scale": np.float32(0.7013), "y_zero": other}, domain=MS
    )
    assert_agrees(module, feed)


@pytest.mark.parametrize("op", ["QLinearSigmoid", "QLinearLeakyRelu"])
def test_quantized_activations(op: str) -> None:
    given = {"x": integers(0, 255, 4, 8), "x_scale": np.float32(0.05), "x_zero": np.uint8(120)}
    whole = {**given, "y_scale": np.float32(1 / 128), "y_zero": np.uint8(0)}
    module, feed = one_node(
        op, whole, domain=MS, constant=["x_scale", "x_zero", "y_scale", "y_zero"]
    )
    assert_agrees(module, feed)


@TYPES
@pytest.mark.parametrize("step", [1 / 256, 1 / 255, 0.0041, 0.3])
def test_quantized_softmax(step: float, dtype: Any) -> None:
    """Whole steps to 1 are counted, 254 of 1 / 255."""
    low = np.iinfo(dtype).min
    given = {
        **{"x": integers(low, low + 256, 300, 8, dtype=dtype), "x_scale": np.float32(0.02)},
        **{"x_zero": dtype(low + 90), "y_scale": np.float32(step), "y_zero": dtype(low)},
    }
    module, feed = one_node("QLinearSoftmax", given, domain=MS, constant=list(given)[1:])
    next(iter(module.graph)).attributes["opset"] = ir.AttrInt64("opset", 13)
    assert_agrees(module, feed)


@TYPES
@pytest.mark.parametrize("axis", [1, -2])
def test_quantized_parts_are_joined(axis: int, dtype: Any) -> None:
    """Scales are inputs too; they differ from part to part."""
    given = result(0.0517, 100, dtype)
    for number, scale in enumerate((0.03, 0.07, 0.0517)):
        each = quantized(f"x{number}", 4, 3 + number, 20, scale=scale, zero=90, dtype=dtype)
        given |= each
    check("QLinearConcat", given, axis=axis)


@TYPES
def test_quantized_choices(dtype: Any) -> None:
    given = {
        "condition": RANDOM.random((4, 1, 6)) < 0.5,
        **quantized("x", 4, 5, 6, scale=0.03, zero=80, dtype=dtype),
        **quantized("y", 5, 1, scale=0.07, zero=60, dtype=dtype),
        **result(0.0517, 99, dtype),
    }
    check("QLinearWhere", given)


@TYPES
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3]},
        {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ],
    ids=str,
)
def test_quantized_pools(attributes: dict[str, Any], dtype: Any) -> None:
    given = quantized("x", 2, 3, 21, 20, scale=0.03, zero=77, dtype=dtype)
    check("QLinearAveragePool", given | result(0.02171, 120, dtype), **attributes)


def test_quantized_pools_that_count_what_lies_beyond_are_refused() -> None:
    """ONNX Runtime's differ from those that it computes of floats."""
    given = quantized("x", 1, 1, 6, 6, scale=0.03, zero=77, dtype=np.uint8)
    module, feed = one_node(
        "QLinearAveragePool", given | result(0.02171, 120, np.uint8), domain=MS,
        kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1,
    )  # fmt: skip
    with pytest.raises(LwcError, match=r"QLinearAveragePool .*ceil_mode and count_include_pad"):
        run_fx(module, feed)


@TYPES
@pytest.mark.parametrize("shape", [(2, 30, 7, 7), (3, 4, 9)])
def test_quantized_pools_of_all(shape: tuple[int, ...], dtype: Any) -> None:
    given = quantized("x", *shape, scale=0.03, zero=77, dtype=dtype)
    check("QLinearGlobalAveragePool", given | result(0.01171, 120, dtype))


def test_a_pool_that_gets_int8_gives_it_on() -> None:
    """What follows asks for the type of what it reads."""
    model = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (int8[1, 2, 4, 4] x) => (y) <float s = {0.05}, int8 z = {-7}> {
            a = com.microsoft.QLinearGlobalAveragePool(x, s, z, s, z)
            b = com.microsoft.QLinearConcat<axis = 1>(s, z, a, s, z, a, s, z)
            y = com.microsoft.QLinearAdd(b, s, z, b, s, z, s, z) }"""
    assert_agrees(parsed(model), {"x": integers(-128, 128, 1, 2, 4, 4, dtype=np.int8)})
