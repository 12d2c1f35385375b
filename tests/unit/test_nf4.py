"""NF4: its levels, rounding to them, and the two forms that the graph gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from quantized import (
    GEMM,
    INPUTS,
    LINEAR,
    OUTPUTS,
    TIED,
    calibrated,
    correlated,
    feed_of,
    missed,
    module_of,
    ops,
    outputs,
    quantized,
    relative_error,
    stack,
    weight,
)

from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.passes.quantization.codebook import nearest_levels, nf4_levels
from lwc.passes.quantization.gptq import gptq, round_to_nearest
from lwc.passes.quantization.packing import unpack_rows
from lwc.passes.quantization.rounding import Grid

Array = np.ndarray[Any, Any]

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""Dettmers et al. 2023, Appendix E; float32 quantiles: the last digits differ."""

NF4 = {"codebook": "nf4", "block_size": 32}


def grid(search: Any = "none") -> Grid:
    return Grid(4, True, search, "nf4")


def dequantized_nf4(module: Module, name: str, inputs: int, size: int) -> Array:
    """Read a MatMulBnb4 weight back as [inputs, outputs], by the kernel's source."""
    packed = weight(module, f"{name}_nf4")
    assert packed.ndim == 1
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, size)
    scales = weight(module, f"{name}_scales").astype(np.float64)
    real: Array = np.array(PUBLISHED)[codes] * scales[:, None]
    return real.reshape(-1, inputs).T


def test_levels_are_the_published_ones() -> None:
    np.testing.assert_allclose(nf4_levels(), PUBLISHED, atol=1e-6)
    assert nf4_levels()[7] == 0
    assert nf4_levels()[[0, 15]].tolist() == [-1, 1]


def test_codes_are_those_of_the_nearest_levels() -> None:
    numbers = np.random.default_rng(0).uniform(-1.2, 1.2, (64, 9)).astype(np.float32)
    found = nearest_levels(numbers, nf4_levels())
    distances = np.abs(numbers[..., None] - nf4_levels())
    np.testing.assert_array_equal(found, distances.argmin(axis=-1))
    np.testing.assert_array_equal(nearest_levels(nf4_levels(), nf4_levels()), np.arange(16))


@pytest.mark.parametrize("search", ["none", "mse"])
def test_a_block_spans_its_largest_magnitude(search: Any) -> None:
    weights = np.random.default_rng(1).standard_normal((96, 40)).astype(np.float32)
    weights[10:40, 3] = 0
    made = round_to_nearest(weights, grid(search), 32)
    largest = np.abs(weights.reshape(3, 32, 40)).max(axis=1)
    np.testing.assert_array_equal(np.abs(made.scales), largest)
    assert (made.scales > 0).all() == (search == "none")
    values = made.values(grid(search), 32)
    assert (values[10:40, 3] == 0).all()
    widest = np.diff(nf4_levels()).max() / 2
    assert (np.abs(values - weights) <= widest * np.repeat(largest, 32, axis=0) * 1.00001).all()


def test_normal_weights_lose_less_than_on_an_even_grid() -> None:
    """Blocks of 64 as in QLoRA; symmetric int4 by max|w| / 7, and as lwc has it with a step more.

    Squared errors over 4096 blocks vary by less than 1 %.
    """
    weights = np.random.default_rng(2).standard_normal((1024, 256)).astype(np.float32)

    def lost(made: Grid) -> float:
        return float(
            np.square(round_to_nearest(weights, made, 64).values(made, 64) - weights).sum()
        )

    blocks = weights.reshape(16, 64, 256)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 7
    evenly = float(np.square(np.round(blocks / step) * step - blocks).sum())
    assert lost(grid()) < 0.8 * evenly
    assert lost(grid()) < 0.95 * lost(Grid(4, True, "none"))
    assert lost(grid("mse")) < 0.97 * lost(grid())


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("text", [LINEAR, GEMM])
@pytest.mark.parametrize("search", ["none", "mse"])
def test_the_operator_computes_with_the_stored_weight(text: str, dtype: str, search: Any) -> None:
    """float16: results are rounded to 11 bits, and sums of 96 products of order 1 reach 40."""
    module = module_of(text.replace("float[", f"{dtype}["))
    feed, original = feed_of(module), weight(module, "w").astype(np.float64)
    reference = module_of(text)
    quantized(module, search=search, **NF4)
    assert ops(module)[0] == "MatMulBnb4"
    real = dequantized_nf4(module, "w", INPUTS, 32)
    kept = original if text is LINEAR else original.T
    assert 0.05 < np.linalg.norm(real - kept) / np.linalg.norm(kept) < 0.1
    real = real.astype(np.float32) if text is LINEAR else real.T.astype(np.float32)
    reference.replace_initializer(reference.graph.initializers["w"], ir.Tensor(real))
    wide = {name: array.astype(np.float32) for name, array in feed.items()}
    tolerance = 1e-4 if dtype == "float" else 4e-2
    np.testing.assert_allclose(
        outputs(module, feed)[0], outputs(reference, wide)[0], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("text", [LINEAR, GEMM])
@pytest.mark.parametrize("block_size", [0, 16, 32])
def test_the_standard_form(text: str, block_size: int) -> None:
    module, contrib = module_of(text), module_of(text)
    feed = feed_of(module)
    quantized(module, codebook="nf4", block_size=block_size, format="qdq")
    quantized(contrib, codebook="nf4", block_size=block_size or 32)
    assert {node.domain for node in module.nodes()} == {""}
    onnx.checker.check_model(ir.to_proto(module.model), full_check=True)
    codes = module.graph.initializers["w_nf4"].const_value
    assert codes is not None
    assert codes.nbytes == INPUTS * OUTPUTS // 2
    if block_size:
        np.testing.assert_allclose(
            outputs(module, feed)[0], outputs(contrib, feed)[0], rtol=1e-4, atol=1e-4
        )
    else:
        before = outputs(module_of(text), feed)[0]
        assert np.linalg.norm(outputs(module, feed)[0] - before) < 0.15 * np.linalg.norm(before)


def test_the_standard_form_needs_opset_21() -> None:
    with pytest.raises(PassError, match="needs opset 21, the model has 17"):
        quantized(module_of(LINEAR.replace('"" : 21', '"" : 17')), format="qdq", **NF4)


@pytest.mark.parametrize("format_", ["matmulnbits", "qdq"])
def test_a_second_run_changes_nothing(format_: Any) -> None:
    module = module_of(LINEAR)
    assert quantized(module, format=format_, **NF4).changed
    assert not quantized(module, format=format_, **NF4).changed
    assert missed(module) == []


@pytest.mark.parametrize("format_", ["matmulnbits", "qdq"])
def test_blocks_that_would_straddle_rows_stay(format_: Any) -> None:
    module = module_of(LINEAR.replace("96", "80"))
    assert not quantized(module, format=format_, **NF4).changed
    assert "rows of 80 do not divide into blocks of 32" in missed(module)[0]
    assert quantized(module, format=format_, codebook="nf4", block_size=16).changed


def test_tables_stay_uniform() -> None:
    module = module_of(TIED)
    quantized(module, **NF4)
    assert sorted(name for name in ops(module) if "4" in name or "Quant" in name) == [
        "GatherBlockQuantized",
        "MatMulBnb4",
    ]
    assert {"w_nf4", "table_q8"} <= set(module.graph.initializers)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="codes of 4 bits, not 8"):
        quantized(module_of(LINEAR), codebook="nf4", bits=8)
    with pytest.raises(UsageError, match="block-size=512 is more than the 256"):
        quantized(module_of(LINEAR), codebook="nf4", block_size=512)


