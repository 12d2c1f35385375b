"""`quantize-weights`: rounding, packing, lowering, and what it must leave alone."""

from __future__ import annotations

from pathlib import Path
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
    dequantized,
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

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.frontend.onnx_writer import save
from lwc.optimizer import optimize
from lwc.passes.quantization import streaming
from lwc.passes.quantization.gptq import gptq
from lwc.passes.quantization.packing import unpack_rows
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.passes.quantization.rounding import Grid, TileRounder, widen
from lwc.passes.quantization.streaming import WeightSpec, quantize
from lwc.pipeline.passes import PassContext
from lwc.rewrite.limit import RewriteLimit

# Rounding


def test_int8_golden_vector() -> None:
    """The worked example of symmetric int8: scale 2.49 / 127."""
    weights = (
        "1.46 .34 2.18 1.06 .62 .20 1.61 .37 .38 .56 .97 .46 .13 .54 1.03 .38 .49 2.49 2.00 1.58"
    )
    golden = "74 17 111 54 32 10 82 19 19 29 49 23 7 28 53 19 25 127 102 81"
    column = np.array(weights.split(), np.float32)
    rounder = TileRounder(Grid(8, True, "none"), 20, 1, np.float32)
    tile = rounder.weights(1)
    tile[:, 0] = column
    rounded = rounder.round(tile)
    assert rounded is not None
    codes = rounded.codes[:, 0].astype(int) - 128
    assert codes.tolist() == [int(code) for code in golden.split()]
    assert rounded.scales[0] == pytest.approx(2.49 / 127, rel=1e-6)


def test_widen_agrees_with_numpy_on_every_finite_float16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    target = np.empty(len(finite), np.float32)
    widen(finite, target)
    assert np.array_equal(target.view(np.uint32), finite.astype(np.float32).view(np.uint32))


def test_widen_keeps_infinities_and_nan_out_of_range() -> None:
    target = np.empty(3, np.float32)
    widen(np.array([np.inf, -np.inf, np.nan], np.float16), target)
    assert (np.abs(target) >= 65536).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_constant_blocks(bits: Any, symmetric: bool) -> None:
    module = module_of(LINEAR, w=np.zeros((INPUTS, OUTPUTS), np.float32))
    quantized(module, bits=bits, symmetric=symmetric)
    assert (dequantized(module, "w", bits, INPUTS) == 0).all()
    module = module_of(LINEAR, w=np.full((INPUTS, OUTPUTS), -3.0, np.float32))
    quantized(module, bits=bits, symmetric=symmetric)
    np.testing.assert_allclose(dequantized(module, "w", bits, INPUTS), -3.0, rtol=1e-6)


def test_search_halves_no_quality() -> None:
    """The searched grid has less error than the plain one, overall by a few per cent at least."""
    plain, searched = module_of(LINEAR), module_of(LINEAR)
    original = weight(plain, "w").astype(np.float64)
    quantized(plain, search="none")
    quantized(searched, search="mse")
    errors = [np.square(dequantized(m, "w", 4, INPUTS) - original).sum() for m in (plain, searched)]
    assert errors[1] < 0.97 * errors[0]


