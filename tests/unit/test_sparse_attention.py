"""sparse-attention: every pattern against its formula, and what cannot be made sparse."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import strategies as st
from support import ops, run_pass, run_pass_to_the_end, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.passes.attention.sparse_attention import SparseAttention
from lwc.pipeline.passes import PassContext
from lwc.verify import GRAMMAR, Motif, Sketch, check_pass, sketches

Array = np.ndarray[Any, Any]
Op = Literal["gqa", "mha", "standard"]

HEADS, SIZE, BATCH = 2, 8, 2
WIDTH = HEADS * SIZE
RTOL, ATOL = 1e-5, 1e-6
"""float32 rounding over softmax and sums of a dozen values."""

NODES = {
    "gqa": f"com.microsoft.GroupQueryAttention <num_heads = {HEADS}, kv_num_heads = {HEADS}, "
    "causal = {causal}> (q, k, v, {past}, last, total, , , , {bias})",
    "mha": f"com.microsoft.MultiHeadAttention <num_heads = {HEADS}, unidirectional = {{causal}}> "
    "(q, k, v, , , {bias}, {past})",
    "standard": f"Attention <q_num_heads = {HEADS}, kv_num_heads = {HEADS}, is_causal = {{causal}}>"
    " (q, k, v, {bias}, {past})",
}


def module_of(
    op: Op, *, causal: bool = True, past: bool = False, bias: str = "", layers: int = 1,
    length: int | str = "length",
) -> Module:  # fmt: skip
    """Attention, layer on layer, the result of one the query of the next."""
    kinds = {"": "", "float": "float[1, 1, length, whole] bias", "bool": "bool[length, whole] bias"}
    inputs = [f"float[batch, {length}, {WIDTH}] {name}" for name in ("q0", "k", "v")]
    if past:
        inputs += [f"float[batch, {HEADS}, past, {SIZE}] past_{name}" for name in ("key", "value")]
    if bias:
        inputs.append(kinds[bias])
    if op == "gqa":
        inputs += ["int32[batch] last", "int32 total"]
    body = []
    for layer in range(layers):
        node = NODES[op].format(
            causal=int(causal), bias="bias" if bias else "",
            past="past_key, past_value" if past else ",",
        )  # fmt: skip
        node = node.replace("(q,", f"(q{layer},")
        rest = f", key{layer}, value{layer}" if past or op == "gqa" else ""
        body.append(f"q{layer + 1}{rest} = {node}")
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g ({", ".join(inputs)}) => (float[batch, {length}, {WIDTH}] q{layers})
        {{ {" ".join(body)} }}"""
    return Module(ir.from_proto(onnx.parser.parse_model(text)))


def feed(module: Module, length: int, past: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(5)
    whole = length + past
    extents = {"batch": BATCH, "length": length, "past": past, "whole": whole}
    made: dict[str, Array] = {
        "last": np.full(BATCH, whole - 1, np.int32), "total": np.array(whole, np.int32),
        "bias": np.zeros(0),
    }  # fmt: skip
    for value in module.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else extents[str(d.value)] for d in value.shape]
        if value.dtype == ir.DataType.BOOL:
            made["bias"] = random.random(shape) < 0.7
            np.einsum("ii->i", made["bias"][:, past:])[...] = True
        elif value.dtype == ir.DataType.FLOAT:
            made[value.name or ""] = random.standard_normal(shape, np.float32)
    return {value.name or "": made[value.name or ""] for value in module.graph.inputs}


def heads(array: Array) -> Array:
    return array.reshape(*array.shape[:2], HEADS, SIZE).transpose(0, 2, 1, 3).astype(np.float64)


def reference(given: dict[str, Array], seen: Array) -> Array:
    """Attend in float64; `seen` is `[queries, keys]`."""
    q, k, v = (heads(given[name]) for name in ("q0", "k", "v"))
    if "past_key" in given:
        k = np.concatenate([given["past_key"], k], axis=2)
        v = np.concatenate([given["past_value"], v], axis=2)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(SIZE)
    bias = given.get("bias", np.zeros((), np.float32))
    if bias.dtype == np.bool_:
        seen = seen & bias
    else:
        scores = scores + bias
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    result: Array = (shares @ v).transpose(0, 2, 1, 3).reshape(given["q0"].shape)
    return result


def seen_by(pattern: SparseAttention, length: int, past: int, *, causal: bool) -> Array:
    """Say of each query and key whether it is seen, one by one, as the papers write it."""
    seen = np.zeros((length, length + past), bool)
    stride, window = pattern.stride, pattern.window
    for row in range(length):
        i = row + past
        for j in range(length + past):
            if pattern.pattern == "window":
                shown = abs(i - j) < window
            elif pattern.pattern == "strided":
                shown = abs(i - j) <= stride or (i - j) % stride == 0
            else:
                shown = i // stride == j // stride or j % stride >= stride - pattern.summary
            shown |= i < pattern.global_tokens or j < pattern.global_tokens
            seen[row, j] = shown and (j <= i or not causal)
    return seen


