"""smooth: which activations are divided, by what, and that the function stays the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.core.errors import UsageError
from lwc.core.module import Module
from lwc.passes.quantization.channel_factors import Sharing
from lwc.passes.quantization.migration import shared, spread
from lwc.passes.quantization.smooth import Smooth
from lwc.pipeline.passes import PassContext, PassResult
from lwc.rewrite.limit import RewriteLimit
from lwc.verify.structure.well_formed import verify_structure

Array = np.ndarray[Any, Any]

RTOL, ATOL = 2e-5, 2e-5
"""float32, factors up to some hundred through two products."""

SIZE = 8


def weighted(text: str, **weights: tuple[int, ...] | Array) -> Module:
    """Read a graph whose initializers are named `w` and so on; random where a shape is given."""
    listed = ", ".join(f"float[1] {name} = {{0}}" for name in weights)
    module = module_of(text.replace("<>", f"<{listed}>"), opset=17)
    module.import_opset("com.microsoft", 1)
    random = np.random.default_rng(0)
    for name, made in weights.items():
        array = random.standard_normal(made) if isinstance(made, tuple) else made
        value = module.graph.initializers[name]
        module.replace_initializer(value, ir.Tensor(array.astype(np.float32)))
    return module


def feeds(count: int = 3, size: int = SIZE, length: int = 5) -> list[dict[str, Array]]:
    random = np.random.default_rng(1)
    made = random.standard_normal((count, 1, length, size)).astype(np.float32)
    made[..., 2] *= 50  # an outlier channel
    return [{"x": each} for each in made]


def smoothed(module: Module, alpha: float = 0.5, data: list[dict[str, Array]] | None = None) -> Any:
    """Run the pass twice: the second run finds nothing, and the outputs stay the same."""
    data = data or feeds()
    before = [run_plain(module, feed) for feed in data]
    results = []
    for _ in range(2):
        print_before = module.fingerprint()
        ctx = PassContext(
            AnalysisManager(module), source="smooth", make_runner=make_runner,
            calibration=lambda module: data,
        )  # fmt: skip
        results.append(Smooth(alpha).run(module, ctx))
        assert results[-1].changed == (module.fingerprint() != print_before)
        verify_structure(module)
    assert not results[1].changed
    for feed, wanted in zip(data, before, strict=True):
        for a, b in zip(run_plain(module, feed), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL * np.abs(b).max())
    return results[0].statistics.get("pairs smoothed", 0)


def missed(module: Module) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == "missed")


NORM = """g (float[1, s, 8] x) => (float[1, s, 6] y, float[1, s, 4] z) <>
    { n = LayerNormalization <axis = -1> (x, scale, bias)
      y = MatMul (n, w) z = MatMul (n, v) }"""


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_factors_of_a_norm(alpha: float) -> None:
    module = weighted(NORM, scale=(8,), bias=(8,), w=(8, 6), v=(8, 4))
    graph = module.graph
    before = {name: value.const_value.numpy() for name, value in graph.initializers.items()}  # type: ignore[union-attr]
    data = feeds()
    x = np.concatenate([feed["x"].reshape(-1, 8) for feed in data]).astype(np.float64)
    spread = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    activations = (x - x.mean(axis=1, keepdims=True)) / spread * before["scale"] + before["bias"]
    assert smoothed(module, alpha, data) == 1
    largest = np.abs(activations).max(axis=0)
    w = np.maximum(np.abs(before["w"]).max(axis=1), np.abs(before["v"]).max(axis=1))
    factors = largest**alpha / w ** (1 - alpha)
    after = {name: value.const_value.numpy() for name, value in graph.initializers.items()}  # type: ignore[union-attr]
    np.testing.assert_allclose(after["w"], before["w"] * factors[:, None], rtol=1e-5)
    np.testing.assert_allclose(after["v"], before["v"] * factors[:, None], rtol=1e-5)
    np.testing.assert_allclose(after["scale"], before["scale"] / factors, rtol=1e-5)
    np.testing.assert_allclose(after["bias"], before["bias"] / factors, rtol=1e-5)


SPELLED = {
    "scale and bias apart": (
        "m = ReduceMean <axes = [-1]> (x) c = Sub (x, m) f = Mul (c, scale) n = Add (bias, f) "
        "y = MatMul (n, w)",
        {"scale": (8,), "bias": (1, 1, 8), "w": (8, 6)},
    ),
    "a scale in a Constant node": (
        "scale = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]> () "
        "n = Mul (x, scale) y = MatMul (n, w)",
        {"w": (8, 6)},
    ),
    "rms norm with a residual": (
        "n, a, b, r = com.microsoft.SkipSimplifiedLayerNormalization (x, x, scale) "
        "y = MatMul (n, w)",
        {"scale": (8,), "w": (8, 6)},
    ),
    "layer norm with a residual": (
        "n = com.microsoft.SkipLayerNormalization (x, x, scale, bias) y = MatMul (n, w)",
        {"scale": (8,), "bias": (8,), "w": (8, 6)},
    ),
    "weights through a transpose": (
        "n = Mul (x, scale) t = Transpose <perm = [1, 0]> (w) y = MatMul (n, t)",
        {"scale": (8,), "w": (6, 8)},
    ),
    "gate": (
        "g = MatMul (x, w) u = MatMul (x, v) s = Sigmoid (g) h = Mul (s, u) y = MatMul (h, d)",
        {"w": (8, 7), "v": (8, 7), "d": (7, 6)},
    ),
    "a bias behind the layer": (
        "u = MatMul (x, w) b = Add (u, bias) y = MatMul (b, d)",
        {"w": (8, 7), "bias": (7,), "d": (7, 6)},
    ),
    "values of attention": (
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
        "a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v) y = MatMul (a, wo)",
        {"wq": (8, 16), "wk": (8, 16), "wv": (8, 16), "wo": (16, 6)},
    ),
    "heads that are dealt out and joined again": (
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
        "a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v) "
        "apart = Constant <value_ints = [0, 0, 2, 8]> () "
        "joined = Constant <value_ints = [0, 0, 16]> () "
        "h = Reshape (a, apart) t = Transpose <perm = [0, 2, 1, 3]> (h) "
        "b = Transpose <perm = [0, 2, 1, 3]> (t) j = Reshape (b, joined) y = MatMul (j, wo)",
        {"wq": (8, 16), "wk": (8, 16), "wv": (8, 16), "wo": (16, 6)},
    ),
    "heads of values that are shared": (
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
        "a = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> "
        "(q, k, v, , , last, total) y = MatMul (a, wo)",
        {"wq": (8, 32), "wk": (8, 16), "wv": (8, 16), "wo": (32, 6)},
    ),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_pairs(spelling: str) -> None:
    body, weights = SPELLED[spelling]
    module = weighted(f"g (float[1, s, 8] x) => (float[1, s, 6] y) <> {{ {body} }}", **weights)  # type: ignore[arg-type]
    if "last" in body:
        module.graph.inputs[0].shape = ir.Shape([1, 5, 8])
        for name, array in (("last", np.array([4])), ("total", np.array(5))):
            value = module.add_initializer(f"{name}_", array.astype(np.int32))
            attention = next(n for n in module.graph if n.op_type == "GroupQueryAttention")
            attention.replace_input_with(5 if name == "last" else 6, value)
    assert smoothed(module) == 1, missed(module)


def test_a_gemm() -> None:
    module = weighted(
        "g (float[s, 8] x) => (float[s, 6] y) <> { n = Gemm <transB = 1> (x, w, b) "
        "y = Gemm <transB = 1> (n, v, c) }",
        w=(7, 8), b=(7,), v=(6, 7), c=(6,),
    )  # fmt: skip
    data = [{"x": feed["x"][0]} for feed in feeds()]
    assert smoothed(module, data=data) == 1


def test_a_scale_that_two_norms_share_is_parted() -> None:
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 8] y) <> { "
        "n = LayerNormalization <axis = -1> (x, scale) h = MatMul (n, w) "
        "m = LayerNormalization <axis = -1> (h, scale) y = MatMul (m, v) }",
        scale=(8,), w=(8, 8), v=(8, 8),
    )  # fmt: skip
    assert smoothed(module) == 2
    assert len(module.graph.initializers) == 4


@pytest.mark.parametrize(
    ("size", "read"),
    [(1, "y = MatMul (m, c)"), (8, "t = Transpose <perm = [1, 0]> (c) y = MatMul (m, t)")],
)
def test_a_constant_that_is_bias_and_weight_is_parted_at_once(size: int, read: str) -> None:
    """`smoothed` checks that a second run finds nothing."""
    module = weighted(
        f"g (float[1, s, {size}] x) => (float[1, s, {8 // size}] y, float[1, s, 6] z) <> {{ "
        f"u = MatMul (x, w) n = Add (u, c) z = MatMul (n, v) m = Mul (x, scale) {read} }}",
        w=(size, 8), c=(1, 8), v=(8, 6), scale=(size,),
    )  # fmt: skip
    data = [{"x": feed["x"][..., :size]} for feed in feeds()]
    assert smoothed(module, data=data) == 2


def test_a_dead_channel_stays() -> None:
    scale = np.ones(8)
    scale[3] = 0
    rows = np.random.default_rng(2).standard_normal((8, 6))
    rows[5] = 0
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 6] y) <> { n = Mul (x, scale) y = MatMul (n, w) }",
        scale=scale, w=rows,
    )  # fmt: skip
    assert smoothed(module) == 1
    kept = module.graph.initializers["scale"].const_value
    assert kept is not None
    assert kept.numpy()[[3, 5]].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("n = Mul (x, w8) o = Relu (n) y = MatMul (n, w)", {"w8": (8,)}, "Relu reads it"),
        ("n = Relu (x) y = MatMul (n, w)", {}, "comes from Relu"),
        ("y = MatMul (x, w)", {}, "input of the graph"),
        ("n = Mul (x, one) y = MatMul (n, w)", {"one": (1,)}, "no number for each channel"),
        ("n = Mul (x, w8) y = MatMul (n, w) z = MatMul (x, w)", {"w8": (8,)}, "weight is shared"),
        ("a = Abs (x) n = Add (a, x) y = MatMul (n, w)", {}, "a sum of activations"),
        (
            "u = MatMul (x, v) n = Mul (u, w8) o = Abs (n) b = Add (n, w8) y = MatMul (b, w)",
            {"v": (8, 8), "w8": (8,)},
            "read elsewhere",
        ),
        (
            "apart = Constant <value_ints = [1, 5, 2, 4]> () "
            "joined = Constant <value_ints = [1, 5, 8]> () "
            "n = Mul (x, w8) h = Reshape (n, apart) t = Transpose <perm = [0, 1, 3, 2]> (h) "
            "j = Reshape (t, joined) y = MatMul (j, w)",
            {"w8": (8,)},
            "comes from Reshape",
        ),
        (
            "apart = Constant <value_ints = [1, 5, 2, 4]> () "
            "joined = Constant <value_ints = [1, 5, 8]> () "
            "n = Mul (x, w8) h = Reshape (n, apart) o = Abs (h) j = Reshape (h, joined) "
            "y = MatMul (j, w)",
            {"w8": (8,)},
            "comes from Reshape",
        ),
        (
            "n = Relu (x) t = Transpose <perm = [1, 0]> (turned) y = MatMul (n, t)",
            {"turned": (6, 8)},
            "comes from Relu",
        ),
        (
            "n = Mul (x, w8) h = Cast <to = 10> (w) c = Cast <to = 1> (h) y = MatMul (n, c)",
            {"w8": (8,)},
            "its weight is read through a Cast",
        ),
        (
            "n = LayerNormalization <axis = 1> (x, big) y = MatMul (n, w)",
            {"big": (5, 8)},
            "over several axes",
        ),
        (
            "n, a, b, r = com.microsoft.SkipSimplifiedLayerNormalization (x, x, w8) "
            "y = MatMul (r, w)",
            {"w8": (8,)},
            "not the first output",
        ),
    ],
)
def test_what_stays(body: str, weights: dict[str, Any], reason: str) -> None:
    module = weighted(
        f"g (float[1, 5, 8] x) => (float[1, 5, 6] y) <> {{ {body} }}", w=(8, 6), **weights
    )
    assert smoothed(module) == 0
    assert reason in missed(module)


def test_a_cache_keeps_its_values() -> None:
    """What leaves the graph as present values must not be divided."""
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 6] y, float[1, 2, s, 8] pk, float[1, 2, s, 8] pv) <> "
        "{ q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
        "a, pk, pv = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v) "
        "y = MatMul (a, w) }",
        wq=(8, 16), wk=(8, 16), wv=(8, 16), w=(16, 6),
    )  # fmt: skip
    assert smoothed(module) == 0
    assert "keys and values of its attention are read elsewhere" in missed(module)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="alpha"):
        Smooth(1.5)
    module = weighted(NORM, scale=(8,), bias=(8,), w=(8, 6), v=(8, 4))
    ctx = PassContext(AnalysisManager(module), source="smooth", make_runner=make_runner)
    with pytest.raises(UsageError, match="--calibrate PATH"):
        Smooth().run(module, ctx)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_transpose_may_leave_the_axes(order: list[int]) -> None:
    module = weighted(
        f"""g (float[1, s, 8] x) => (float[1, s, 8] y) <>
        {{ n = Mul (x, scale) t = Transpose <perm = {order}> (w) y = MatMul (n, t) }}""",
        scale=(8,), w=(8, 8),
    )  # fmt: skip
    assert smoothed(module) == 1


def test_a_constant_that_is_an_output_keeps_its_content() -> None:
    """`smoothed` compares all outputs."""
    module = weighted(
        """g (float[1, s, 8] x) => (float[1, s, 8] y, float[8] scale) <>
        { n = Mul (x, scale) y = MatMul (n, w) }""",
        scale=(8,), w=(8, 8),
    )  # fmt: skip
    assert smoothed(module) == 1


def test_a_bias_of_more_channels_than_the_norm() -> None:
    module = weighted(
        """g (float[1, s, 1] x) => (float[1, s, 6] y) <>
        { u = LayerNormalization <axis = -1> (x, c, d) n = Add (u, b) y = MatMul (n, w) }""",
        c=(1,), d=(1,), b=(7,), w=(7, 6),
    )  # fmt: skip
    data = [{"x": np.ones((1, 5, 1), np.float32)}]
    assert smoothed(module, data=data) == 0
    assert "has more channels" in missed(module)


def test_channels_that_are_next_to_nothing_stay() -> None:
    scale = np.ones(8, np.float32)
    scale[0] = 1e-9
    module = weighted(
        """g (float[1, s, 8] x) => (float[1, s, 6] y) <>
        { n = Mul (x, scale) y = MatMul (n, w) }""",
        scale=scale, w=(8, 6),
    )  # fmt: skip
    assert smoothed(module) == 1


def applied_once(
    module: Module, data: list[dict[str, Array]] | None = None, alpha: float = 0.5, **settings: Any
) -> PassResult:
    made = data or feeds()
    ctx = PassContext(
        AnalysisManager(module), source="smooth", make_runner=make_runner,
        calibration=lambda module: made, **settings,
    )  # fmt: skip
    return Smooth(alpha).run(module, ctx)


def said(module: Module, kind: str) -> list[str]:
    return [each.message for each in module.remarks if each.kind == kind]


def content(module: Module, name: str) -> Array:
    tensor = module.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


BARE = "g (float[1, s, 8] x) => (float[1, s, 6] y) <> { y = MatMul (x, w) }"


def test_without_pairs_no_data_is_asked_for() -> None:
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 6] y) <> { y = MatMul (x, w) }", w=(8, 6)
    )
    ctx = PassContext(AnalysisManager(module), source="smooth", make_runner=make_runner)
    assert not Smooth().run(module, ctx).changed
    assert said(module, "note") == ["no activation whose channels could be divided"]


def test_what_was_done_is_said() -> None:
    module = weighted(NORM, scale=(8,), bias=(8,), w=(8, 6), v=(8, 4))
    before = content(module, "scale")
    result = applied_once(module)
    factors = before / content(module, "scale")
    assert result.statistics["largest factor"] == pytest.approx(factors.max(), rel=1e-5)
    assert said(module, "note") == []
    assert said(module, "applied") == [
        f"'n' divided by {factors.min():.3g} to {factors.max():.3g}, in the norm before it"
    ]
    assert not applied_once(module).changed
    assert said(module, "note") == ["all activations are as smooth as alpha asks for"]


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_limit_is_kept_from_the_back(allowed: int) -> None:
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 6] y) <> { n = Mul (x, scale) h = MatMul (n, w) "
        "m = LayerNormalization <axis = -1> (h, other) y = MatMul (m, v) }",
        scale=(8,), w=(8, 8), other=(8,), v=(8, 6),
    )  # fmt: skip
    before = {name: content(module, name) for name in ("scale", "other")}
    assert applied_once(module, limit=RewriteLimit(allowed)).changed == bool(allowed)
    changed = [name for name in before if (content(module, name) != before[name]).any()]
    assert changed == {0: [], 1: ["other"], 2: ["scale", "other"]}[allowed]


HALF_NORM = (
    "g (float16[1, s, 8] x) => (float16[1, s, 6] y) <> { n = Mul (x, scale) y = MatMul (n, w) }"
)
HALF_LAYER = (
    "g (float16[1, s, 8] x) => (float16[1, s, 6] y) <> { n = MatMul (x, scale) y = MatMul (n, w) }"
)


def halved(text: str, **weights: Array) -> Module:
    module = weighted(text, **{name: array.astype(np.float32) for name, array in weights.items()})
    for name in weights:
        half = content(module, name).astype(np.float16)
        module.replace_initializer(module.graph.initializers[name], ir.Tensor(half))
    return module


def half_feeds() -> list[dict[str, Array]]:
    return [{"x": feed["x"].astype(np.float16)} for feed in feeds()]


def test_a_constant_that_would_overflow_stays() -> None:
    """One weight of 100 behind a channel of 10,000, at alpha 1."""
    w, scale = np.ones((8, 6)), np.ones(8)
    w[2, 3], scale[2] = 100, 1e4
    module = halved(HALF_NORM, scale=scale, w=w)
    before = content(module, "w")
    result = applied_once(module, [{"x": np.ones((1, 5, 8), np.float16)}], alpha=1.0)
    assert not result.changed
    assert said(module, "missed") == ["'n' stays: a constant would overflow its type"]
    np.testing.assert_array_equal(content(module, "w"), before)


@pytest.mark.parametrize(("text", "shape"), [(HALF_NORM, (8,)), (HALF_LAYER, (8, 8))])
def test_activations_in_half_precision_do_not_grow_before_attention(
    text: str, shape: tuple[int, ...]
) -> None:
    """Behind a layer what lies between might overflow; behind a norm there is nothing."""
    random = np.random.default_rng(3)
    weights = {"scale": random.standard_normal(shape) / 9, "w": random.standard_normal((8, 6))}
    module = halved(text, **weights)
    before = content(module, "scale").astype(np.float32)
    assert applied_once(module, half_feeds()).changed
    factors = before / content(module, "scale").astype(np.float32)
    factors = factors if factors.ndim == 1 else factors[0]
    assert factors.max() > 1.1
    assert (factors.min() < 0.9) == (len(shape) == 1)


def test_activations_in_full_precision_may_grow_before_attention() -> None:
    random = np.random.default_rng(3)
    weights = {"scale": random.standard_normal((8, 8)) / 9, "w": random.standard_normal((8, 6))}
    module = weighted(HALF_LAYER.replace("float16", "float"), **weights)
    before = content(module, "scale")
    assert applied_once(module).changed
    assert (before / content(module, "scale")).min() < 0.9


def test_heads_that_share_values_take_the_largest_of_their_magnitudes() -> None:
    """A factor of the values is that of the largest activations and weights of its heads."""
    sharing = Sharing(2, 2, 3)
    magnitudes = np.arange(12.0)
    assert shared(magnitudes, sharing).tolist() == [3, 4, 5, 9, 10, 11]
    assert spread(shared(magnitudes, sharing), sharing).tolist() == [
        3, 4, 5, 3, 4, 5, 9, 10, 11, 9, 10, 11,
    ]  # fmt: skip


def test_a_copy_has_the_name_of_its_original() -> None:
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 8] y) <> { "
        "n = LayerNormalization <axis = -1> (x, scale) h = MatMul (n, w) "
        "m = LayerNormalization <axis = -1> (h, scale) y = MatMul (m, v) }",
        scale=(8,), w=(8, 8), v=(8, 8),
    )  # fmt: skip
    smoothed(module)
    assert sum("scale" in name for name in module.graph.initializers) == 2


def test_a_product_of_activations_is_not_missed_and_a_stack_of_weights_is() -> None:
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, s] y) <> { n = Mul (x, scale) "
        "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (n, t) }",
        scale=(8,),
    )  # fmt: skip
    assert smoothed(module) == 0
    assert missed(module) == ""
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 6] y) <> { n = Mul (x, scale) y = MatMul (n, w) }",
        scale=(8,), w=(1, 8, 6),
    )  # fmt: skip
    assert smoothed(module) == 0
    assert "MatMul reads it, which is no linear layer" in missed(module)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("n = Mul (x, scale) y = MatMul (n, w) z = Relu (n)", "Relu -> 'z'"),
        ("y = MatMul (x, w) z = Relu (x)", "Relu -> 'z'"),
        ("a = Relu (x) y = MatMul (a, w) z = Abs (x)", "Relu -> 'a'"),
        ("z = Identity (x) y = MatMul (x, w)", "Identity -> 'z'"),
    ],
)
def test_a_remark_names_what_is_in_the_way(body: str, place: str) -> None:
    module = weighted(
        f"g (float[1, s, 8] x) => (float[1, s, 6] y, float[1, s, 8] z) <> {{ {body} }}",
        w=(8, 6), scale=(8,),
    )  # fmt: skip
    applied_once(module)
    (remark,) = [each for each in module.remarks if each.kind == "missed"]
    assert place in str(remark)


def test_where_no_node_is_in_the_way_the_layer_is_named() -> None:
    module = weighted(
        "g (float[1, s, 8] x) => (float[1, s, 6] y) <> { y = MatMul (x, w) }", w=(8, 6)
    )
    applied_once(module)
    (remark,) = [each for each in module.remarks if each.kind == "missed"]
    assert "MatMul -> 'y'" in str(remark)
