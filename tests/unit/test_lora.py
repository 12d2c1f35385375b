"""add-lora and merge-lora: adapters that do nothing at first, and become part of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import strategies as st
from support import module_of, ops, run_pass, run_pass_to_the_end, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import UsageError
from lwc.core.module import Module
from lwc.optimizer import optimize
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.passes.training import merging
from lwc.passes.training.add_lora import AddLora
from lwc.passes.training.low_rank import find_adapters
from lwc.passes.training.merge_lora import MergeLora
from lwc.passes.training.trainable import adapters_to_train
from lwc.pipeline.passes import PassContext
from lwc.rewrite import RewriteLimit
from lwc.verify import check_pass

X = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


def filled(text: str, **shapes: tuple[int, ...]) -> Module:
    """Read a graph and give it random weights of these shapes, in the order of names."""
    declared = ", ".join(f"float{list(shape)} {name}" for name, shape in shapes.items())
    module = module_of(text.replace(" x)", f" x, {declared})", 1))
    drawn = np.random.default_rng(1)
    for value in list(module.graph.inputs)[1:]:
        module.graph.inputs.remove(value)
        value.const_value = ir.Tensor(
            drawn.normal(size=shapes[value.name or ""]).astype(np.float32), name=value.name
        )
        module.graph.register_initializer(value)
    return module


def adapters(module: Module) -> list[Any]:
    return list(find_adapters(PassContext(AnalysisManager(module)).editor()))


def reasons(module: Module) -> str:
    return "\n".join(remark.message for remark in module.remarks)


PLAIN = "g (float[n, 8] x) => (float[n, 6] y) { y = MatMul(x, w) }"
GEMM = "g (float[n, 8] x) => (float[n, 6] y) { y = Gemm<alpha = 0.5, transB = 1>(x, w, c) }"
LAYERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "matmul": (PLAIN, {"w": (8, 6)}),
    "gemm": (
        "g (float[n, 8] x) => (float[n, 6] y) { y = Gemm(x, w, c) }",
        {"w": (8, 6), "c": (6,)},
    ),
    "turned": (GEMM, {"w": (6, 8), "c": (6,)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_new_adapters_change_no_bit_and_trained_ones_merge(name: str) -> None:
    text, shapes = LAYERS[name]
    module = filled(text, **shapes)
    before = run_plain(module, {"x": X})[0]
    result = run_pass_to_the_end(AddLora(rank=2, alpha=3), module)
    assert result.statistics == {"adapters": 1, "parameters": 2 * (8 + 6)}
    assert np.array_equal(run_plain(module, {"x": X})[0], before)
    (adapter,) = adapters(module)
    assert adapter.scale == 1.5
    assert adapter.down.value.name == "w.lora_A"
    assert adapter.sum.metadata_props["lwc.pass"] == "add-lora"
    up = adapter.up.value
    content = np.random.default_rng(2).normal(size=(2, 6)).astype(np.float32)
    module.replace_initializer(up, ir.Tensor(content, name=up.name))
    trained = run_plain(module, {"x": X})[0]
    assert np.abs(trained - before).max() > 0.1
    run_pass_to_the_end(MergeLora(), module)
    assert len(ops(module)) == 1
    # Both round sums of eight products; the weight is rounded once.
    np.testing.assert_allclose(run_plain(module, {"x": X})[0], trained, rtol=0, atol=4e-6)
    assert set(module.graph.initializers) == set(shapes)


def test_the_merged_weight_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_ROWS", 3)
    text = """g (float[n, 8] x) => (float[n, 6] y) {
        p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) y = Add(b, p) }"""
    module = filled(text, w=(8, 6), d=(8, 2), u=(2, 6))
    w, d, u = (
        module.graph.initializers[name].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
        for name in "wdu"
    )
    run_pass_to_the_end(MergeLora(), module)
    merged = module.graph.initializers["w"].const_value
    assert merged is not None
    assert np.array_equal(merged.numpy(), (w + d @ u).astype(np.float32))


SPELLINGS = {
    "scale first": "s = Mul(x, k) a = MatMul(s, d) b = MatMul(a, u) p = MatMul(x, w) y = Add(p, b)",
    "scale between": """a = MatMul(x, d) s = Mul(k, a) b = MatMul(s, u)
        p = MatMul(x, w) y = Add(b, p)""",
    "divided": "a = MatMul(x, d) b = MatMul(a, u) s = Div(b, k) p = MatMul(x, w) y = Add(p, s)",
    "bias before": "p = MatMul(x, w) q = Add(c, p) a = MatMul(x, d) b = MatMul(a, u) y = Add(q, b)",
    "bias after": "p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) q = Add(p, b) y = Add(q, c)",
    "two": """p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) q = Add(p, b)
        e = MatMul(x, d) f = Mul(e, k) g = MatMul(f, u) y = Add(q, g)""",
    "copies": """i = Identity(x) a = MatMul(i, d) j = Identity(a) b = MatMul(j, u)
        p = MatMul(x, w) y = Add(p, b)""",
    "gemms": "p = Gemm(x, w, c) a = Gemm<alpha = 0.5>(x, d) b = Gemm(a, u) y = Add(p, b)",
    "turned": """t = Transpose<perm = [1, 0]>(v) p = MatMul(x, t) a = MatMul(x, d)
        b = MatMul(a, u) y = Add(p, b)""",
    "turned twice": """t = Transpose<perm = [1, 0]>(w) p = Gemm<transB = 1>(x, t)
        a = MatMul(x, d) b = MatMul(a, u) y = Add(p, b)""",
}
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (8, 6), "v": (6, 8), "d": (8, 2), "u": (2, 6), "c": (6,), "k": (1,), "box": (1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_merge(name: str) -> None:
    body = SPELLINGS[name]
    module = filled(f"g (float[n, 8] x) => (float[n, 6] y) {{ {body} }}", **SHAPES)
    before = run_plain(module, {"x": X})[0]
    result = run_pass_to_the_end(MergeLora(), module)
    assert result.rewrites == {"merge-lora": 1 + (name == "two")}
    np.testing.assert_allclose(run_plain(module, {"x": X})[0], before, rtol=0, atol=2e-5)


NEAR = {
    "another input": "z = Neg(x) p = MatMul(x, w) a = MatMul(z, d) b = MatMul(a, u) y = Add(p, b)",
    "an activation": "p = MatMul(x, w) a = MatMul(x, d) r = Relu(a) b = MatMul(r, u) y = Add(p, b)",
    "a vector": "p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) s = Mul(b, c) y = Add(p, s)",
    "read twice": """p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) q = Add(p, b)
        r = Relu(p) y = Add(q, r)""",
    "the product leaves": """p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) q = Add(p, b)
        r = Relu(b) y = Add(q, r)""",
    "a bias inside": "p = MatMul(x, w) a = MatMul(x, d) b = Gemm(a, u, c) y = Add(p, b)",
    "a base times 0": """p = Gemm<alpha = 0.0>(x, w, c) a = MatMul(x, d) b = MatMul(a, u)
        y = Add(p, b)""",
    "a scale of more axes": """p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) s = Mul(b, box)
        q = Add(p, s) axes = Constant<value_ints = [0]>() y = ReduceSum<keepdims = 0>(q, axes)""",
    "one column": "p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, o) y = Add(p, b)",
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_no_adapter_stays(name: str) -> None:
    text = f"g (float[n, 8] x) => (float[n, 6] y) {{ {NEAR[name]} }}"
    module = filled(text, **SHAPES, o=(2, 1))
    assert not run_pass(MergeLora(), module).changed


def test_a_base_that_turns_its_input_has_no_adapter_of_it_and_gets_none() -> None:
    text = """g (float[8, 8] x) => (float[8, 6] y) { p = Gemm<transA = 1>(x, w) a = MatMul(x, d)
        b = MatMul(a, u) y = Add(p, b) }"""
    assert not run_pass(MergeLora(), filled(text, **SHAPES)).changed
    alone = "g (float[8, 8] x) => (float[8, 6] y) { y = Gemm<transA = 1>(x, w) }"
    assert not run_pass(AddLora(rank=2), filled(alone, w=(8, 6))).changed


def test_a_weight_that_leaves_the_graph_stays_what_it_is() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] y) { p = MatMul(x, w) a = MatMul(x, d)
        b = MatMul(a, u) y = Add(p, b) }"""
    module = filled(text, **SHAPES)
    module.graph.outputs.append(module.graph.initializers["w"])
    y, w = run_plain(module, {"x": X})
    assert run_pass_to_the_end(MergeLora(), module).changed
    merged, still = run_plain(module, {"x": X})
    np.testing.assert_allclose(merged, y, rtol=0, atol=2e-5)  # sums of eight products
    assert np.array_equal(still, w)


