"""`quantize-weights{format=lwc}` and `format=auto`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from dialect import Case, expected
from quantized import (
    GEMM,
    INPUTS,
    LINEAR,
    TIED,
    calibrated,
    correlated,
    feed_of,
    missed,
    module_of,
    outputs,
    quantized,
    stack,
    weight,
)

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.target import Table, Target
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.inputs import InputRole, RoleKind, input_role
from lwc.core.errors import LwcError, PassError, UsageError
from lwc.core.module import Module
from lwc.core.quant_layout import TILE, unpack_codes
from lwc.passes.quantization.dialect_ops import variant_of
from lwc.passes.quantization.kernel_choice import choose_operator
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import PassContext
from lwc.pipeline.record import take_snapshot


def test_what_an_operator_means_is_not_counted_as_nodes() -> None:
    module = module_of(LINEAR)
    before = take_snapshot(module)
    quantized(module, bits=4, format="lwc")
    after = take_snapshot(module)
    assert after.ops == {
        "lwc::DynamicQuantMatMul" if k == "MatMul" else k: v for k, v in before.ops.items()
    }
    assert after.parameter_bytes == sum(
        each.const_value.nbytes for each in module.graph.initializers.values() if each.const_value
    )


def kinds(module: Module) -> list[str]:
    return [node.op_type for node in module.graph]


def case_of(module: Module, name: str = "w") -> Case:
    """Read a product back, by the layout's documentation."""
    (node,) = [
        node for node in module.graph
        if variant_of(node) and (node.inputs[1].name or "").startswith(f"{name}_q")  # type: ignore[union-attr]
    ]  # fmt: skip
    variant = variant_of(node)
    assert variant is not None

    tiles = -(-variant.N // TILE)

    def columns(array: Any) -> Any:
        rows = array.reshape(tiles, -1, TILE).transpose(1, 0, 2)
        return rows.reshape(len(rows), -1)[:, : variant.N]

    arrays = [weight(module, value.name or "") for value in node.inputs[1:] if value is not None]
    zeros = columns(arrays[2]) if variant.zero_points else np.zeros(0)
    bias = arrays[2 + variant.zero_points] if variant.bias else np.zeros(0)
    codes = unpack_codes(arrays[0].reshape(tiles, -1), variant.bits, variant.K, variant.N)
    return Case(variant, codes, columns(arrays[1]), zeros, bias)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [0, 32, 64])
def test_the_product_is_that_of_the_codes(bits: Any, symmetric: bool, block: int) -> None:
    module = module_of(LINEAR)
    real = weight(module, "w")
    quantized(module, bits=bits, symmetric=symmetric, block_size=block, format="lwc")
    assert kinds(module) == ["DynamicQuantMatMul"]
    case = case_of(module)
    assert (case.variant.block_size, case.variant.x_block) == (block, int(block > 0))
    feed = feed_of(module)
    (found,) = outputs(module, feed)
    np.testing.assert_allclose(found, expected(case, feed["x"]), rtol=1e-5, atol=1e-4)
    # Steps of a uniform grid over normal numbers: 2, 3, 4, 8 bits.
    bound = {2: 0.75, 3: 0.35, 4: 0.18, 8: 0.012}[bits]
    assert np.linalg.norm(case.weight() - real) < bound * np.linalg.norm(real)