PATTERNS = [
    SparseAttention(window=3),
    SparseAttention(window=1, global_tokens=2),
    SparseAttention("strided", stride=3),
    SparseAttention("strided", stride=4, global_tokens=1),
    SparseAttention("fixed", stride=4, summary=1),
    SparseAttention("fixed", stride=5, summary=2, global_tokens=1),
]
CASES: list[tuple[Op, bool]] = [
    ("gqa", False), ("gqa", True), ("mha", False), ("mha", True), ("standard", False),
    ("standard", True),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("op", "past"), CASES)
@pytest.mark.parametrize("bias", ["", "float"])
@pytest.mark.parametrize("causal", [True, False])
def test_patterns(pattern: SparseAttention, op: Op, past: bool, bias: str, causal: bool) -> None:
    if op == "mha" and causal and past:
        pytest.skip("ONNX Runtime has no unidirectional MultiHeadAttention with a past")
    module = module_of(op, causal=causal, past=past, bias=bias)
    run_pass_to_the_end(pattern, module)
    # Several new tokens with a past are one sequence's.
    for length, before in ((1, 9), (1, 0)) if past else ((11, 0), (2, 0)):
        given = feed(module, length, before)
        expected = reference(given, seen_by(pattern, length, before, causal=causal))
        np.testing.assert_allclose(run_plain(module, given)[0], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_several_new_tokens_behind_a_past(pattern: SparseAttention) -> None:
    module = module_of("gqa", past=True)
    run_pass(pattern, module)
    given = {name: array[:1] if array.ndim else array for name, array in feed(module, 4, 7).items()}
    expected = reference(given, seen_by(pattern, 4, 7, causal=True))
    np.testing.assert_allclose(run_plain(module, given)[0], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sequences_of_different_lengths(pattern: SparseAttention) -> None:
    """The next token of each sequence stands behind its own past, in a cache of the longest."""
    module = module_of("gqa", past=True)
    run_pass(pattern, module)
    given = feed(module, 1, 9)
    given["last"] = np.array([9, 5], np.int32)
    result = run_plain(module, given)[0]
    for row, past in enumerate((9, 5)):
        own = {name: array[row : row + 1] for name, array in given.items() if array.ndim > 1}
        for name in ("past_key", "past_value"):
            own[name] = own[name][:, :, :past]
        expected = reference(own, seen_by(pattern, 1, past, causal=True))
        np.testing.assert_allclose(result[row : row + 1], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_conditions_of_the_standard_operator(pattern: SparseAttention) -> None:
    module = module_of("standard", bias="bool")
    run_pass_to_the_end(pattern, module)
    given = feed(module, 11)
    expected = reference(given, seen_by(pattern, 11, 0, causal=True))
    np.testing.assert_allclose(run_plain(module, given)[0], expected, rtol=RTOL, atol=ATOL)


WIDE = [
    SparseAttention(window=11), SparseAttention(window=11, global_tokens=2),
    SparseAttention("strided", stride=11), SparseAttention("fixed", stride=11, summary=1),
]  # fmt: skip


@pytest.mark.parametrize("pattern", WIDE, ids=str)
@pytest.mark.parametrize("op", ["gqa", "mha", "standard"])
@pytest.mark.parametrize("causal", [True, False])
def test_as_wide_as_the_sequence_it_changes_not_a_bit(
    pattern: SparseAttention, op: Op, causal: bool
) -> None:
    module = module_of(op, causal=causal)
    given = feed(module, 11)
    if op == "mha" and not causal:  # what has no mask at all is summed in another order
        masked = module_of(op, causal=causal, bias="float")
        nothing = {"bias": np.zeros((1, 1, 11, 11), np.float32)}
        before = run_plain(masked, given | nothing)[0]
    else:
        before = run_plain(module, given)[0]
    run_pass(pattern, module)
    np.testing.assert_array_equal(run_plain(module, given)[0], before)


@pytest.mark.parametrize("pattern", WIDE, ids=str)
@pytest.mark.parametrize("op", ["gqa", "mha", "standard"])
def test_a_known_length_within_reach_is_left_alone(pattern: SparseAttention, op: Op) -> None:
    module = module_of(op, length=11)
    assert not run_pass(pattern, module).changed
    (remark,) = [each.message for each in module.remarks if each.kind == "missed"]
    assert remark == "11 keys are all seen: nothing is hidden"


def test_a_causal_window_is_a_matter_of_the_operator() -> None:
    module = module_of("gqa", layers=2)
    run_pass(SparseAttention(window=3), module)
    assert ops(module) == ["GroupQueryAttention"] * 2
    assert [node.attributes["local_window_size"].as_int() for node in module.graph] == [3, 3]
    assert not run_pass(SparseAttention(window=4), module).changed
    run_pass(SparseAttention("fixed", stride=4, summary=1), module)
    assert [node.op_type for node in module.graph].count("Where") == 1


@pytest.mark.parametrize("op", ["gqa", "mha", "standard"])
def test_one_mask_serves_all_layers(op: Op) -> None:
    one, three = module_of(op), module_of(op, layers=3)
    for module in (one, three):
        run_pass_to_the_end(SparseAttention("strided", stride=3), module)
    assert len(ops(three)) == len(ops(one)) + 2


def test_layers_are_chosen_by_number() -> None:
    module = module_of("gqa", layers=3)
    result = run_pass(SparseAttention(window=3, layers=(0, 2)), module)
    assert result.statistics["layers"] == 2
    chosen = ["local_window_size" in node.attributes for node in module.graph]
    assert chosen == [True, False, True]
    with pytest.raises(PassError, match="no layer 3: the graph has 3"):
        run_pass(SparseAttention(layers=(3,)), module)


@pytest.mark.parametrize("op", ["mha", "standard"])
def test_queries_and_keys_of_different_tokens_have_no_places(op: Op) -> None:
    module = module_of(op, causal=False)
    for value in module.graph.inputs[1:]:
        value.shape = ir.Shape(["batch", "other", WIDTH])
    assert not run_pass(SparseAttention(window=3), module).changed
    assert any("may not be of the same tokens" in each.message for each in module.remarks)


def test_a_window_of_its_own_and_global_tokens_exclude_each_other() -> None:
    module = module_of("gqa")
    run_pass(SparseAttention(window=3), module)
    assert not run_pass(SparseAttention(window=2, global_tokens=1), module).changed
    assert any("would hide global tokens" in each.message for each in module.remarks)


def test_a_quantized_cache_is_left_alone() -> None:
    module = module_of("gqa", past=True)
    node = module.graph[0]
    node.resize_inputs(14)
    node.replace_input_with(12, node.inputs[3])
    before = module.fingerprint()
    context = PassContext(AnalysisManager(module))
    assert not SparseAttention(window=3).run(module, context).changed
    assert module.fingerprint() == before


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0}, {"stride": 0}, {"global_tokens": -1}, {"summary": 0},
        {"pattern": "fixed", "stride": 4, "summary": 5},
    ],
)  # fmt: skip
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is no number from"):
        SparseAttention(**options)