def test_adding_stops_at_the_limit_of_rewrites() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] y) { p = MatMul(x, w) y = MatMul(p, v) }"
    for allowed in (0, 1, 2):
        module = filled(text, w=(8, 8), v=(8, 8))
        ctx = PassContext(AnalysisManager(module), limit=RewriteLimit(allowed))
        assert AddLora(rank=2).run(module, ctx).changed == bool(allowed)
        names = [each.down.value.name for each in adapters(module)]
        assert names == ["w.lora_A", "v.lora_A"][:allowed]


def test_a_weight_read_elsewhere_is_stored_twice_with_a_remark() -> None:
    text = """g (float[n, 8] x) => (float[n, 6] y, float[n, 6] z) {
        p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) y = Add(p, b) m = Neg(x)
        z = MatMul(m, w) }"""
    module = filled(text, **SHAPES)
    before = run_plain(module, {"x": X})
    run_pass_to_the_end(MergeLora(), module)
    assert "'w' is read elsewhere too and now stored twice: 192 B more" in reasons(module)
    for old, new in zip(before, run_plain(module, {"x": X}), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["matmulnbits", "lwc", "qdq"])
def test_quantized_layers_get_adapters_and_keep_them(form: Any) -> None:
    text = "g (float[n, 64] x) => (float[n, 48] y) { y = MatMul(x, w) }"
    module = module_of(
        text.replace("(float[n, 64] x)", "(float[n, 64] x, float[64, 48] w)"), 21, 10
    )
    value = module.graph.inputs.pop()
    value.const_value = ir.Tensor(
        np.random.default_rng(1).normal(size=(64, 48)).astype(np.float32), name="w"
    )
    module.graph.register_initializer(value)
    module = optimize(module, [QuantizeWeights(format=form)]).module
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    before = run_plain(module, {"x": x})[0]
    assert run_pass_to_the_end(AddLora(rank=4), module).statistics["adapters"] == 1
    assert np.array_equal(run_plain(module, {"x": x})[0], before)
    assert not run_pass(MergeLora(), module).changed
    told = optimize(module, "merge-lora").record.passes[0].remarks
    assert any("quantized" in each.message for each in told if each.kind == "missed")