def test_bits_order_the_error() -> None:
    errors = []
    for bits in (2, 3, 4, 8):
        result = quantized(module_of(LINEAR), bits=bits, format="lwc")
        errors.append(float(result.statistics["mean relative error"]))
    assert all(2 * b < a for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("scaled", [False, True])
def test_gemm(scaled: bool) -> None:
    text = GEMM if scaled else GEMM.replace(", alpha = 0.5, beta = 2.0", "")
    module = module_of(text)
    feed = feed_of(module)
    (before,) = outputs(module, feed)
    quantized(module, bits=8, format="lwc")
    wanted = ["Mul", "Mul", "Add"] if scaled else []
    assert sorted(kinds(module)) == sorted(["DynamicQuantMatMul", *wanted])
    (after,) = outputs(module, feed)
    assert np.linalg.norm(after - before) < 0.01 * np.linalg.norm(before)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("format_", ["lwc", "matmulnbits"])
def test_each_factor_of_gemm_alone(alpha: float, beta: float, format_: Any) -> None:
    module = module_of(GEMM.replace("alpha = 0.5, beta = 2.0", f"alpha = {alpha}, beta = {beta}"))
    feed = feed_of(module)
    (before,) = outputs(module, feed)
    quantized(module, bits=8, format=format_)
    assert (kinds(module).count("Mul"), kinds(module).count("Add")) == (1, 1)
    (after,) = outputs(module, feed)
    assert np.linalg.norm(after - before) < 0.01 * np.linalg.norm(before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [0, 32, 64])
def test_an_embedding_reads_the_codes_of_its_head(bits: Any, symmetric: bool, block: int) -> None:
    module = module_of(TIED)
    table = weight(module, "table")
    feed = feed_of(module)
    feed["ids"][0, :2] = [-1, -64]  # from the end
    quantized(module, embeddings=bits, symmetric=symmetric, block_size=block, format="lwc")
    assert kinds(module).count("DynamicQuantMatMul") == 2
    assert not {"MatMul", "GatherBlockQuantized", "MatMulNBits"} & set(kinds(module))
    case = case_of(module, "table")
    found = run_plain_exposing(module, feed, "found")
    np.testing.assert_allclose(found, case.weight().T[feed["ids"]], rtol=1e-6)
    assert np.linalg.norm(case.weight().T - table) < 0.18 * np.linalg.norm(table)
    ids = next(value for value in module.graph.inputs if value.name == "ids")
    assert input_role(module, ids) == InputRole(RoleKind.IDS, 0, 63)
    feed["ids"][0, 0] = 64
    with pytest.raises(LwcError, match="64"):
        run_plain_exposing(module, feed, "found")


def run_plain_exposing(module: Module, feed: Any, name: str) -> Any:
    with make_runner(module, [name]) as runner:
        return runner.run(feed, [name])[name]


def test_an_embedding_alone_stays_with_onnxruntime() -> None:
    text = TIED.replace("turned = Transpose<perm = [1, 0]>(table)", "").replace(
        "MatMul(h, turned)", "Identity(h)"
    )
    module = module_of(text.replace("float[batch,seq,64] logits", "float[batch,seq,96] logits"))
    quantized(module, format="lwc")
    assert "GatherBlockQuantized" in kinds(module)


def test_scales_are_float16_where_they_fit() -> None:
    for factor, kind in ((1.0, np.float16), (1e-9, np.float32)):
        module = module_of(LINEAR)
        value = module.graph.initializers["w"]
        module.replace_initializer(value, ir.Tensor(weight(module, "w") * np.float32(factor)))
        quantized(module, bits=8, block_size=0, symmetric=True, format="lwc")
        assert case_of(module).scales.dtype == kind
        (found,) = outputs(module, feed_of(module))
        assert np.abs(found).max() > 0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("small", [1.0, 1e-3, 1e-6])
def test_a_small_column_is_as_precise_as_a_large_one(method: Any, small: float) -> None:
    """Its scale is no normal number of float16: 8 bits leave 2 % of a column, GPTQ a bit more."""
    module = stack()
    real = weight(module, "a").copy()
    real[:, ::3] *= np.float32(small)
    module.replace_initializer(module.graph.initializers["a"], ir.Tensor(real))
    result = calibrated(module, method=method, bits=8, block_size=0, format="lwc")
    case = case_of(module, "a")
    assert case.scales.dtype == (np.float16 if small == 1 else np.float32)
    off = np.linalg.norm(case.weight() - real, axis=0) / np.linalg.norm(real, axis=0)
    assert off.max() < 0.03
    if method == "gptq":
        assert result.statistics["weights quantized"] == 4


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_reported_error_is_that_of_the_scales_as_stored(method: Any) -> None:
    """A weight of ±127 steps is exact but for its scale, which float16 rounds."""
    module = stack()
    codes = np.random.default_rng(0).integers(-127, 128, (96, 96))
    codes[0] = 127
    steps = np.linspace(0.001, 0.0011, 96)
    real = (codes * steps).astype(np.float32)
    module.replace_initializer(module.graph.initializers["a"], ir.Tensor(real))
    result = calibrated(
        module, method=method, bits=8, block_size=0, symmetric=True, format="lwc",
        exclude=("b", "c", "d"),
    )  # fmt: skip
    case = case_of(module, "a")
    assert case.scales.dtype == np.float16
    off = np.linalg.norm(case.weight().astype(np.float64) - real) / np.linalg.norm(real)
    assert result.statistics["worst relative error"] == pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("bits", [3, 8])
def test_calibrated_methods(method: Any, bits: Any) -> None:
    """What the graph computes is what the layers were rounded to, factors of AWQ included."""
    (feed,) = correlated(count=1, seed=77)
    wanted = outputs(stack(), feed)
    errors: dict[str, float] = {}
    for each in ("rtn", method):
        module = stack()
        calibrated(module, method=each, bits=bits, block_size=32, format="lwc")
        assert kinds(module).count("DynamicQuantMatMul") == 4
        found = outputs(module, feed)
        errors[each] = max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(found, wanted, strict=True)
        )
    if bits == 8:  # two layers of int8 activations: below 1 % each
        assert errors[method] < 0.02
    else:
        assert errors[method] < errors["rtn"]


def test_second_run_changes_nothing() -> None:
    module = module_of(LINEAR)
    quantized(module, bits=3, format="lwc")
    assert not quantized(module, bits=3, format="lwc").changed