def test_figures() -> None:
    """4 bits, and a float32 for each block of 64 by default."""
    module = module_of(LINEAR.replace("96", "128"))
    statistics = quantized(module, codebook="nf4").statistics
    assert statistics["bits per weight"] == 4.5
    assert AnalysisManager(module).get(Cost).total.parameters == 128 * OUTPUTS


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_without_correlation_takes_the_nearest_levels(act_order: bool) -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((48, 24)).astype(np.float32)
    diagonal = np.diag(random.uniform(1, 5, 48))
    found = gptq(weights, diagonal, grid("mse"), 16, by_activation=act_order)
    for made, wanted in zip(found, round_to_nearest(weights, grid("mse"), 16), strict=True):
        np.testing.assert_array_equal(made, wanted)


def test_calibrated_methods_are_nearer_on_other_data() -> None:
    nearest = relative_error(stack(), **NF4)
    by_gptq = relative_error(stack(), method="gptq", **NF4)
    by_awq = relative_error(stack(), method="awq", **NF4)
    assert all(a < 0.8 * b for a, b in zip(by_gptq, nearest, strict=True))
    assert all(a < b for a, b in zip(by_awq, nearest, strict=True))


@pytest.mark.parametrize("format_", ["matmulnbits", "qdq"])
def test_awq_takes_factors_back_from_codes_before(format_: Any) -> None:
    """The factor on `g` goes into `b`, whose scales take it: both forms compute one function."""
    module, other = stack(), stack()
    spread = np.exp(2 * np.random.default_rng(1).standard_normal(96)).astype(np.float32)
    for each, form in ((module, format_), (other, "matmulnbits")):
        b = each.graph.initializers["b"]
        each.replace_initializer(b, ir.Tensor(np.asarray(b.const_value) * spread))
        result = calibrated(each, method="awq", format=form, **NF4)
        assert result.statistics["activations scaled"] == 2
    (feed,) = correlated(count=1, seed=77)
    plain = stack()
    b = plain.graph.initializers["b"]
    plain.replace_initializer(b, ir.Tensor(np.asarray(b.const_value) * spread))
    for found, twin, wanted in zip(
        outputs(module, feed), outputs(other, feed), outputs(plain, feed), strict=True
    ):
        np.testing.assert_allclose(found, twin, rtol=1e-3, atol=1e-4 * np.abs(twin).max())
        assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


def test_what_is_packed_comes_back() -> None:
    """The codes of both layouts are those that the rounding gave."""
    module, standard = module_of(LINEAR), module_of(LINEAR)
    made = round_to_nearest(weight(module, "w"), grid("mse"), 32)
    quantized(module, **NF4)
    quantized(standard, format="qdq", **NF4)
    packed = weight(module, "w_nf4").reshape(OUTPUTS, INPUTS // 2)
    swapped = (packed >> 4) | (packed << 4)
    np.testing.assert_array_equal(unpack_rows(swapped, 4, INPUTS).T, made.codes)
    np.testing.assert_array_equal(
        weight(module, "w_scales").reshape(OUTPUTS, INPUTS // 32).T, made.scales
    )
    blocks = weight(standard, "w_nf4").astype(np.uint8)
    np.testing.assert_array_equal(blocks.reshape(INPUTS, OUTPUTS), made.codes)