def test_every_adapter_is_drawn_by_itself_and_by_the_seed() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] y) { p = MatMul(x, w) y = MatMul(p, v) }"

    def drawn(seed: int) -> list[Any]:
        module = optimize(filled(text, w=(8, 8), v=(8, 8)), [AddLora(rank=2)], seed=seed).module
        return [each.down.tensor.numpy() for each in adapters(module)]

    (one, other), again, (another, _) = drawn(0), drawn(0), drawn(1)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, another)
    assert all(map(np.array_equal, (one, other), again))
    # As torch.nn.Linear draws: uniform up to one over the root of the inputs, on both sides.
    both = np.concatenate((one, other))
    assert 0.9 < both.max() * 8**0.5 <= 1
    assert 0.9 < -both.min() * 8**0.5 <= 1


def test_add_lora_says_which_layers_have_none() -> None:
    text = (
        """g (float[n, 8] x) => (float[n, 6] y) { p = MatMul(x, w) t = Tanh(p) y = MatMul(t, e) }"""
    )
    module = filled(text, w=(8, 6), e=(6, 6))
    run_pass(AddLora(rank=6), module)
    assert "no adapter: its 8 inputs and 6 outputs are no more than rank=6" in reasons(module)
    run_pass(AddLora(rank=2, layers=("nothing*", "e")), module)
    assert [each.down.value.name for each in adapters(module)] == ["e.lora_A"]
    assert "layers=nothing* matches no node" in reasons(module)