def test_half_precision_stays_with_a_reason() -> None:
    module = module_of(LINEAR.replace("float[", "float16["))
    assert not quantized(module, format="lwc").changed
    assert "take float32" in missed(module)[0]


def test_the_module_gets_what_overloads_need() -> None:
    module = module_of(LINEAR.replace("ir_version: 10", "ir_version: 8"))
    quantized(module, format="lwc")
    assert module.model.ir_version == 10
    assert module.graph.opset_imports["lwc"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "no 3 bits"),
        ({"bits": 3, "format": "qdq"}, "no 3 bits"),
        ({"format": "lwc", "block_size": 16}, "power of two from 32"),
        ({"format": "lwc", "accuracy_level": 1}, "accuracy-level=1"),
        ({"format": "lwc", "codebook": "nf4"}, "nf4"),
        ({"format": "matmulnbits", "block_size": 0}, "power of two from 16"),
        ({"format": "lwc", "block_size": 1 << 16}, "block-size=65536 is more than 32768"),
        ({"format": "auto", "block_size": 1 << 40}, "is more than 32768"),
        ({"format": "qdq", "block_size": 1 << 40}, "is more than 32768"),
        *(
            ({"method": "gptq", "damping": each}, "damping=")
            for each in (0.0, -0.01, 1.5, math.inf, math.nan)
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeWeights(**options)


# The choice by measured times


def target(**seconds: tuple[float, float]) -> Target:
    """Make a machine: seconds of a kernel per multiply-add for one row, and for 512."""
    tables = {
        kernel: Table(((1.0, 512.0), (64.0, 128.0), (64.0, 256.0)), (one,) * 4 + (many,) * 4)
        for kernel, (one, many) in seconds.items()
    }
    return Target("cpu", "runtime", 1, 1e9, 1e9, 1e-6, 1e-5, tables, 1.0)


PLAIN = (1e-9, 1e-10)


@pytest.mark.parametrize(
    ("nbits", "own", "chosen"),
    [
        ((2e-10, 0.9e-10), (3e-10, 0.3e-10), "lwc"),
        ((1e-10, 0.9e-10), (9e-10, 0.9e-10), "matmulnbits"),
        ((1e-10, 1.1e-10), (9e-10, 0.9e-10), "lwc"),
        ((1e-10, 1.1e-10), (1.1e-9, 0.1e-10), None),
    ],
)
def test_the_faster_operator_is_taken(nbits: Any, own: Any, chosen: str | None) -> None:
    machine = target(matmul=PLAIN, matmul_nbits4=nbits, lwc_matmul4=own)
    operator, objection = choose_operator(machine, 4, INPUTS, 160)
    assert operator == chosen
    assert bool(objection) == (chosen is None)
    module = module_of(LINEAR)
    context = PassContext(
        AnalysisManager(module), source="quantize-weights", find_target=lambda: machine
    )
    QuantizeWeights(format="auto").run(module, context)
    names = {"lwc": "DynamicQuantMatMul", "matmulnbits": "MatMulNBits", None: "MatMul"}
    assert kinds(module) == [names[chosen]]
    if chosen is None:
        assert "in floating point" in missed(module)[0]


def test_three_bits_have_one_operator_and_unmeasured_ones_none() -> None:
    machine = target(matmul=PLAIN, matmul_nbits4=(1e-10, 1e-11))
    assert choose_operator(machine, 3, INPUTS, 160)[0] is None
    machine = replace(machine, tables={**machine.tables, "lwc_matmul3": machine.tables["matmul"]})
    assert choose_operator(machine, 3, INPUTS, 160)[0] == "lwc"


@pytest.mark.parametrize("bits", [3, 4])
def test_a_tied_table_may_take_another_operator_than_layers_of_three_bits(bits: Any) -> None:
    machine = target(
        matmul=PLAIN, matmul_nbits4=(3e-10, 3e-11), lwc_matmul3=(2e-10, 2e-11),
        lwc_matmul4=(2e-10, 2e-11), matmul_nbits8=(1e-10, 1e-11), lwc_matmul8=(2e-10, 2e-11),
    )  # fmt: skip
    module = module_of(TIED)
    feed = feed_of(module)
    wanted = outputs(module, feed)
    context = PassContext(
        AnalysisManager(module), source="quantize-weights", find_target=lambda: machine
    )
    QuantizeWeights(bits=bits, format="auto").run(module, context)
    used = kinds(module)
    assert (used.count("MatMulNBits"), used.count("DynamicQuantMatMul")) == (1, 1)
    assert variant_of(next(node for node in module.graph if variant_of(node))).bits == bits  # type: ignore[union-attr]
    for found, each in zip(outputs(module, feed), wanted, strict=True):
        assert np.linalg.norm(found - each) < 0.35 * np.linalg.norm(each)


def test_a_machine_that_was_not_measured_is_refused() -> None:
    with pytest.raises(PassError, match="was not measured"):
        quantized(module_of(LINEAR), format="auto")
