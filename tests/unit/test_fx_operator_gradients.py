"""The gradient of every operator of the fx backend, beside differences in float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from fx_agreement import one_node
from gradient_cases import GradientCase, case_of, check_gradients, is_float, operator_cases
from support import module_of
from torch.autograd.gradcheck import GradcheckError

import lwc
from lwc.backends.fx import ops
from lwc.backends.fx.registry import known_operators, op

assert ops.__all__  # importing them registers the operators

EXCLUDED = {
    name: reason
    for names, reason in (
        (
            "And ArgMax ArgMin BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor "
            "ConvInteger Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual MatMulInteger "
            "NonMaxSuppression NonZero Not OptionalHasElement Or SequenceLength Shape Size Xor",
            "its results are integers or truth values",
        ),
        (
            "BlackmanWindow ConstantOfShape EyeLike HammingWindow HannWindow SequenceEmpty",
            "its results do not depend on the content of what it reads",
        ),
        ("Range", "it counts from numbers, not from tensors"),
        ("Hardmax", "it is constant but for jumps"),
        ("Scatter", "it is the older name of ScatterElements"),
        (
            "Bernoulli RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
            "it draws at random",
        ),
        (
            "DynamicQuantizeLinear QLinearConv QLinearMatMul QuantizeLinear "
            "com.microsoft::QLinearAdd com.microsoft::QLinearLeakyRelu com.microsoft::QLinearMul "
            "com.microsoft::QLinearSigmoid com.microsoft::QLinearSoftmax "
            "com.microsoft::QLinearConcat com.microsoft::QLinearWhere "
            "com.microsoft::QLinearAveragePool com.microsoft::QLinearGlobalAveragePool "
            "com.microsoft::QuantizeLinear com.microsoft::DynamicQuantizeMatMul "
            "lwc::DynamicQuantMatMul",
            "it rounds: test_fx_gradients.py has straight_through, which gives gradients",
        ),
    )
    for name in names.split()
}
"""Operators whose gradients are not checked, and why."""

CONSTANT = {
    "CastLike": (1,),  # its type counts
    "Dropout": (1, 2),
    "Resize": (1, 2),  # taken as numbers
}
"""Positions of inputs by which nothing is differentiated."""

NOT_A_FUNCTION = ("training_dropout", "FLOAT8", "FLOAT4", "scan_sum")
"""Parts of the names of cases that draw at random, keep numbers in 8 bits or less, or are of an
opset that the reader raises."""

RANDOM_NUMBERS = np.random.default_rng(7)


def normal(*shape: int) -> Any:
    return RANDOM_NUMBERS.normal(size=shape)


def positive(*shape: int) -> Any:
    return RANDOM_NUMBERS.uniform(0.5, 1.5, size=shape)


def codes(high: int, *shape: int, dtype: Any = np.uint8) -> Any:
    return RANDOM_NUMBERS.integers(0, high, shape).astype(dtype)


def rows(*names: str, width: int = 16) -> dict[str, Any]:
    return {name: normal(2, 3, width) for name in names}


ABSENT: dict[str, Any] = dict.fromkeys(("b0", "b1", "b2"))

CONTRIB: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "Gelu": [({"x": normal(3, 4)}, {})],
    "QuickGelu": [({"x": normal(3, 4)}, {"alpha": 1.5})],
    "FastGelu": [({"x": normal(3, 4)}, {}), ({"x": normal(3, 4), "b": normal(4)}, {})],
    "BiasGelu": [({"x": normal(3, 4), "b": normal(4)}, {})],
    "FusedMatMul": [({"a": normal(3, 4), "b": normal(5, 4)}, {"transB": 1, "alpha": 0.5})],
    "TransposeMatMul": [({"a": normal(3, 4), "b": normal(5, 4)}, {"transB": 1, "alpha": 0.5})],
    "FusedGemm": [
        (
            {"a": normal(3, 4), "b": normal(4, 5), "c": normal(5)},
            {"activation": activation, "activation_alpha": 0.3, "activation_gamma": 1.5},
        )
        for activation in ("Tanh", "LeakyRelu", "Selu")
    ],
    "GatherND": [({"x": normal(3, 4, 5), "at": np.array([[0, 1], [2, 3]])}, {})],
    "Trilu": [({"x": normal(3, 4)}, {"upper": 0})],
    "FusedConv": [
        (
            {
                "x": normal(1, 2, 5, 5),
                "w": normal(3, 2, 3, 3),
                "b": normal(3),
                "z": normal(1, 3, 3, 3),
            },
            {"activation": activation},
        )
        for activation in ("Relu", "Tanh", "Sigmoid", "LeakyRelu")
    ],
    "SimplifiedLayerNormalization": [({"x": normal(3, 8), "s": normal(8)}, {})],
    "SkipLayerNormalization": [
        (rows("x", "skip", width=8) | {n: normal(8) for n in ("g", "beta", "b")}, {"outputs": 4}),
        (rows("x", "skip", width=8) | {"g": normal(8)}, {}),
    ],
    "SkipSimplifiedLayerNormalization": [
        (rows("x", "skip", width=8) | {"g": normal(8)}, {"outputs": 1}),
        (rows("x", "skip", width=8) | {"g": normal(8), "b": normal(8)}, {}),
    ],
    "EmbedLayerNormalization": [
        (
            {
                "ids": codes(7, 2, 3, dtype=np.int32),
                "segments": codes(2, 2, 3, dtype=np.int32),
                "word": normal(7, 8),
                "position": normal(5, 8),
                "segment": normal(2, 8),
                "g": normal(8),
                "b": normal(8),
            },
            {},
        )
    ],
    "RotaryEmbedding": [
        (
            {
                "x": normal(2, 3, 16),
                "at": codes(9, 2, 3, dtype=np.int64),
                "cos": normal(9, 4),
                "sin": normal(9, 4),
            },
            {"interleaved": interleaved},
        )
        for interleaved in (0, 1)
    ],
    "MultiHeadAttention": [
        (
            rows("q", "k", "v") | {"b": normal(48), "m": None, "add": normal(1, 2, 3, 3)},
            {"num_heads": 2, "unidirectional": causal},
        )
        for causal in (0, 1)
    ]
    + [
        (
            rows("q", "k", "v") | ABSENT | {n: normal(2, 2, 4, 8) for n in ("pk", "pv")},
            {"num_heads": 2, "outputs": 3},
        )
    ],
    "Attention": [
        ({"x": normal(2, 3, 8), "w": normal(8, 24), "b": normal(24)}, {"num_heads": 2}),
        (
            {"x": normal(2, 3, 8), "w": normal(8, 24), "b": normal(24), "m": None}
            | {"past": normal(2, 2, 2, 4, 4)},
            {"num_heads": 2, "unidirectional": 1, "outputs": 2},
        ),
    ],
    "GroupQueryAttention": [
        (
            {"q": normal(1, new, 32), "k": normal(1, new, 16), "v": normal(1, new, 16)}
            | {"pk": normal(1, 2, past, 8), "pv": normal(1, 2, past, 8)}
            | {
                "lengths": np.array([new + past - 1], np.int32),
                "total": np.array(new + past, np.int32),
                "cos": normal(9, 4),
                "sin": normal(9, 4),
            },
            {"num_heads": 4, "kv_num_heads": 2, "outputs": 3, "do_rotary": 1, **more},
        )
        for new, past, more in (
            (3, 0, {}),
            (1, 4, {"rotary_interleaved": 1, "softcap": 2.0}),
            (4, 0, {"local_window_size": 2, "smooth_softmax": 1, "scale": 0.3}),
        )
    ],
    "DequantizeLinear": [({"x": codes(200, 3, 4), "s": positive(), "z": np.uint8(99)}, {})],
    "MatMulIntegerToFloat": [
        (
            {"a": codes(200, 3, 4), "b": codes(200, 4, 5), "s": positive(), "t": positive(5)}
            | {"z": np.uint8(100), "y": np.uint8(90), "bias": normal(5)},
            {},
        )
    ],
    "MatMulNBits": [
        (
            {"a": normal(3, 32), "b": codes(256, 5, 2, 8), "s": positive(5, 2)} | zeros,
            {"K": 32, "N": 5, "bits": 4, "block_size": 16},
        )
        for zeros in ({}, {"z": codes(256, 5)}, {"z": None, "g": None, "bias": normal(5)})
    ],
    "MatMulBnb4": [
        (
            {"a": normal(3, 64), "b": codes(256, 160), "s": positive(20)},
            {"K": 64, "N": 5, "block_size": 16, "quant_type": kind},
        )
        for kind in (0, 1)
    ],
    "GatherBlockQuantized": [
        (
            {"d": codes(256, 7, 16), "i": codes(7, 2, 3, dtype=np.int64), "s": positive(7, 1)},
            {"block_size": 32, "bits": 4},
        )
    ],
    "QGemm": [
        (
            {"a": codes(200, 3, 4), "s": positive(), "z": np.uint8(100)}
            | {"b": codes(200, 4, 5), "t": positive(), "y": np.uint8(90)},
            {},
        )
    ],
}
"""Inputs and attributes of the operators of com.microsoft."""

WRITTEN = {
    "If": """m = ReduceSum<keepdims = 0>(x) zero = Constant<value = double {0.0}>()
        c = Greater(m, zero)
        y = If(c) <then_branch = t () => (double[a, b] v) { v = Sin(x) },
            else_branch = e () => (double[a, b] w) { w = Mul(x, x) }>""",
    "SequenceConstruct SequenceInsert SequenceErase SequenceAt ConcatFromSequence": """
        e = Exp(x) n = Neg(x) i = Constant<value = int64 {1}>() s = SequenceConstruct(x, e, n)
        t = SequenceInsert(s, e, i) u = SequenceErase(t, i) a = SequenceAt(u, i)
        c = ConcatFromSequence<axis = 0>(u) b = ReduceSum<keepdims = 0>(c) y = Mul(a, b)""",
    "Optional": "o = Optional(x) g = OptionalGetElement(o) y = Mul(g, x)",
    "Cast": "y = Cast<to = 11>(x)",
    "CastLike": "y = CastLike(x, x)",
    "Mish": "y = Mish(x)",
    "Trilu": "y = Trilu<upper = 0>(x)",
    "GlobalLpPool": """s = Constant<value = int64[3] {1, 3, 4}>() r = Reshape(x, s)
        y = GlobalLpPool<p = 3>(r)""",
    "SimplifiedLayerNormalization": """s = Constant<value = double[4] {1.0, 2.0, 3.0, 4.0}>()
        y = SimplifiedLayerNormalization(x, s)""",
}
"""Graphs of an x `[3, 4]`, by the operators in them."""


@functools.cache
def onnx_cases() -> dict[str, list[GradientCase]]:
    return operator_cases()


def cases_of_operator(name: str) -> list[GradientCase]:
    """Gather what there is for an operator."""
    found = [case for case in onnx_cases().get(name, []) if not _is_excluded(case.name)]
    domain, _, plain = name.rpartition("::")
    if domain == "com.microsoft":
        for index, (inputs, options) in enumerate(CONTRIB.get(plain, [])):
            narrow = {
                key: np.asarray(given, np.float32) if is_float(np.asarray(given)) else given
                for key, given in inputs.items()
            }
            module, feed = one_node(plain, narrow, domain=domain, **options)
            found.append(case_of(f"{plain} {index}", name, module, feed))
    for operators, text in WRITTEN.items():
        if name in operators.split():
            graph = f"g (double[a, b] x) => (y) {{ {text} }}"
            module = module_of(graph, opset=20, ir_version=9)
            found.append(case_of(text, name, module, {"x": normal(3, 4)}))
    return found


def _is_excluded(name: str) -> bool:
    return any(part in name for part in NOT_A_FUNCTION)


@pytest.mark.parametrize("name", sorted(known_operators() - set(EXCLUDED)))
def test_gradient(name: str) -> None:
    checked = 0
    for case in cases_of_operator(name):
        floats = [
            index
            for index, given in enumerate(case.feed.values())
            if any(map(is_float, given if isinstance(given, list) else [given]))
        ]
        if set(floats) <= set(CONSTANT.get(name, ())):
            continue
        try:
            check_gradients(case, CONSTANT.get(name, ()))
        except AssertionError as error:
            if "nothing to differentiate" in str(error):
                continue  # this case is one of integers
            raise AssertionError(f"{case.name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{case.name}: {error}") from error
        checked += 1
    assert checked, "no case differentiates it: add one, or say in EXCLUDED why not"


def test_what_is_excluded_is_there() -> None:
    assert set(EXCLUDED) <= known_operators()


@op("tests::Cut tests::Half")
def cut(x: Any, y: Any) -> Any:
    """Lose the gradient of y."""
    return x * y.detach()


@pytest.mark.parametrize("name", ["Cut", "Half"])
def test_a_gradient_that_is_missing_is_noticed(name: str) -> None:
    """One input is cut off, or all of them."""
    inputs = {"x": normal(3, 4).astype(np.float32), "y": normal(3, 4).astype(np.float32)}
    module, feed = one_node(name, inputs, domain="tests")
    case = case_of(name, name, module, feed)
    if name == "Cut":
        with pytest.raises(AssertionError, match="cut off from every input"):
            check_gradients(case, (0,))
    else:
        with pytest.raises(GradcheckError, match="Jacobian mismatch"):
            check_gradients(case)


def test_a_gradient_through_the_dialect() -> None:
    """Rounding passes it on, so that it is that of a product with the plain weight."""
    from dialect import draw_case, variants
    from dialect import module_of as dialect_module

    random = np.random.default_rng(3)
    for variant in variants(random, 12):
        if variant.activation != "none" or variant.gated:
            continue
        case = draw_case(random, variant, np.float32)
        lowered = lwc.to_fx(dialect_module(case), straight_through=True)
        x = torch.tensor(random.normal(size=(3, variant.K)), dtype=torch.float32)
        y = lowered(x.requires_grad_())
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        (found,) = torch.autograd.grad(y, x, upstream)
        wanted = upstream.double() @ torch.tensor(case.weight()).T
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)
