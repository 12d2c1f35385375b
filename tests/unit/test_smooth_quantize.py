"""smooth-quantize and llm-int8: int8 activations of every kind, and what outliers do to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend, make_runner
from lwc.calibration.statistics import Sample
from lwc.core.errors import UsageError
from lwc.core.module import Module
from lwc.passes.quantization.convert_dtype import ConvertDtype
from lwc.passes.quantization.int8_rounding import (
    per_channel,
    per_tensor,
    per_token,
    relative_error,
    static,
)
from lwc.passes.quantization.llm_int8 import LlmInt8
from lwc.passes.quantization.mixed_precision import MixedPrecision
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.passes.quantization.smooth import Smooth
from lwc.passes.quantization.smooth_quantize import SmoothQuantize
from lwc.pipeline.passes import Pass, PassContext, PassResult
from lwc.pipeline.spec import parse, to_text
from lwc.rewrite.limit import RewriteLimit
from lwc.verify.structure.well_formed import verify_structure

Array = np.ndarray[Any, Any]
Feeds = list[dict[str, Array]]

WIDTH = 64

NORM = """g (float[1, s, 64] x) => (float[1, s, 96] y, float[1, s, 48] z) <>
    { n = LayerNormalization <axis = -1> (x, scale, bias)
      y = MatMul (n, w) t = Transpose <perm = [1, 0]> (v) z = MatMul (n, t) }"""

GEMM = """g (float[s, 64] x) => (float[s, 96] y) <>
    { y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, c) }"""

BIASED = """g (float[s, 64] x) => (float[s, 96] y) <> { y = Gemm (x, w, c) }"""


def weighted(text: str, opset: int = 17, **weights: tuple[int, ...] | Array) -> Module:
    listed = ", ".join(f"float[1] {name} = {{0}}" for name in weights)
    module = module_of(text.replace("<>", f"<{listed}>"), opset=opset)
    random = np.random.default_rng(0)
    for name, made in weights.items():
        array = random.standard_normal(made) if isinstance(made, tuple) else made
        value = module.graph.initializers[name]
        module.replace_initializer(value, ir.Tensor(array.astype(np.float32)))
    return module


def norm(outliers: float = 1.0) -> Module:
    """Return a norm and two layers behind it, with channels 3 and 40 that much larger."""
    scale = np.ones(WIDTH)
    scale[[3, 40]] = outliers
    return weighted(NORM, scale=scale, bias=np.zeros(WIDTH), w=(64, 96), v=(48, 64))


def gemm(text: str = GEMM) -> Module:
    return weighted(text, w=(96, 64) if "transB" in text else (64, 96), c=(96,))


def feeds(module: Module, count: int = 4, seed: int = 1) -> Feeds:
    random = np.random.default_rng(seed)
    shape = [each if isinstance(each, int) else 9 for each in module.graph.inputs[0].shape or ()]
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def run(chosen: Pass, module: Module, data: Feeds | None, allowed: int | None = None) -> PassResult:
    before = module.fingerprint()
    ctx = PassContext(
        AnalysisManager(module),
        source=chosen.name,
        make_runner=make_runner,
        calibration=None if data is None else lambda module: data,
        limit=RewriteLimit(allowed),
    )
    result = chosen.run(module, ctx)
    assert result.changed == (module.fingerprint() != before)
    verify_structure(module)
    return result


def change(chosen: Pass, module: Module) -> float:
    """Run a pass; return the relative change of the outputs on other data than it saw."""
    fresh = feeds(module, seed=2)
    wanted = [np.concatenate([y.ravel() for y in run_plain(module, feed)]) for feed in fresh]
    run(chosen, module, feeds(module, 40))
    found = [np.concatenate([y.ravel() for y in run_plain(module, feed)]) for feed in fresh]
    return relative_error(np.stack(found), np.stack(wanted))


def ops(module: Module) -> list[str]:
    return [node.op_type for node in module.graph]


def said(module: Module, kind: str) -> str:
    return "\n".join(each.message for each in module.remarks if each.kind == kind)


ROUNDING = 0.015
"""Of an output, relative, with normal activations and weights of 64 inputs. Rounding to ±127 steps
of a maximum near 3 sigma is off by 3 / 127 / sqrt(12) = 0.7 %, once for each of the two."""

COARSE = 0.03
"""The same where weights have ±63 steps, or a scale is shared by all tokens."""


def test_int8_golden_vector() -> None:
    weights = (
        "1.46 .34 2.18 1.06 .62 .20 1.61 .37 .38 .56 .97 .46 .13 .54 1.03 .38 .49 2.49 2.00 1.58"
    )
    golden = "74 17 111 54 32 10 82 19 19 29 49 23 7 28 53 19 25 127 102 81"
    column = np.array(weights.split(), np.float32)
    step = 2.49 / 127
    wanted = np.array(golden.split(), np.float32) * step
    for found in (per_channel(column[:, None])[:, 0], per_token(column[None])[0]):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert np.abs(found - column).max() <= step / 2 * (1 + 1e-6)
    np.testing.assert_allclose(static(column, step), wanted, rtol=1e-6)
    assert static(np.array([9.0, -9.0]), step).tolist() == pytest.approx([127 * step, -128 * step])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_an_error_does_not_depend_on_the_unit(size: float) -> None:
    wanted = (np.arange(1, 9, dtype=np.float32) * np.float32(size)).reshape(2, 4)
    assert relative_error(wanted * np.float32(1.25), wanted) == pytest.approx(0.25, rel=1e-5)


def test_a_row_of_zeros_stays() -> None:
    zeros = np.zeros((2, 3), np.float32)
    for found in (per_token(zeros), per_channel(zeros), per_tensor(zeros)):
        assert not found.any()
    assert relative_error(zeros, zeros) == 0


def test_per_tensor_is_what_the_operator_does() -> None:
    module = module_of(
        """g (float[s, 8] x) => (float[s, 8] y) {
        q, step, zero = DynamicQuantizeLinear (x) y = DequantizeLinear (q, step, zero) }"""
    )
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32) + 1
    (wanted,) = run_plain(module, {"x": x})
    np.testing.assert_allclose(per_tensor(x), wanted, atol=1e-6)


def test_a_sample_is_even_and_repeatable() -> None:
    rows = np.arange(1000, dtype=np.float32)[:, None]
    samples = [Sample(100, 5) for _ in range(4)]
    for sample in samples[:2]:
        for start in range(0, 1000, 125):
            sample.update(rows[start : start + 125])
    samples[2].update(rows[:60].reshape(3, 20, 1))
    samples[3].update(rows)
    assert np.array_equal(samples[0].value, samples[1].value)
    assert np.array_equal(samples[0].value, samples[3].value), "whatever the batches"
    assert samples[0].value.shape == (100, 1)
    assert len(np.unique(samples[0].value)) == 100
    # 100 of 1000 without repeats: the mean's deviation is 27; four of them.
    assert abs(samples[0].value.mean() - 499.5) < 110
    assert np.array_equal(samples[2].value, rows[:60])


@pytest.mark.parametrize(
    ("chosen", "wanted", "bound"),
    [
        (SmoothQuantize(), ["DynamicQuantMatMul"] * 2, ROUNDING),
        (SmoothQuantize(0.5), ["DynamicQuantMatMul"] * 2, ROUNDING),
        (SmoothQuantize(None), ["DynamicQuantMatMul"] * 2, ROUNDING),
        (SmoothQuantize(activations="per-tensor"), ["DynamicQuantizeMatMul"] * 2, COARSE),
        (SmoothQuantize(activations="static"), ["QuantizeLinear"], COARSE),
        (SmoothQuantize(activations="static", clip="max"), ["QuantizeLinear"], COARSE),
        (SmoothQuantize(activations="static", clip="percentile"), ["QuantizeLinear"], COARSE),
        (SmoothQuantize(activations="static", clip="entropy"), ["QuantizeLinear"], COARSE),
        (LlmInt8(), ["DynamicQuantMatMul"] * 2, ROUNDING),
    ],
    ids=lambda each: to_text([each]) if isinstance(each, Pass) else None,
)
def test_every_kind_of_activation(chosen: Pass, wanted: list[str], bound: float) -> None:
    module = norm()
    assert change(chosen, module) < bound
    assert [op for op in ops(module) if op in {*wanted}] == wanted
    result = run(chosen, module, feeds(module))
    assert not result.changed


@pytest.mark.parametrize("text", [GEMM, BIASED])
@pytest.mark.parametrize("activations", ["per-token", "per-tensor", "static"])
def test_gemm(text: str, activations: Any) -> None:
    chosen = SmoothQuantize(None, activations=activations)
    assert change(chosen, gemm(text)) < COARSE
    assert change(LlmInt8(3.0), gemm(text)) < ROUNDING


def test_errors_of_weights_and_outputs_are_reported() -> None:
    for chosen in (
        SmoothQuantize(),
        SmoothQuantize(activations="per-tensor"),
        SmoothQuantize(activations="static"),
        LlmInt8(3.0),
    ):
        module = norm()
        result = run(chosen, module, feeds(module))
        assert 0 < float(result.statistics["mean relative error of outputs"]) < COARSE
        assert 0 < float(result.statistics["mean relative error"]) < COARSE
        assert said(module, "applied").count("of its outputs") == 2
    module = norm()
    result = run(SmoothQuantize(None), module, None)
    assert "mean relative error of outputs" not in result.statistics


def test_the_reported_error_is_that_of_the_outputs() -> None:
    """One layer without a bias: what the pass says on its data is what happens there."""
    module = weighted("g (float[s, 64] x) => (float[s, 96] y) <> { y = MatMul (x, w) }", w=(64, 96))
    data = feeds(module)
    wanted = np.concatenate([run_plain(module, feed)[0] for feed in data])
    result = run(SmoothQuantize(None), module, data)
    found = np.concatenate([run_plain(module, feed)[0] for feed in data])
    told = float(result.statistics["mean relative error of outputs"])
    assert told == pytest.approx(relative_error(found, wanted), rel=1e-3)


def test_static_is_standard_and_of_old_opsets() -> None:
    module = gemm()
    module.graph.opset_imports[""] = 13
    run(SmoothQuantize(None, activations="static"), module, feeds(module))
    assert set(module.graph.opset_imports) <= {"", "com.microsoft"}
    assert not [node for node in module.nodes() if node.domain]
    assert not module.model.functions
    weights = [
        node for node in module.nodes()
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()  # type: ignore[union-attr]
    ]  # fmt: skip
    (codes,) = [node.inputs[0].const_value for node in weights]  # type: ignore[union-attr]
    assert codes is not None
    assert codes.dtype == ir.DataType.INT8
    assert np.abs(codes.numpy()).max() == 63


def test_static_runs_where_the_runtime_turns_weights_into_uint8() -> None:
    module = gemm()
    data = feeds(module)
    run(SmoothQuantize(None, activations="static", weight_bits=8), module, data)
    found = []
    for precise in "01":
        config = {"session.x64quantprecision": precise}
        with OnnxRuntimeBackend().compile(module, config=config) as compiled:
            found.append(next(iter(compiled.run(data[0]).values())))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_static_scales_come_from_the_data() -> None:
    for clip, bound in (("max", 1.0), ("percentile", 1.0), ("mse", 1.0)):
        module = gemm()
        data = feeds(module)
        largest = max(float(np.abs(feed["x"]).max()) for feed in data)
        run(SmoothQuantize(None, activations="static", clip=clip), module, data)  # type: ignore[arg-type]
        node = next(node for node in module.nodes() if node.op_type == "QuantizeLinear")
        scale = node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        assert 0.5 * largest < 127 * float(scale) <= bound * largest * (1 + 2 / 2048)


def test_static_clips_outliers_where_that_costs_least() -> None:
    """One number of 25 among 256000 normal ones: the step for it would cost twice as much."""
    module = gemm()
    x = np.random.default_rng(0).standard_normal((4000, WIDTH)).astype(np.float32)
    x[7, 7] = 25
    run(SmoothQuantize(None, activations="static", clip="mse"), module, [{"x": x}])
    node = next(node for node in module.nodes() if node.op_type == "QuantizeLinear")
    step = float(node.inputs[1].const_value.numpy())  # type: ignore[union-attr]

    def lost(step: float) -> float:
        return float(np.square(static(x, step) - x, dtype=np.float64).sum())

    tried = [lost(limit / 127) for limit in np.linspace(2, 25, 100)]
    assert lost(step) < 1.02 * min(tried)
    assert lost(step) < 0.7 * lost(25 / 127)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-5, 1e-6])
def test_static_scales_are_such_as_half_precision_stores(size: float) -> None:
    """Small float16 activations are whole steps of 2**-24, which is the least scale."""
    text = """g (float16[s, 64] x) => (float16[s, 96] y) <float16[1] w = {0}>
        { r = Relu (x) y = MatMul (r, w) }"""
    module = module_of(text, opset=19)
    random = np.random.default_rng(0)
    value = module.graph.initializers["w"]
    module.replace_initializer(
        value, ir.Tensor(random.standard_normal((64, 96)).astype(np.float16))
    )
    data = [{"x": (random.standard_normal((20, 64)) * size).astype(np.float16)}]
    (wanted,) = run_plain(module, data[0])
    result = run(SmoothQuantize(None, activations="static", clip="max"), module, data)
    (found,) = run_plain(module, data[0])
    node = next(node for node in module.nodes() if node.op_type == "QuantizeLinear")
    assert float(node.inputs[1].const_value.numpy()) > 0  # type: ignore[union-attr]
    off = relative_error(found.astype(np.float32), wanted.astype(np.float32))
    # Sums near the least float16 are off by as much again.
    assert off < 0.05
    told = float(result.statistics["mean relative error of outputs"])
    assert told == pytest.approx(off, rel=0.3)


def test_an_activation_of_zeros_gets_a_scale() -> None:
    module = gemm()
    data = [{"x": np.zeros((4, WIDTH), np.float32)}]
    run(SmoothQuantize(None, activations="static"), module, data)
    node = next(node for node in module.nodes() if node.op_type == "QuantizeLinear")
    assert float(node.inputs[1].const_value.numpy()) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [None, 7, 8])
def test_products_of_pairs_fit_16_bits(bits: Any) -> None:
    """Two products of uint8 and int8 stay within int16 where weights lie within ±64."""
    module = gemm()
    run(SmoothQuantize(None, activations="per-tensor", weight_bits=bits), module, None)
    node = next(node for node in module.nodes() if node.op_type == "DynamicQuantizeMatMul")
    codes = node.inputs[1].const_value.numpy().astype(np.int64)  # type: ignore[union-attr]
    assert (2 * 255 * np.abs(codes).max() < 2**15) == (bits != 8)
    assert (node.inputs[2].const_value.numpy() > 0).all()  # type: ignore[union-attr]


def test_outliers_wreck_int8_and_all_three_recover_it() -> None:
    """Channels 1000 times as large leave the others of a token about one step.

    The weights behind them are as much smaller, so that they give no more of the outputs.
    """
    plain = change(SmoothQuantize(None), norm(1.0))

    def planted() -> Module:
        module = norm(1000.0)
        for name, axis in (("w", 0), ("v", 1)):
            value = module.graph.initializers[name]
            array = value.const_value.numpy().copy()  # type: ignore[union-attr]
            np.moveaxis(array, axis, 0)[[3, 40]] /= 1000
            module.replace_initializer(value, ir.Tensor(array))
        return module

    wrecked = change(QuantizeWeights(bits=8, block_size=0, symmetric=True, format="lwc"), planted())
    assert wrecked > 20 * plain
    assert change(SmoothQuantize(0.5), planted()) < 2 * plain
    assert change(SmoothQuantize("auto"), planted()) < 2 * plain
    module = planted()
    assert change(LlmInt8(100.0), module) < 2 * plain
    assert ops(module).count("Where") == ops(module).count("Gather") == 1, "two layers share them"


def test_threshold_zero_is_floating_point() -> None:
    module = norm(100.0)
    before = module.fingerprint()
    result = run(LlmInt8(0.0), module, feeds(module))
    assert not result.changed
    assert module.fingerprint() == before
    assert said(module, "missed").count("every channel it reads reaches threshold=0") == 2


def test_no_outliers_is_plain_int8() -> None:
    first, second = norm(), norm()
    data = feeds(first)
    result = run(LlmInt8(1e6), first, data)
    run(SmoothQuantize(None), second, data)
    assert result.statistics["channels in float"] == 0
    for feed in data:
        for a, b in zip(run_plain(first, feed), run_plain(second, feed), strict=True):
            np.testing.assert_array_equal(a, b)


def test_more_channels_in_float_cost_less_accuracy() -> None:
    errors = [change(LlmInt8(threshold), norm()) for threshold in (1e6, 3.0, 2.5)]
    assert errors == sorted(errors, reverse=True)


def test_only_the_large_channels_are_masked() -> None:
    module = norm(100.0)
    data = feeds(module)
    run(LlmInt8(50.0), module, data)
    where = next(node for node in module.nodes() if node.op_type == "Where")
    assert where.inputs[0].const_value.numpy().sum() == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(("threshold", "channels"), [(6.0, 1), (6.0000005, 0)])
def test_a_channel_that_reaches_the_threshold_exactly(threshold: float, channels: int) -> None:
    module = gemm()
    x = np.random.default_rng(0).uniform(-1, 1, (9, WIDTH)).astype(np.float32)
    x[3, 5] = -6
    result = run(LlmInt8(threshold), module, [{"x": x}])
    assert result.statistics["channels in float"] == channels


@pytest.mark.parametrize(
    "after",
    [
        QuantizeWeights(),
        QuantizeWeights(bits=8, format="lwc"),
        QuantizeWeights(method="gptq"),
        SmoothQuantize(None),
        LlmInt8(1.5),
        LlmInt8(50.0),
        MixedPrecision(16.0, format="lwc"),
    ],
)
def test_weights_of_large_channels_stay_in_floating_point(after: Pass) -> None:
    scale = np.ones(WIDTH)
    scale[::4] = 100.0
    module = weighted(NORM, scale=scale, bias=np.zeros(WIDTH), w=(64, 96), v=(48, 64))
    data = feeds(module)
    run(LlmInt8(50.0), module, data)
    text = module.fingerprint()
    assert not run(after, module, data).changed
    assert module.fingerprint() == text
    said_of = "\n".join(each.message for each in module.remarks)
    if not isinstance(after, MixedPrecision):
        assert "'w_outliers' stays: it multiplies the channels that an int8 product" in said_of


def test_weights_of_large_channels_stay_in_half_precision_too() -> None:
    module = norm(100.0)
    data = feeds(module)
    run(LlmInt8(50.0), module, data)
    run(ConvertDtype("float16"), module, None)
    assert not run(QuantizeWeights(block_size=16), module, None).changed
    assert "'w_outliers' stays: it multiplies" in said(module, "missed")


def test_other_choices_of_channels_are_quantized() -> None:
    """The int8 product beside them has these channels too."""
    text = """g (float[s, 64] x) => (float[s, 96] y) <> {
        c = Constant <value_ints = [0, 5, 9, 11, 13, 14, 20, 22, 30, 31, 32, 33, 40, 50, 51, 52]> ()
        a = Gather <axis = -1> (x, c) p = MatMul (a, w) q = MatMul (x, v) y = Add (p, q) }"""
    module = weighted(text, w=(16, 96), v=(64, 96))
    run(SmoothQuantize(None, exclude=("w",)), module, None)
    assert run(QuantizeWeights(block_size=16), module, None).statistics["weights quantized"] == 1


def test_one_weight_of_two_activations() -> None:
    text = """g (float[s, 64] x) => (float[s, 96] y) <> { a = Mul (x, big) b = Mul (x, other)
        p = MatMul (a, w) q = MatMul (b, w) y = Add (p, q) }"""
    for chosen in (LlmInt8(5.0), SmoothQuantize(None, activations="static"), SmoothQuantize()):
        big, other = np.ones(64), np.ones(64)
        big[3], other[7] = 4, 3
        module = weighted(text, big=big, other=other, w=(64, 96))
        assert change(chosen, module) < COARSE
        if isinstance(chosen, LlmInt8):
            assert ops(module).count("Where") == 2


@pytest.mark.parametrize("alpha", ["auto", 0.3])
def test_smooth_stays_exact_and_settles(alpha: Any) -> None:
    module = norm(30.0)
    data = feeds(module)
    before = [run_plain(module, feed) for feed in data]
    assert run(Smooth(alpha), module, data).changed
    for feed, wanted in zip(data, before, strict=True):
        for a, b in zip(run_plain(module, feed), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
    assert not run(Smooth(alpha), module, data).changed


@pytest.mark.parametrize("alpha", ["auto", 0.5])
def test_a_product_divides_what_no_constant_can(alpha: Any) -> None:
    """A norm that the residual sum reads too, and what a Relu gives."""
    text = """g (float[1, s, 64] x) => (float[1, s, 64] y) <>
        { n = LayerNormalization <axis = -1> (x, scale) h = MatMul (n, w) r = Relu (h)
          d = MatMul (r, v) y = Add (n, d) }"""
    scale = np.ones(WIDTH)
    scale[[3, 40]] = 30

    def made() -> Module:
        return weighted(text, scale=scale, w=(64, 96), v=(96, 64))

    module = made()
    data = feeds(module)
    before = [run_plain(module, feed)[0] for feed in data]
    result = run(Smooth(alpha, products=True), module, data)
    assert result.statistics["pairs smoothed"] == 2
    assert ops(module).count("Mul") == 2
    assert "by a product of its own" in said(module, "applied")
    for feed, wanted in zip(data, before, strict=True):
        found = run_plain(module, feed)[0]
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    assert not run(Smooth(alpha, products=True), module, data).changed
    assert not run(Smooth(alpha), module, data).changed
    assert not run(Smooth(alpha), made(), data).changed
    plain = change(SmoothQuantize(None), made())
    assert change(SmoothQuantize(alpha, products=True), made()) < 0.8 * plain


def test_weights_by_gptq() -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        module = gemm(BIASED)
        result = run(SmoothQuantize(None, method=method), module, feeds(module, 40))
        errors[method] = float(result.statistics["mean relative error of outputs"])
    # White noise has a diagonal X·Xᵀ, up to the sample: there is next to nothing to make up for.
    assert errors["gptq"] < 1.02 * errors["rtn"]


def test_auto_says_what_it_took_and_leaves_what_gains_nothing() -> None:
    module = norm(30.0)
    run(Smooth("auto"), module, feeds(module))
    assert "; alpha=0." in said(module, "applied")
    flat = weighted(
        "g (float[1, s, 64] x) => (float[1, s, 64] y) <> { n = Mul (x, scale) y = MatMul (n, w) }",
        scale=np.ones(WIDTH), w=np.ones((64, 64)),
    )  # fmt: skip
    result = run(Smooth("auto"), flat, [{"x": np.ones((1, 9, WIDTH), np.float32)}])
    assert not result.changed


def test_auto_is_no_worse_than_any_alpha() -> None:
    """By what it minimises, on the data it saw."""
    errors = {}
    for alpha in (None, 0.0, 0.25, 0.5, 0.75, 1.0, "auto"):
        module = norm(100.0)
        data = feeds(module)
        wanted = [np.concatenate([y.ravel() for y in run_plain(module, feed)]) for feed in data]
        run(SmoothQuantize(alpha), module, data)
        found = [np.concatenate([y.ravel() for y in run_plain(module, feed)]) for feed in data]
        errors[alpha] = relative_error(np.stack(found), np.stack(wanted))
    # 1 % for candidates that gain too little, 1 % for scales in float16.
    assert errors["auto"] <= 1.02 * min(errors.values())


def test_what_stays_is_said() -> None:
    text = """g (float[s, 64] x, bool c) => (float[s, 96] y) <> {
        y = If (c) <then_branch = a () => (float[s, 96] p) { p = MatMul (x, w) },
                    else_branch = b () => (float[s, 96] q) { q = MatMul (x, v) }> }"""
    for chosen in (SmoothQuantize(None, activations="static"), LlmInt8()):
        module = weighted(text, w=(64, 96), v=(64, 96))
        data = [feeds(module)[0] | {"c": np.array(True)}]
        assert not run(chosen, module, data).changed
        assert said(module, "missed").count("belongs to a subgraph") == 2
    module = norm()
    run(SmoothQuantize(None, exclude=("w",)), module, None)
    assert "'w' stays: exclude=w matches" in said(module, "missed")
    assert ops(module).count("MatMul") == 1
    module = gemm()
    run(SmoothQuantize(None, ops=("MatMul",)), module, None)
    assert "Gemm is not among ops" in said(module, "missed")


@pytest.mark.parametrize("left", ["k", "r"])
def test_what_multiplies_a_constant_stays(left: str) -> None:
    text = f"""g (float[s, 64] x) => (float[s, 96] y) <> {{
        r = Relu (k) a = MatMul ({left}, w) z = MatMul (x, v) y = Add (a, z) }}"""
    for chosen in (SmoothQuantize(None, activations="static"), LlmInt8()):
        module = weighted(text, k=(1, 64), w=(64, 96), v=(64, 96))
        result = run(chosen, module, feeds(module))
        assert result.statistics["weights quantized"] == 1
        assert "'w' stays: it multiplies a constant" in said(module, "missed")
        assert "w" in module.graph.initializers


def test_embeddings_are_left_by_static_only() -> None:
    text = """g (int64[s] ids) => (float[s, 96] y) <>
        { x = Gather (table, ids) y = MatMul (x, w) }"""
    data = [{"ids": np.arange(12)}]
    for activations, gathers in (("per-token", 0), ("per-tensor", 0), ("static", 1)):
        module = weighted(text, opset=21, table=(32, 64), w=(64, 96))
        run(SmoothQuantize(None, activations=activations), module, data)  # type: ignore[arg-type]
        assert ops(module).count("Gather") == gathers
        assert bool("embedding table" in said(module, "missed")) == bool(gathers)


def test_a_limit_stops_after_some_rewrites() -> None:
    for allowed, products in ((0, 0), (1, 0), (2, 1), (3, 2)):
        module = norm(30.0)
        run(SmoothQuantize(), module, feeds(module), allowed)
        assert ops(module).count("DynamicQuantMatMul") == products
    module = norm(30.0)
    run(LlmInt8(20.0), module, feeds(module), 1)
    assert ops(module).count("DynamicQuantMatMul") == ops(module).count("Where") == 1


@pytest.mark.parametrize(
    "chosen", [SmoothQuantize(), SmoothQuantize(None, activations="static"), LlmInt8()]
)
def test_what_needs_data_says_so(chosen: Pass) -> None:
    with pytest.raises(UsageError, match="--calibrate PATH"):
        run(chosen, norm(), None)


def test_options() -> None:
    for text in ("smooth{auto}", "smooth-quantize{none activations=static}", "llm-int8{4.5}"):
        assert to_text(parse(text)) == text
    for wrong in (lambda: SmoothQuantize(2.0), lambda: Smooth(-1.0), lambda: LlmInt8(-1.0)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="ops=Conv"):
        SmoothQuantize(ops=("Conv",))
    with pytest.raises(UsageError, match="float or auto"):
        parse("smooth{fast}")
