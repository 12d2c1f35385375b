"""Gradients of lowered modules, beside finite differences in float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support import module_of

import lwc

DIFFERENTIABLE = {
    "arithmetic": "a = Mul(x, x) b = Add(a, x) c = Sub(b, x) d = Exp(x) y = Div(c, d)",
    "powers": "a = Abs(x) b = Sqrt(a) c = Reciprocal(b) y = Pow(c, a)",
    "trigonometry": "a = Sin(x) b = Tanh(a) c = Atan(b) y = Erf(c)",
    "activations": """a = Sigmoid(x) b = Softplus(a) c = Elu(x) d = LeakyRelu<alpha = 0.3>(x)
        e = Selu(x) f = HardSwish(x) g = Gelu(x) h = Mish(x) y = Sum(b, c, d, e, f, g, h)""",
    "clip": """low = Constant<value = double {-0.5}>() high = Constant<value = double {0.7}>()
        y = Clip(x, low, high)""",
    "softmax": "a = Softmax<axis = 0>(x) b = LogSoftmax(x) y = Mul(a, b)",
    "norm": """s = Constant<value = double[4] {1.0, 2.0, 0.5, 3.0}>()
        a = LayerNormalization(x, s)
        y = LpNormalization(a)""",
    "reductions": """axes = Constant<value = int64[1] {1}>() a = ReduceMean(x, axes)
        b = ReduceL2(x, axes) c = ReduceLogSumExp(x, axes) d = ReduceMax(x, axes)
        y = Sum(a, b, c, d)""",
    "cumsum": "axis = Constant<value = int64 {1}>() y = CumSum<reverse = 1>(x, axis)",
    "products": "t = Transpose(x) a = MatMul(x, t) y = Gemm<alpha = 0.5>(a, x)",
    "einsum": 'y = Einsum<equation = "ij,kj->ik">(x, x)',
    "layout": """shape = Constant<value = int64[2] {-1, 2}>() a = Reshape(x, shape)
        axes = Constant<value = int64[1] {0}>() b = Unsqueeze(a, axes)
        y = Concat<axis = -1>(b, b)""",
    "slices": """s = Constant<value = int64[2] {2, -1}>() e = Constant<value = int64[2] {0, -9}>()
        ax = Constant<value = int64[2] {0, 1}>() st = Constant<value = int64[2] {-1, -2}>()
        y = Slice(x, s, e, ax, st)""",
    "pads": """p = Constant<value = int64[4] {1, 0, 0, 2}>() y = Pad<mode = "reflect">(x, p)""",
    "gather": """i = Constant<value = int64[3] {0, -1, 0}>() a = Gather<axis = 1>(x, i)
        j = Constant<value = int64[1, 2] {0, -2}>() y = GatherND(a, j)""",
    "scatter": """i = Constant<value = int64[1, 2] {2, -1}>()
        u = Constant<value = double[1, 2] {1.0, 2.0}>()
        y = ScatterElements<axis = 1, reduction = "mul">(x, i, u)""",
    "where": "z = Constant<value = double {0.0}>() c = Greater(x, z) n = Neg(x) y = Where(c, n, x)",
    "loop": """n = Constant<value = int64 {3}>() t = Constant<value = bool {1}>()
        y = Loop(n, t, x) <body = b (int64 i, bool c, double[r, 4] v) =>
            (bool k, double[r, 4] w) { k = Identity(c) w = Mul(v, x) }>""",
    "if": """z = Constant<value = double {0.0}>() m = ReduceSum<keepdims = 0>(x) c = Greater(m, z)
        y = If(c) <then_branch = p () => (double[r, 4] v) { v = Sin(x) },
            else_branch = q () => (double[r, 4] w) { w = Mul(x, x) }>""",
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name: str) -> None:
    text = f"g (double[r, 4] x) => (double y) {{ {DIFFERENTIABLE[name]} }}"
    text = text.replace("(double y)", "(y)")
    lowered = lwc.to_fx(module_of(text, opset=20, ir_version=9))
    x = torch.tensor(np.random.default_rng(4).normal(size=(3, 4)), requires_grad=True)
    assert torch.autograd.gradcheck(lowered, (x,))


def test_gradients_of_convolutions_and_pools() -> None:
    text = """g (double[1, 2, 5, 5] x) => (y)
        <double[4, 1, 2, 2] w = {1.0, 2.0, -1.0, 0.5, 1.5, 2.5, -0.5, 1.0,
        1.0, 2.0, -1.0, 0.5, 1.5, 2.5, -0.5, 1.0}> {
        a = Conv<group = 2, auto_pad = "SAME_UPPER">(x, w)
        b = AveragePool<kernel_shape = [2, 2], pads = [1, 0, 0, 1], ceil_mode = 1>(a)
        c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
        y = GlobalAveragePool(c) }"""
    lowered = lwc.to_fx(module_of(text, opset=19, ir_version=9))
    x = torch.tensor(np.random.default_rng(4).normal(size=(1, 2, 5, 5)), requires_grad=True)
    assert torch.autograd.gradcheck(lowered, (x,))


def test_gradients_of_attention() -> None:
    text = """g (double[1, 3, 8] q, double[1, 3, 4] k, double[1, 3, 4] v) => (y) {
        y = Attention<q_num_heads = 2, kv_num_heads = 1, is_causal = 1, softcap = 2.0>(q, k, v) }"""
    lowered = lwc.to_fx(module_of(text, opset=23, ir_version=10))
    random = np.random.default_rng(4)
    inputs = [
        torch.tensor(random.normal(size=(1, 3, width)), requires_grad=True) for width in (8, 4, 4)
    ]
    assert torch.autograd.gradcheck(lowered, inputs)


def test_gradients_of_an_lstm() -> None:
    text = """g (double[3, 2, 4] x, double[1, 8, 4] w, double[1, 8, 2] r) => (y) {
        y = LSTM<hidden_size = 2>(x, w, r) }"""
    lowered = lwc.to_fx(module_of(text, opset=17))
    random = np.random.default_rng(4)
    shapes = [(3, 2, 4), (1, 8, 4), (1, 8, 2)]
    inputs = [torch.tensor(random.normal(size=s), requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *values: lowered(*values)[0], inputs)


QDQ = """g (float[n, 4] x) => (float[n, 4] y)
    <float s = {0.1}, uint8 z = {128}> {
    q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""


def test_straight_through_gives_the_gradient_of_what_is_in_range() -> None:
    plain, through = (
        lwc.to_fx(module_of(QDQ), straight_through=chosen) for chosen in (False, True)
    )
    x = torch.tensor([[0.12, -3.33, 50.0, -50.0]], requires_grad=True)
    assert torch.equal(plain(x), through(x))
    assert (
        not plain(x).grad_fn or torch.autograd.grad(plain(x).sum(), x, allow_unused=True)[0] is None
    )
    (gradient,) = torch.autograd.grad(through(x).sum(), x)
    # As far as (x / s) * s is x in float32.
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_straight_through_keeps_the_types_of_outputs() -> None:
    text = """g (float[n, 4] x) => (uint8[n, 4] q, float[n, 4] r)
        <float s = {0.1}, uint8 z = {128}> { q = QuantizeLinear(x, s, z) r = Round(x) }"""
    through = lwc.to_fx(module_of(text), straight_through=True)
    x = torch.tensor([[0.12, -3.5, 5.5, -50.0]], requires_grad=True)
    codes, whole = through(x)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[129, 93, 183, 0]]
    assert whole.tolist() == [[0, -4, 6, -50]]
    (gradient,) = torch.autograd.grad(whole.sum(), x)
    assert gradient.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("dtype", "nodes"),
    [
        ("uint8", 'r = BitShift <direction = "LEFT"> (q, two)'),
        ("uint16", 'r = BitShift <direction = "RIGHT"> (q, two)'),
        ("int8", "r = BitwiseAnd(q, two)"),
        ("int8", "m = BitwiseNot(q) k = BitwiseXor(m, two) r = BitwiseOr(k, q)"),
        ("int8", "r = Div(q, two)"),
    ],
)
def test_straight_through_leaves_operators_on_bits_their_integers(dtype: str, nodes: str) -> None:
    text = f"""g (float[n, 4] x) => ({dtype}[n, 4] r) <float s = {{0.1}}, {dtype} two = {{2}},
        {dtype} z = {{100}}> {{ q = QuantizeLinear(x, s, z) {nodes} }}"""
    plain, through = (
        lwc.to_fx(module_of(text, opset=21), straight_through=chosen) for chosen in (False, True)
    )
    x = torch.tensor([[0.12, -33.3, 5.0, -50.0]])
    assert torch.equal(plain(x), through(x))