def test_plain_rounding_is_that_of_onnxruntime() -> None:
    """At search=none the mean squared error is within 1 % of ONNX Runtime's own quantizer."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    module = module_of(LINEAR)
    original = weight(module, "w")
    packed = np.zeros((OUTPUTS, 3, 16), np.uint8)
    scales = np.zeros((OUTPUTS, 3), np.float32)
    zeros = np.zeros((OUTPUTS, 2), np.uint8)
    quantize_matmul_4bits(packed, original, scales, zeros, 32, OUTPUTS, INPUTS, False)
    codes = unpack_rows(packed, 4, 32).astype(np.float64)
    theirs = (codes - unpack_rows(zeros, 4, 3)[..., None]) * scales[..., None]
    their_error = np.square(theirs.reshape(OUTPUTS, INPUTS).T - original).sum()
    quantized(module, search="none")
    our_error = np.square(dequantized(module, "w", 4, INPUTS) - original).sum()
    assert our_error <= 1.01 * their_error


# Streaming


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("layout", "bits", "dtype"),
    [("matmulnbits", 4, np.float16), ("qdq", 4, np.float16), ("tiles", 3, np.float32)],
)
def test_result_does_not_depend_on_tiles(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, layout: Any, bits: Any, dtype: Any
) -> None:
    matrix = np.random.default_rng(1).standard_normal((200, 144)).astype(dtype)
    tensor = ir.Tensor(matrix.T.copy() if transposed else matrix)
    spec = WeightSpec(Grid(bits, False, "mse"), 32, transposed, layout)
    found = []
    for elements, columns in ((1 << 17, 1024), (4096, 7), (32, 1)):
        monkeypatch.setattr(streaming, "_TILE_ELEMENTS", elements)
        monkeypatch.setattr(streaming, "_TILE_COLUMNS", columns)
        result = quantize(tensor, spec)
        assert result is not None
        assert result.zero_points is not None
        found.append([t.tobytes() for t in (result.codes, result.scales, result.zero_points)])
    assert found[0] == found[1] == found[2]


def test_threads_keep_the_order_and_stop_early() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    announced: list[int] = []
    assert list(streaming.in_threads(work, range(50), announced.append)) == [
        i * i for i in range(50)
    ]
    # On a busy machine the work may be done before the last ones are announced.
    assert announced == list(range(len(announced)))
    assert announced
    begun.clear()
    results = streaming.in_threads(work, range(100_000), lambda _: None)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 100_000


# Lowering


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [None, True, False])
@pytest.mark.parametrize("text", [LINEAR, GEMM])
def test_contrib_equals_dequantized_weight(text: str, bits: Any, symmetric: bool | None) -> None:
    module = module_of(text)
    feed = feed_of(module)
    reference = module.clone()
    quantized(module, bits=bits, symmetric=symmetric, accuracy_level=0)
    real = dequantized(module, "w", bits, INPUTS).astype(np.float32)
    value = reference.graph.initializers["w"]
    reference.replace_initializer(value, ir.Tensor(real if text is LINEAR else real.T.copy()))
    assert "MatMulNBits" in ops(module)
    np.testing.assert_allclose(
        outputs(module, feed)[0], outputs(reference, feed)[0], rtol=1e-4, atol=1e-4
    )


def test_gemm_with_plain_bias_is_one_node() -> None:
    module = module_of(GEMM.replace(", alpha = 0.5, beta = 2.0", ""))
    feed = feed_of(module)
    before = outputs(module, feed)[0]
    quantized(module, bits=8, accuracy_level=0)
    assert ops(module) == ["MatMulNBits"]
    after = outputs(module, feed)[0]
    assert np.linalg.norm(after - before) < 0.01 * np.linalg.norm(before)


def test_inputs_that_do_not_divide_into_blocks() -> None:
    text = LINEAR.replace("96", "83")
    for bits, bound in ((8, 0.01), (4, 0.15)):
        for layout in ("matmulnbits", "qdq"):
            module = module_of(text)
            feed = feed_of(module)
            before = outputs(module, feed)[0]
            result = quantized(module, bits=bits, accuracy_level=0, format=layout)
            assert result.statistics["weights quantized"] == 1
            after = outputs(module, feed)[0]
            assert np.linalg.norm(after - before) < bound * np.linalg.norm(before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("embeddings", [4, 8])
@pytest.mark.parametrize("symmetric", [None, True, False])
def test_tied_table_is_one_tensor(
    tmp_path: Path, bits: Any, embeddings: Any, symmetric: bool | None
) -> None:
    module = module_of(TIED)
    feed = feed_of(module)
    before = outputs(module, feed)
    table = weight(module, "table")
    quantized(module, bits=bits, embeddings=embeddings, symmetric=symmetric, accuracy_level=0)
    (gather,) = [node for node in module.nodes() if node.op_type == "GatherBlockQuantized"]
    readers = {user.op_type for user, _ in gather.inputs[0].uses()}  # type: ignore[union-attr]
    assert readers == {"GatherBlockQuantized", "MatMulNBits"}
    assert "Transpose" not in ops(module)
    assert "table" not in module.graph.initializers
    real = dequantized(module, "table", embeddings, INPUTS)
    bound = np.linalg.norm(real.T - table) / np.linalg.norm(table)
    assert bound < (0.01 if embeddings == 8 else 0.12)
    after = outputs(module, feed)
    for old, new in zip(before, after, strict=True):
        assert np.linalg.norm(new - old) < 0.2 * np.linalg.norm(old)
    np.testing.assert_allclose(
        after[1],
        (real.T[feed["ids"]] + feed["x"]) @ real,
        rtol=1e-4,
        atol=1e-3,
    )
    saved = save(module, tmp_path / "tied.onnx")
    packed = table.size * embeddings / 8
    assert saved.nbytes < packed + table.nbytes  # the float table is gone


def test_tied_codes_are_stored_once(tmp_path: Path) -> None:
    """Scaled up so that the table dominates: bytes on disk are those of one packed table."""
    rng = np.random.default_rng(0)
    text = TIED.replace("float[64,96] table", "float[4096,96] table").replace("64]", "4096]")
    module = module_of(text, table=rng.standard_normal((4096, 96)).astype(np.float32))
    quantized(module)
    saved = save(module, tmp_path / "tied.onnx")
    one_table = 4096 * (96 + 3 * 4)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert one_table < size < 1.2 * one_table
    assert saved.path


def test_embedding_alone_and_unknown_rank_of_indices() -> None:
    head = '<ir_version: 10, opset_import: ["" : 21]>\n'
    alone = head + "g (int64[b,s] ids) => (float[b,s,96] y) <float[64,96] w> { y = Gather(w, ids) }"
    module = module_of(alone)
    feed = feed_of(module)
    before = outputs(module, feed)[0]
    quantized(module)
    assert ops(module) == ["GatherBlockQuantized"]
    np.testing.assert_allclose(outputs(module, feed)[0], before, atol=np.abs(before).max() / 250)

    unknown = TIED.replace("int64[batch,seq] ids", "int64 ids")
    module = module_of(unknown)
    module.graph.inputs[0].shape = None
    before_all = outputs(module, feed | {"x": feed_of(module_of(TIED))["x"]})
    quantized(module, bits=8, accuracy_level=0)
    after_all = outputs(module, feed | {"x": feed_of(module_of(TIED))["x"]})
    assert np.linalg.norm(after_all[0] - before_all[0]) < 0.02 * np.linalg.norm(before_all[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float16(dtype: Any) -> None:
    name = "float16" if dtype == np.float16 else "float"
    text = LINEAR.replace("float[", f"{name}[")
    rng = np.random.default_rng(0)
    module = module_of(text, w=rng.standard_normal((INPUTS, OUTPUTS)).astype(dtype))
    feed = feed_of(module)
    before = outputs(module, feed)[0].astype(np.float32)
    quantized(module, bits=8)
    assert weight(module, "w_scales").dtype == dtype
    after = outputs(module, feed)[0].astype(np.float32)
    assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)


def test_bfloat16_is_refused_with_a_remedy() -> None:
    import ml_dtypes

    text = LINEAR.replace("float[", "bfloat16[")
    content = np.ones((INPUTS, OUTPUTS), ml_dtypes.bfloat16)
    with pytest.raises(PassError, match="run this before convert-dtype, or use float16 or format="):
        quantized(module_of(text, w=content))
    before = optimize(module_of(LINEAR, w=content.astype("f")), "quantize-weights").module
    after = optimize(before, "convert-dtype{bfloat16}").module
    assert ops(before) == ["MatMulNBits"]
    assert "MatMulNBits" in ops(after)
    module = module_of(text, w=content)
    quantized(module, format="qdq")
    assert weight(module, "w_scales").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_standard_format(bits: Any, symmetric: bool) -> None:
    module = module_of(TIED)
    feed = feed_of(module)
    before = outputs(module, feed)
    quantized(module, bits=bits, symmetric=symmetric, format="qdq")
    assert {node.domain for node in module.nodes()} == {""}
    onnx.checker.check_model(ir.to_proto(module.model), full_check=True)
    bound = 0.12 if bits == 4 else 0.01
    for old, new in zip(before, outputs(module, feed), strict=True):
        assert np.linalg.norm(new - old) < bound * np.linalg.norm(old)


def test_standard_format_before_opset_21() -> None:
    text = LINEAR.replace('"" : 21', '"" : 17')
    with pytest.raises(PassError, match="needs opset 21, the model has 17"):
        quantized(module_of(text), format="qdq", bits=4)
    module = module_of(text)
    feed = feed_of(module)
    before = outputs(module, feed)[0]
    quantized(module, format="qdq", bits=8, block_size=0, symmetric=True)
    assert ops(module) == ["DequantizeLinear", "MatMul"]
    assert weight(module, "w_q8").dtype == np.int8
    after = outputs(module, feed)[0]
    assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)


def test_accuracy_level_4_error_is_as_documented() -> None:
    module = module_of(LINEAR.replace("96", "512"))
    feed = feed_of(module)
    exact = module.clone()
    quantized(module, accuracy_level=4)
    quantized(exact, accuracy_level=0)
    fast, slow = outputs(module, feed)[0], outputs(exact, feed)[0]
    assert 0 < np.linalg.norm(fast - slow) < 0.01 * np.linalg.norm(slow)


# What a pass must keep


@pytest.mark.parametrize("options", [{}, {"format": "qdq"}, {"bits": 8}, {"symmetric": False}])
def test_second_run_changes_nothing(options: dict[str, Any]) -> None:
    module = module_of(TIED)
    assert quantized(module, **options).changed
    assert not quantized(module, **options).changed


def test_weight_shared_by_two_layers_is_packed_once() -> None:
    text = LINEAR.replace("y = MatMul(x, w)", "a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)")
    module = module_of(text)
    result = quantized(module)
    assert result.statistics["weights quantized"] == 1
    assert result.statistics["nodes lowered"] == 2
    assert sorted(module.graph.initializers) == ["w_q4", "w_scales", "w_zero_points"]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 8, "format": "qdq"},
        {"bits": 8, "format": "qdq", "block_size": 0, "symmetric": True},
        {"bits": 4, "format": "qdq"},
        {"codebook": "nf4", "block_size": 32, "format": "qdq"},
    ],
)
def test_weights_in_subgraphs_and_constant_nodes(options: dict[str, Any]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    branches (bool c, float[rows,96] x) => (float[rows,96] y) <float[96,96] w> {
        y = If (c) <
            then_branch = yes () => (float[rows,96] p) { p = MatMul(x, w) },
            else_branch = no () => (float[rows,96] q) { q = MatMul(x, w) }
        >
    }"""
    module = module_of(text)
    branch = next(g for g in module.graphs() if g.name == "no")
    (node,) = list(branch)
    own = np.random.default_rng(5).standard_normal((96, 96)).astype(np.float32)
    constant = ir.node("Constant", [], attributes={"value": ir.Tensor(own)})
    constant.outputs[0].name = "own"
    branch.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    module.forget_names()
    x = np.random.default_rng(3).standard_normal((2, 96)).astype(np.float32)
    feeds = [{"c": np.array(flag), "x": x} for flag in (True, False)]
    before = [outputs(module, feed)[0] for feed in feeds]
    result = quantized(module, **options)
    assert result.statistics["weights quantized"] == 2
    assert ("MatMul" in ops(module)) == ("format" in options)
    assert "Constant" not in ops(module)
    allowed = 0.02 if options.get("bits") == 8 else 0.12  # half a step of 4 bits is a tenth
    for feed, old in zip(feeds, before, strict=True):
        assert np.linalg.norm(outputs(module, feed)[0] - old) < allowed * np.linalg.norm(old)