def test_a_scale_that_the_type_does_not_hold_is_told() -> None:
    for alpha, told in ((1e6, "500000 is inf"), (1e-9, "5e-10 is 0")):
        module = module_of("""g (float16[n, 4] x) => (float16[n, 3] y)
            <float16[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> { y = MatMul(x, w) }""")
        assert not run_pass(AddLora(rank=2, alpha=alpha), module).changed
        assert f"no adapter: alpha / rank = {told} in float16" in reasons(module)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="alpha="):
            AddLora(alpha=alpha)


def test_peft_like_modules_that_pytorch_traced_merge() -> None:
    torch = pytest.importorskip("torch")
    import lwc

    class Lora(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
            super().__init__()
            self.base_layer = torch.nn.Linear(inputs, outputs, bias=bias)
            self.lora_dropout = torch.nn.Dropout(0.1)
            self.lora_A = torch.nn.Linear(inputs, 2, bias=False)
            self.lora_B = torch.nn.Linear(2, outputs, bias=False)

        def forward(self, x: Any) -> Any:
            return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * 2.0

    torch.manual_seed(0)
    net = torch.nn.Sequential(Lora(8, 6, True), torch.nn.GELU(), Lora(6, 5, False)).eval()
    for shape in ((3, 8), (2, 3, 8)):
        x = torch.randn(*shape)
        module = lwc.trace(net, (x,))
        feed = {module.graph.inputs[0].name or "": x.numpy()}
        assert run_pass_to_the_end(MergeLora(), module).rewrites == {"merge-lora": 2}
        wanted = net(x).detach().numpy()
        np.testing.assert_allclose(run_plain(module, feed)[0], wanted, rtol=0, atol=1e-5)


FACTORS: dict[str, tuple[int, ...]] = {
    "w": (8, 6), "v": (8, 6), "d": (8, 2), "u": (2, 6), "t": (2, 6),
}  # fmt: skip
SHARED = """g (float[n, 8] x) => (float[n, 6] y, float[n, 6] z) {
    p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) y = Add(p, b)
    q = MatMul(x, v) e = MatMul(x, d) f = MatMul(e, t) z = Add(q, f) }"""


def changed(module: Module, name: str, zeros: Any) -> None:
    """Set some of a weight to 0, by their index."""
    value = module.graph.initializers[name]
    assert value.const_value is not None
    content = np.array(value.const_value.numpy())
    content[zeros] = 0
    module.replace_initializer(value, ir.Tensor(content, name=name))


def masks(module: Module) -> dict[str | None, Any]:
    """Return the masks of the adapters that are there."""
    ctx = PassContext(AnalysisManager(module))
    chosen = adapters_to_train(module, ctx, rank=2, alpha=2.0, layers=(), keep_zeros=True)
    return {each.value.name: each.mask for each in chosen}


@pytest.mark.parametrize("factor", ["one value", "two values of one tensor"])
def test_a_factor_of_two_layers_keeps_the_zeros_of_both(factor: str) -> None:
    """One layer has zeros in a row, the other in another row."""
    two = factor != "one value"
    shapes = {**FACTORS, **({"other": (8, 2)} if two else {})}
    module = filled(SHARED.replace("e = MatMul(x, d)", "e = MatMul(x, other)") if two else SHARED,
                    **shapes)  # fmt: skip
    if two:
        held = module.graph.initializers
        held["other"].const_value = held["d"].const_value
    changed(module, "w", 1)
    changed(module, "v", 4)
    chosen = masks(module)
    assert chosen.keys() == {"d", "u", "t"}
    assert np.flatnonzero(~chosen["d"]).tolist() == [1, 4]
    assert chosen["u"] is chosen["t"] is None


def test_a_factor_that_its_product_turns_keeps_the_zeros_of_its_own_rows() -> None:
    """As PyTorch writes linear layers: [outputs, inputs]."""
    text = """g (float[n, 8] x) => (float[n, 6] y) { p = Gemm<transB = 1>(x, w)
        a = Gemm<transB = 1>(x, d) b = Gemm<transB = 1>(a, u) y = Add(p, b) }"""
    module = filled(text, w=(6, 8), d=(2, 8), u=(6, 2))
    changed(module, "w", np.s_[:, 1])
    changed(module, "w", 4)
    chosen = masks(module)
    for name, shape, zeros in (("d", (1, 8), [(0, 1)]), ("u", (6, 1), [(4, 0)])):
        assert chosen[name].shape == shape
        assert [*zip(*np.nonzero(~chosen[name]), strict=True)] == zeros


def test_a_factor_of_a_layer_that_is_not_trained_stays() -> None:
    module = filled(SHARED, **FACTORS)
    changed(module, "w", 1)
    for start in (0, 1):
        changed(module, "v", np.s_[start::2, start::2])
    assert masks(module) == {"u": None}
    assert "'d' belongs to an adapter that is not trained, too" in reasons(module)


@pytest.mark.parametrize(("zeros", "trained"), [(6, True), (7, True), (8, False)])
def test_a_quarter_of_scattered_zeros_still_counts_as_chance(zeros: int, trained: bool) -> None:
    """Of the 28 weights beside a row and two columns of zeros, which are kept and do not count."""
    text = """g (float[n, 8] x) => (float[n, 6] y) {
        p = MatMul(x, w) a = MatMul(x, d) b = MatMul(a, u) y = Add(p, b) }"""
    module = filled(text, w=(8, 6), d=(8, 2), u=(2, 6))
    changed(module, "w", 7)
    changed(module, "w", np.s_[:, 4:])
    for place in range(zeros):
        changed(module, "w", (place % 7, (place % 7 + place // 7) % 4))
    chosen, told = masks(module), reasons(module)
    assert (f"{zeros / 28:.1%} of its weights are 0 here and there" in told) == trained
    assert (f"{zeros / 28:.0%} of its weights are 0, which keep-zeros keeps" in told) != trained
    assert chosen.keys() == ({"d", "u"} if trained else set())
    if trained:
        assert np.flatnonzero(~chosen["d"][:, 0]).tolist() == [7]
        assert np.flatnonzero(~chosen["u"][0]).tolist() == [4, 5]


@st.composite
def adapted(draw: st.DrawFn) -> Module:
    """Draw a spelling or a near miss, with other weights."""
    body = draw(st.sampled_from([*SPELLINGS.values(), *NEAR.values()]))
    text = f"g (float[n, 8] x) => (float[n, 6] y) {{ {body} }}"
    module = filled(text, **SHAPES, o=(2, 1))
    drawn = np.random.default_rng(draw(st.integers(0, 99)))
    for value in module.graph.initializers.values():
        assert value.const_value is not None
        shape = value.const_value.shape.numpy()
        content = drawn.normal(size=shape).astype(np.float32)
        module.replace_initializer(value, ir.Tensor(content, name=value.name))
    return module


@pytest.mark.parametrize("chosen", [MergeLora(), AddLora(rank=2)])
def test_contract_holds(chosen: Any) -> None:
    report = check_pass(chosen, graphs=adapted(), examples=15, seconds=10)
    assert report.rewrites