def test_straight_through_dynamic_quantization() -> None:
    text = """g (float[n, 4] x, int8[4, 2] w) => (float[n, 2] y) {
        q, s, z = DynamicQuantizeLinear(x) p = MatMulInteger(q, w, z) f = Cast<to = 1>(p)
        y = Mul(f, s) }"""
    x = torch.tensor([[0.2, -3.0, 5.0, 1.0]], requires_grad=True)
    w = torch.tensor([[1, 2], [3, -4], [5, 6], [-7, 8]], dtype=torch.int8)
    plain, through = (
        lwc.to_fx(module_of(text), straight_through=chosen) for chosen in (False, True)
    )
    torch.testing.assert_close(plain(x, w), through(x, w))
    (gradient,) = torch.autograd.grad(through(x, w).sum(), x)
    # Scale and zero point follow the extremes, so only the others see the plain product.
    torch.testing.assert_close(gradient[0, [0, 3]], torch.tensor([3.0, 1.0]))


def test_training_lowers_a_loss_and_goes_back() -> None:
    text = """g (float[n, 4] x) => (float[n, 1] y) <float[4, 1] w = {0.1, 0.2, 0.3, 0.4}> {
        y = MatMul(x, w) }"""
    module = module_of(text)
    lowered = lwc.to_fx(module)
    x = torch.tensor(np.random.default_rng(1).normal(size=(32, 4)).astype(np.float32))
    wanted = x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
    optimizer = torch.optim.SGD(lowered.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (lowered(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-4
    assert module.update_weights(lowered) == ["w"]
    assert torch.equal(lwc.to_fx(module)(x), lowered(x))