@pytest.mark.parametrize("rank", [0, 1, 2, None])
@pytest.mark.parametrize("blocks", [1, 2])
def test_standard_embedding_of_any_rank_of_indices(rank: int | None, blocks: int) -> None:
    """ONNX Runtime has no blocks where a DequantizeLinear has one scale, as of a single row."""
    module = module_of("""<ir_version: 10, opset_import: ["" : 21]>
        rows (int64 ids) => (float y) <float[50,64] table> { y = Gather(table, ids) }""")
    dims = None if rank is None else ir.Shape(["a", "b"][:rank])
    module.graph.inputs[0].shape, module.graph.outputs[0].shape = dims, None
    plain = weight(module, "table")
    quantized(module, format="qdq", block_size=64 // blocks)
    for ids in (np.array(7), np.array([7]), np.array([7, 49]), np.array([[7], [0]])):
        if rank in (None, ids.ndim):
            (found,) = outputs(module, {"ids": ids})
            assert found.shape == plain[ids].shape
            np.testing.assert_allclose(found, plain[ids], atol=np.ptp(plain) / 255)


@pytest.mark.parametrize("shape", [(0, 160), (96, 0)])
@pytest.mark.parametrize(
    "passes",
    [
        "quantize-weights",
        "quantize-weights{bits=8 format=qdq block-size=0}",
        "quantize-weights{format=lwc}",
        "quantize-weights{method=gptq}",
        "smooth-quantize{0.5}",
        "smooth-quantize{auto products=true}",
        "smooth-quantize{none activations=static}",
        "llm-int8",
        "mixed-precision{6}",
        "rotate",
        "convert-dtype{float16}",
    ],
)
def test_a_weight_without_numbers_stays(shape: tuple[int, int], passes: str) -> None:
    inputs, width = shape
    module = module_of(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[rows,{inputs}] x) => (float[rows,{width}] y) <float[{inputs},{width}] w>
        {{ y = MatMul(x, w) }}""")
    feed = {"x": np.ones((2, inputs), np.float32)}
    optimized = optimize(module, passes=passes, calibration=[feed])
    if passes not in ("rotate", "convert-dtype{float16}"):
        said = [remark.message for remark in optimized.module.remarks]
        assert "'w' stays: it holds no numbers" in said or "no weight to quantize" in said
        assert ops(optimized.module) == ["MatMul"]


@pytest.mark.parametrize("bits", [4, 8])
def test_subgraphs_share_a_dequantized_weight(bits: Any) -> None:
    """Codes lie in the main graph: ONNX Runtime seeks those of a DequantizeLinear beside it."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    branches (bool c, int64[rows] ids, float[rows,96] x) => (float[rows,96] y)
        <float[96,96] w, float[64,96] table> {
        h = MatMul(x, w)
        y = If (c) <
            then_branch = yes () => (float[rows,96] p) { p = MatMul(h, w) },
            else_branch = no () => (float[rows,96] q) {
                r = Gather(table, ids)
                s = Add(h, r)
                q = MatMul(s, w)
            }
        >
    }"""
    module = module_of(text)
    x = np.random.default_rng(3).standard_normal((2, 96)).astype(np.float32)
    feeds = [{"c": np.array(flag), "x": x, "ids": np.array([1, 63])} for flag in (True, False)]
    before = [outputs(module, feed)[0] for feed in feeds]
    assert quantized(module, bits=bits, format="qdq").statistics["weights quantized"] == 2
    made = [node for node in module.nodes() if node.op_type == "DequantizeLinear"]
    assert len([node for node in made if node.inputs[0] is module.graph.initializers[f"w_q{bits}"]
                and node.graph is module.graph]) == 2  # fmt: skip
    for feed, old in zip(feeds, before, strict=True):
        new = outputs(module, feed)[0]
        assert np.linalg.norm(new - old) < (0.02 if bits == 8 else 0.2) * np.linalg.norm(old)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (LINEAR, {"exclude": ("w",)}, "exclude=w matches"),
        (LINEAR, {"exclude": ("z", "?")}, r"exclude=? matches"),
        (LINEAR, {"ops": ("Gemm",)}, "MatMul is not among ops"),
        (LINEAR.replace("96", "3").replace("160", "2"), {}, "too small"),
        (GEMM.replace("transB = 1", "transB = 1, transA = 1").replace("rows,96] x", "96,rows] x"),
         {}, "transposes the left operand"),
        (TIED, {"embeddings": None, "exclude": ("w",)}, "embeddings=none"),
        (LINEAR.replace("y = MatMul(x, w)", "a = MatMul(x, w) s = Relu(w) b = MatMul(x, s) "
                        "y = Add(a, b)"), {}, "Relu reads it too"),
        (LINEAR.replace("[rows,96] x", "[1,rows,96] x").replace("[rows,160] y", "[1,rows,160] y")
         .replace("96,160] w", "1,96,160] w"), {}, "rank 3"),
        (TIED.replace("96", "80"), {"exclude": ("w",)}, "do not divide into blocks"),
    ],
)  # fmt: skip
def test_left_alone_with_a_reason(text: str, options: dict[str, Any], reason: str) -> None:
    module = module_of(text)
    before = module.fingerprint()
    result = quantized(module, **options)
    assert not result.changed
    assert module.fingerprint() == before
    assert any(reason in message for message in missed(module)), missed(module)


def test_a_pattern_that_matches_nothing_is_a_warning() -> None:
    module = module_of(LINEAR)
    quantized(module, exclude=("lm_haed", "nothing-of-the-kind"))
    warnings = [remark.message for remark in module.remarks if remark.kind == "warning"]
    assert [message.split(" matches")[0] for message in warnings] == [
        "exclude=lm_haed",
        "exclude=nothing-of-the-kind",
    ]


@pytest.mark.parametrize(
    ("options", "block"),
    [({"bits": 8}, 16), ({"bits": 4}, 32), ({"bits": 8, "accuracy_level": 1}, 32),
     ({"bits": 8, "block_size": 64}, 64)],
)  # fmt: skip
def test_eight_bit_layers_after_a_gate_get_finer_blocks(
    options: dict[str, Any], block: int
) -> None:
    gated = "s = Sigmoid(x) g = Mul(x, s) y = MatMul(g, w)"
    for body, expected in ((gated, block), ("y = MatMul(x, w)", options.get("block_size", 32))):
        module = module_of(LINEAR.replace("y = MatMul(x, w)", body))
        quantized(module, **options)
        (node,) = [node for node in module.nodes() if node.op_type == "MatMulNBits"]
        assert node.attributes["block_size"].as_int() == expected


def test_infinite_weight_is_left_alone() -> None:
    for dtype, name in ((np.float32, "float"), (np.float16, "float16")):
        for bad in (np.inf, -np.inf, np.nan):
            content = np.ones((INPUTS, OUTPUTS), dtype)
            content[5, 7] = bad
            module = module_of(LINEAR.replace("float[", f"{name}["), w=content)
            assert not quantized(module).changed
            assert "infinities or NaN" in missed(module)[0]


def test_initializer_that_is_an_input_is_not_touched() -> None:
    module = module_of(LINEAR)
    value = module.graph.initializers["w"]
    module.graph.inputs.append(value)
    assert not quantized(module).changed


def test_weight_of_an_attention_product_is_no_layer() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[a,96] x, float[96,b] z) => (float[a,b] y) { y = MatMul(x, z) }"""
    module = module_of(text)
    assert not quantized(module).changed
    assert missed(module) == []


def test_a_weight_whose_only_reader_leaves_the_graph_stays() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[a,2] x) => (float[2,1] t, float[a,1] y) <float[1,2] w = {1.1, 1.8}> {
        t = Transpose(w)
        y = MatMul(x, t)
    }"""
    module = module_of(text)
    assert not quantized(module).changed
    assert missed(module) == ["'w' stays: its transpose is a graph output"]


def test_statistics() -> None:
    module = module_of(LINEAR)
    statistics = quantized(module).statistics
    assert statistics["bits requested"] == 4
    # 4-bit codes, a float32 scale per 32 weights, 3 zero points of 4 bits in 2 bytes per channel.
    assert statistics["bits per weight"] == pytest.approx(4 + 1 + 16 / 96)
    assert statistics["bytes before"] == INPUTS * OUTPUTS * 4
    assert 0.05 < float(statistics["mean relative error"]) < 0.1


@pytest.mark.parametrize(
    "options", [{"block_size": 24}, {"block_size": 8}, {"block_size": 0}, {"ops": ("Conv",)}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QuantizeWeights(**options)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_calibrated_methods_are_nearer_on_other_data(bits: Any, symmetric: bool) -> None:
    chosen = {"bits": bits, "block_size": 32, "symmetric": symmetric}
    nearest = relative_error(stack(), **chosen)
    by_gptq = relative_error(stack(), method="gptq", **chosen)
    by_awq = relative_error(stack(), method="awq", **chosen)
    assert all(a < 0.8 * b for a, b in zip(by_gptq, nearest, strict=True))
    assert all(a < b for a, b in zip(by_awq, nearest, strict=True))


@pytest.mark.parametrize("format_", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_formats_of_a_calibrated_method_agree(format_: Any, method: Any) -> None:
    """What the graph computes is what the layers were rounded to: 8 bits are within 1 %."""
    errors = relative_error(stack(), bits=8, block_size=32, method=method, format=format_)
    assert max(errors) < 0.01


@pytest.mark.parametrize("format_", ["matmulnbits", "qdq"])
def test_awq_takes_factors_back_from_codes_before(format_: Any) -> None:
    """The factor on `g` goes into `b`, which is rounded by then: its scales take it.

    The norm feeds both `a` and `b`; `r` is read by a product and by `d`, and stays.
    """
    module = stack()
    random = np.random.default_rng(1)
    spread = np.exp(2 * random.standard_normal(96)).astype(np.float32)
    b = module.graph.initializers["b"]
    module.replace_initializer(b, ir.Tensor(np.asarray(b.const_value) * spread))
    result = calibrated(
        module, method="awq", bits=8, block_size=32, accuracy_level=1, format=format_
    )
    assert result.statistics["activations scaled"] == 2
    (feed,) = correlated(count=1, seed=77)
    plain = stack()
    b = plain.graph.initializers["b"]
    plain.replace_initializer(b, ir.Tensor(np.asarray(b.const_value) * spread))
    for found, wanted in zip(outputs(module, feed), outputs(plain, feed), strict=True):
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def test_damping_reaches_the_layers() -> None:
    codes = []
    for damping in (0.01, 0.01, 1.0):
        module = stack()
        calibrated(module, method="gptq", damping=damping)
        codes.append(weight(module, "a_q4"))
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


def codes_of_c(front: Module) -> np.ndarray[Any, Any]:
    """GPTQ of `c` on the inputs that it has in `front`."""
    gram = np.zeros((96, 96))
    with make_runner(front, ["g"]) as runner:
        for feed in correlated():
            rows = runner.run(feed, ["g"])["g"].astype(np.float64)
            gram += rows.T @ rows
    return gptq(weight(stack(), "c"), gram, Grid(2, False, "mse"), 32, by_activation=True).codes


def test_later_layers_are_fitted_to_what_earlier_ones_leave() -> None:
    """A few codes may fall on the other side of a tie: sums are in another order."""
    module, front = stack(), stack()
    options = {"method": "gptq", "bits": 2, "block_size": 32, "accuracy_level": 1}
    result = calibrated(module, **options)
    assert 0 < float(result.statistics["mean relative error of outputs"]) < 1
    calibrated(front, exclude=("c", "d"), **options)
    found = unpack_rows(weight(module, "c_q2"), 2, 32).reshape(64, 96).T
    assert (found == codes_of_c(front)).mean() > 0.999
    assert (found == codes_of_c(stack())).mean() < 0.9


def test_what_has_no_activation_of_its_own_is_rounded_to_nearest() -> None:
    module = module_of(TIED)
    context = PassContext(
        AnalysisManager(module), source="quantize-weights", make_runner=make_runner,
        calibration=lambda module: [feed_of(module)],
    )  # fmt: skip
    QuantizeWeights(method="gptq").run(module, context)
    notes = [each.message for each in module.remarks if each.kind == "note"]
    assert any("'table' is rounded to nearest" in note for note in notes)


QUERIES = """<ir_version: 10, opset_import: ["" : 21]>
queries (float[rows,96] x) => (float[rows,64] y) <float[1,96] k, float[96,64] w, float[96,64] v>
{ a = MatMul(k, w) z = MatMul(x, v) y = Add(a, z) }"""


@pytest.mark.parametrize(
    "text", [QUERIES, QUERIES.replace("{ a = MatMul(k", "{ r = Relu(k) a = MatMul(r")]
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_multiplies_a_constant_is_rounded_to_nearest(text: str, method: Any) -> None:
    module = module_of(text)
    assert calibrated(module, method=method).statistics["weights quantized"] == 2
    notes = [each.message for each in module.remarks if each.kind == "note"]
    assert [note.split(" is")[0] for note in notes] == ["'w'"]
    plain = module_of(text)
    quantized(plain)
    for name in ("w_q4", "w_scales", "w_zero_points"):
        assert np.array_equal(weight(module, name), weight(plain, name))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_calibrated_method_needs_data(method: Any) -> None:
    with pytest.raises(UsageError, match="there is no calibration data"):
        quantized(module_of(LINEAR), method=method)


def test_two_bits_have_no_standard_form() -> None:
    with pytest.raises(PassError, match="2 bits needs opset 25"):
        quantized(module_of(LINEAR), bits=2, format="qdq")


@pytest.mark.parametrize("allowed", [0, 1, 3])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_limit_leaves_later_weights_as_they_are(method: Any, allowed: int) -> None:
    """Each is lowered or untouched: none is left rounded in floating point."""
    module, plain = stack(), stack()
    context = PassContext(
        AnalysisManager(module), source="quantize-weights", make_runner=make_runner,
        calibration=lambda module: correlated(), limit=RewriteLimit(allowed),
    )  # fmt: skip
    result = QuantizeWeights(method=method, accuracy_level=1).run(module, context)
    assert result.changed == bool(allowed)
    assert ops(module).count("MatMulNBits") == allowed
    names = ["a", "b", "c", "d"]
    assert [name in module.graph.initializers for name in names] == [False] * allowed + [True] * (
        4 - allowed
    )
    for name in names[allowed:]:
        found, wanted = weight(module, name), weight(plain, name)
        # AWQ may have scaled rows of it, which moves no number by more than rounding.
        ratio = (found / wanted)[:, 0] if method == "awq" else np.ones(96)
        np.testing.assert_allclose(found, wanted * ratio[:, None], rtol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_calibrated_weight_that_is_not_finite_stays(method: Any) -> None:
    module = stack()
    broken = weight(module, "d").copy()
    broken[3, 5] = np.nan
    module.replace_initializer(module.graph.initializers["d"], ir.Tensor(broken))
    result = calibrated(module, method=method)
    assert result.statistics["weights quantized"] == 3
    missed = [each.message for each in module.remarks if each.kind == "missed"]
    assert any("'d' stays: it holds infinities or NaN" in each for each in missed)
    np.testing.assert_array_equal(weight(module, "d"), broken)