def attention(sketch: Sketch) -> ir.Value:
    """Attention of one operator on states, in each of its forms."""
    length: int | str = 3 if sketch.rarely() else "S"
    x = sketch.input(["N", length, 8])
    q, k, v = (sketch.emit("MatMul", x, sketch.weight(8, 16)) for _ in range(3))
    op = sketch.choose("mha", "gqa", "standard" if sketch.opset >= 23 else "mha")
    causal = sketch.choose(0, 1)
    if op == "standard":
        return sketch.emit(
            "Attention", q, k, v, q_num_heads=2, kv_num_heads=2, is_causal=causal
        )  # fmt: skip
    if op == "mha":
        return sketch.emit(
            "MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=2,
            unidirectional=causal,
        )  # fmt: skip
    shape = sketch.emit("Shape", x)
    batch, extent = (sketch.emit("Gather", shape, sketch.ints(axis), axis=0) for axis in (0, 1))
    total = sketch.cast(extent, ir.DataType.INT32)
    last = sketch.emit("Sub", total, sketch.constant(np.array([1], np.int32)))
    lengths = sketch.emit("Expand", last, batch)
    return sketch.emit(
        "GroupQueryAttention", q, k, v, None, None, lengths, total, domain="com.microsoft",
        num_heads=2, kv_num_heads=2, causal=causal,
    )  # fmt: skip


def graphs() -> st.SearchStrategy[Module]:
    """Graphs with such attention."""
    return sketches([*[Motif("attention", attention)] * 8, *GRAMMAR], steps=(1, 4), evenly=True)


@pytest.mark.parametrize(
    "pattern",
    [SparseAttention(window=2), SparseAttention("strided", stride=2, global_tokens=1)],
    ids=str,
)
def test_it_keeps_its_contract(pattern: SparseAttention) -> None:
    report = check_pass(pattern, examples=60, graphs=graphs())
    assert report.changed > 15
