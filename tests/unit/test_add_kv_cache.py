"""add-kv-cache and last-logits: what they make of small decoders, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from support import run_plain

import lwc
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, PassError, VerificationError
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.passes.attention.last_logits import LastLogits
from lwc.report.measure import MeasureSettings, measure, settle_shape
from lwc.verify import compare

HEADS, KV_HEADS, SIZE, WORDS = 4, 2, 8, 20
WIDTH, SHARED = HEADS * SIZE, KV_HEADS * SIZE
WEIGHTS = {
    "table": (WORDS, WIDTH), "places": (64, WIDTH), "wq": (WIDTH, WIDTH), "wk": (WIDTH, SHARED),
    "wv": (WIDTH, SHARED), "wo": (WIDTH, WIDTH), "head": (WIDTH, WORDS), "wide": (WIDTH, WIDTH),
}  # fmt: skip
NUMBERS = """int64 zero = {0}, int64 one = {1}, int64[1] row = {0}, int64[1] column = {1},
    int64[1] last_axis = {-1}, int64[2] both = {0, 1}, int64 minus = {-1}, int64 two = {2},
    int64[1] two_back = {-2}, int64[1] far = {9223372036854775807}, int32[1] unit = {1},
    float half = {0.5}"""

RANGE = """
    extents = Shape (ids)
    length = Gather (extents, one)
    range = Range (zero, length, one)
    learned = Gather (places, range)
"""
"""Learned positions, counted from 0."""

TABLE = """
    extents = Shape (ids)
    lengths_of_ids = Gather (extents, column)
    learned = Slice (places, row, lengths_of_ids, row)
"""
"""The same, as rows of the table."""

MASKED = """
    extents = Shape (ids)
    sums = CumSum (attention_mask, one)
    seen = Mul (sums, attention_mask)
    counted = Sub (seen, one)
    learned = Gather (places, counted)
"""
"""Positions of the tokens that the mask shows."""

GIVEN = """
    extents = Shape (ids)
    learned = Gather (places, position_ids)
"""


def _inputs(positions: str) -> str:
    named = (name for name in ("attention_mask", "position_ids") if name in positions)
    return "".join(f", int64[batch, sequence] {name}" for name in named)


def decoder(positions: str = RANGE, tail: str = "result = Identity (added)") -> Module:
    """Make one layer of causal attention on embeddings with positions, and a head."""
    weights = "".join(f", float[{a}, {b}] {name}" for name, (a, b) in WEIGHTS.items())
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        decoder (int64[batch, sequence] ids{_inputs(positions)}{weights})
            => (float[batch, sequence, {WORDS}] logits)
        <{NUMBERS}> {{
            {positions}
            embedded = Gather (table, ids)
            hidden = Add (embedded, learned)
            q = MatMul (hidden, wq)
            k = MatMul (hidden, wk)
            v = MatMul (hidden, wv)
            batch_size = Gather (extents, row)
            lengths = Gather (extents, column)
            total = Cast <to = 6> (lengths)
            less = Sub (total, unit)
            last = Expand (less, batch_size)
            attended = com.microsoft.GroupQueryAttention
                <num_heads = {HEADS}, kv_num_heads = {KV_HEADS}> (q, k, v, "", "", last, total)
            output = MatMul (attended, wo)
            added = Add (hidden, output)
            {tail}
            logits = MatMul (result, head)
        }}
    """)
    module = Module(ir.from_proto(proto))
    rng = np.random.default_rng(0)
    for value in list(module.graph.inputs):
        if value.name in WEIGHTS:
            module.graph.inputs.remove(value)
            array = rng.standard_normal(WEIGHTS[value.name]).astype(np.float32) / 4
            value.const_value = ir.Tensor(array, name=value.name)
            module.graph.register_initializer(value)
    return module


def cached(module: Module, passes: str = "add-kv-cache") -> Module:
    return lwc.optimize(module, passes=passes, grant="all").module


def whole(module: Module, ids: Any, mask: Any | None = None) -> Any:
    """Run over a whole sequence."""
    feed = {
        "ids": ids,
        "attention_mask": np.ones_like(ids) if mask is None else mask,
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy(),
    }
    names = {value.name for value in module.graph.inputs}
    return run_plain(module, {k: v for k, v in feed.items() if k in names})[0]


def step_by_step(module: Module, ids: Any, steps: tuple[int, ...]) -> Any:
    """Run over a sequence in steps of so many tokens, each from what the last one left."""
    names = [str(value.name) for value in module.graph.inputs]
    outputs = [str(value.name) for value in module.graph.outputs]
    batch = ids.shape[0]
    past = {
        name: np.zeros((batch, KV_HEADS, 0, SIZE), np.float32)
        for name in names
        if name.startswith("past_key_values.")
    }
    assert len(past) == 2
    logits, at = [], 0
    for count in steps:
        feed = {
            "ids": ids[:, at : at + count],
            "attention_mask": np.ones((batch, at + count), np.int64),
            "position_ids": np.broadcast_to(np.arange(at, at + count), (batch, count)).copy(),
            "num_logits_to_keep": np.array(0, np.int64),
            **past,
        }
        results = dict(zip(outputs, run_plain(module, {k: feed[k] for k in names}), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        logits.append(results["logits"])
        at += count
    return np.concatenate(logits, axis=1)


def close(found: Any, expected: Any) -> None:
    """Two orders of adding up 32 products in float32, of numbers of the order of one."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def some_ids(batch: int, length: int) -> Any:
    return np.random.default_rng(1).integers(0, WORDS, (batch, length))


# 1e-5 of numbers of the order of one: two orders of adding up 32 products in float32.


@pytest.mark.parametrize("positions", [RANGE, TABLE, MASKED, GIVEN])
def test_step_by_step_is_the_whole_sequence(positions: str) -> None:
    module = decoder(positions)
    ids = some_ids(1, 11)
    expected = whole(module, ids)
    made = cached(module)
    close(step_by_step(made, ids, (11,)), expected)
    close(step_by_step(made, ids, (4, 1, 1, 3, 2)), expected)


def test_quantized_products_relate_no_tokens() -> None:
    """Rounding activations may fall to the other side: a step of 1/127 of a row's largest."""
    passes = "quantize-weights{format=lwc embeddings=none}"
    module = lwc.optimize(decoder(), passes=passes).module
    assert "lwc::DynamicQuantMatMul" in map(op_name, module.graph)
    ids = np.array([[3, 7, 1, 9, 4]])
    wanted = whole(module, ids)
    found = step_by_step(cached(module), ids, (3, 1, 1))
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


def test_several_sequences_at_once() -> None:
    module = decoder()
    ids = some_ids(3, 7)
    made = cached(module)
    found = step_by_step(made, ids, (4, 1, 1, 1))
    close(found, whole(module, ids))


def test_the_interface_is_that_of_hugging_face() -> None:
    made = cached(decoder())
    stated = {
        value.name: [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        for value in (*made.graph.inputs, *made.graph.outputs)
    }
    assert stated == {
        "ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past_sequence_length + sequence"],
        "past_key_values.0.key": ["batch", KV_HEADS, "past_sequence_length", SIZE],
        "past_key_values.0.value": ["batch", KV_HEADS, "past_sequence_length", SIZE],
        "logits": ["batch", "sequence", WORDS],
        "present.0.key": ["batch", KV_HEADS, "past_sequence_length + sequence", SIZE],
        "present.0.value": ["batch", KV_HEADS, "past_sequence_length + sequence", SIZE],
    }


def test_a_padded_prompt_goes_on_from_its_last_token() -> None:
    """Right padding: the mask says where each sequence ends, and the next token goes there."""
    module = decoder()
    made = cached(module)
    names = [str(value.name) for value in made.graph.outputs]
    ids = some_ids(1, 6)
    feed = {
        "ids": np.concatenate([ids[:, :4], [[0, 0]]], 1),
        "attention_mask": np.array([[1, 1, 1, 1, 0, 0]]),
        "past_key_values.0.key": np.zeros((1, KV_HEADS, 0, SIZE), np.float32),
        "past_key_values.0.value": np.zeros((1, KV_HEADS, 0, SIZE), np.float32),
    }
    found = dict(zip(names, run_plain(made, feed), strict=True))
    close(found["logits"][:, :4], whole(module, ids[:, :4]))


def test_what_has_a_cache_is_kept() -> None:
    once = cached(decoder())
    again = lwc.optimize(once, passes="add-kv-cache", grant="all")
    assert not again.report.passes[0].changed
    assert any("has a cache of 1 layers already" in note for note in again.report.passes[0].notes)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ("result = CumSum (added, one)", "CumSum -> 'result'.*sums over the tokens"),
        (
            "mean = ReduceMean (added, column)\n result = Add (added, mean)",
            "ReduceMean -> 'mean'.*works along the tokens",
        ),
        ("result = Softmax <axis = 1> (added)", "Softmax -> 'result'.*works along the tokens"),
        (
            "turned = Transpose <perm = [0, 2, 1]> (added)\n"
            "products = MatMul (added, turned)\n result = MatMul (products, added)",
            "MatMul -> 'products'.*has tokens",
        ),
        (
            "first = Gather <axis = 1> (added, row)\n result = Add (added, first)",
            "Gather -> 'first'.*picks tokens",
        ),
        (
            "count = Cast <to = 1> (lengths)\n result = Mul (added, count)",
            "Mul -> 'result'.*computes with the number of tokens",
        ),
    ],
)
def test_other_relations_between_tokens_are_refused_by_name(tail: str, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        cached(decoder(tail=tail))


@pytest.mark.parametrize(
    "tail",
    [
        "flat = Reshape (added, target)\n wider = Gemm (flat, wide)\n"
        "again = Shape (added)\n result = Reshape (wider, again)",
        "turned = Transpose <perm = [2, 0, 1]> (added)\n halved = Mul (turned, half)\n"
        "result = Transpose <perm = [1, 2, 0]> (halved)",
        "a, b = Split <axis = 2, num_outputs = 2> (added)\n swapped = Concat <axis = -1> (b, a)\n"
        "result = Softmax (swapped)",
        "mean = ReduceMean (added, last_axis)\n result = Sub (added, mean)",
        "size_of_it = Abs (added)\n code = Cast <to = 2> (size_of_it)\n"
        'up = BitShift <direction = "LEFT"> (code, code)\n low = BitwiseXor (up, code)\n'
        "back = Cast <to = 1> (low)\n result = Add (added, back)",
    ],
)
def test_what_treats_tokens_one_by_one_may_have_any_layout(tail: str) -> None:
    tail = tail.replace("target", "rows")
    if "rows" in tail:
        tail = (
            "size = Shape <start = 2> (added)\n other = Neg (column)\n"
            "rows = Concat <axis = 0> (other, size)\n" + tail
        )
    module = decoder(tail=tail)
    ids = some_ids(1, 8)
    found = step_by_step(cached(module), ids, (5, 1, 2))
    close(found, whole(module, ids))


COUNTED_OTHERWISE = {
    "backwards": "less1 = Sub (length, one)\n range = Range (less1, minus, minus)",
    "in steps of two": "twice = Add (length, length)\n range = Range (zero, twice, two)",
    "from the end": "first = Neg (length)\n range = Range (first, zero, one)",
}


@pytest.mark.parametrize("count", COUNTED_OTHERWISE.values(), ids=COUNTED_OTHERWISE)
def test_positions_that_are_counted_otherwise_are_refused(count: str) -> None:
    """Shifted by the past they would be other positions."""
    positions = RANGE.replace("range = Range (zero, length, one)", count)
    with pytest.raises(PassError, match=r"Range -> 'range'.*does not count tokens one by one"):
        cached(decoder(positions))


ROWS_OF_THE_MASK = {
    "as many as new tokens, from the first": "cut = Slice (sums, row, lengths_of_ids, column)",
    "all but the first": "cut = Slice (sums, column, far, column)",
}


@pytest.mark.parametrize("cut", ROWS_OF_THE_MASK.values(), ids=ROWS_OF_THE_MASK)
def test_cuts_of_the_mask_at_a_fixed_place_are_refused(cut: str) -> None:
    """With a past, the first tokens of the mask are not the new ones."""
    positions = MASKED.replace(
        "seen = Mul (sums, attention_mask)",
        f"lengths_of_ids = Gather (extents, column)\n {cut}",
    ).replace("Sub (seen, one)", "Sub (cut, one)")
    with pytest.raises(PassError, match=r"Slice -> 'cut'.*takes some of the tokens"):
        cached(decoder(positions))


def test_a_cut_of_the_mask_that_keeps_everything() -> None:
    positions = MASKED.replace(
        "seen = Mul (sums, attention_mask)", "seen = Slice (sums, row, far, column)"
    )
    module, ids = decoder(positions), some_ids(1, 7)
    close(step_by_step(cached(module), ids, (3, 1, 1, 2)), whole(module, ids))


@pytest.mark.parametrize("begin", ["last_axis", "two_back"])
def test_the_last_tokens_beside_all_are_refused(begin: str) -> None:
    tail = f"end = Slice (added, {begin}, far, column)\n result = Add (added, end)"
    with pytest.raises(PassError, match=r"the last token meets all|takes some of the tokens"):
        cached(decoder(tail=tail))


def test_queries_of_a_length_that_no_input_has() -> None:
    positions = TABLE.replace("(places, row, lengths_of_ids, row)", "(places, begin, far, row)")
    positions = positions.replace("learned", "begin = Neg (lengths_of_ids)\n learned", 1)
    with pytest.raises(PassError, match="which no input is known to have"):
        cached(decoder(positions))


def test_without_fused_attention_it_says_what_to_run() -> None:
    module = decoder()
    (node,) = [node for node in module.graph if node.op_type == "GroupQueryAttention"]
    node.attributes.add(ir.AttrInt64("causal", 0))
    with pytest.raises(PassError) as caught:
        cached(module.with_source(path="small.onnx"))
    assert str(caught.value).startswith(
        f"small.onnx: {describe(node)}: pass 'add-kv-cache': it is not causal by itself: a mask is"
    )
    plain = lwc.optimize(decoder(), passes="canonicalize").module
    for node in list(plain.graph):
        if op_name(node) == "com.microsoft::GroupQueryAttention":
            node.domain, node.op_type = "", "Identity"
            node.resize_inputs(1)
            node.attributes.clear()
    with pytest.raises(LwcError, match="run fuse-attention first"):
        cached(plain)


def test_a_fixed_length_is_refused() -> None:
    module = lwc.optimize(decoder(), passes="bind-dims{sequence=4}", grant="all").module
    with pytest.raises(PassError, match="fixed length of 4"):
        cached(module)


def test_the_padding_mask_is_an_assumption() -> None:
    module = decoder(MASKED)
    with pytest.raises(PassError, match="it would have to assume: Attention masks"):
        lwc.optimize(module, passes="add-kv-cache")


# last-logits


@pytest.mark.parametrize("passes", ["add-kv-cache,last-logits", "last-logits,add-kv-cache"])
def test_the_last_logits_are_those_of_the_last_token(passes: str) -> None:
    module = decoder()
    ids = some_ids(2, 6)
    made = cached(module, passes)
    found = step_by_step(made, ids, (6,))
    assert found.shape == (2, 1, WORDS)
    close(found, whole(module, ids)[:, -1:])


def test_without_a_cache() -> None:
    module = decoder()
    ids = some_ids(2, 6)
    made = cached(module, "last-logits{count=2}")
    close(whole(made, ids), whole(module, ids)[:, -2:])
    assert [str(dim) for dim in made.graph.outputs[0].shape or ()] == ["batch", "2", str(WORDS)]


@pytest.mark.parametrize("asked", [1, 3, 0])
def test_the_number_of_positions_may_be_an_input(asked: int) -> None:
    module = decoder()
    ids = some_ids(2, 6)
    made = cached(module, "last-logits{count=0}")
    found = run_plain(made, {"ids": ids, "num_logits_to_keep": np.array(asked, np.int64)})[0]
    close(found, whole(module, ids)[:, -asked:])


def test_all_that_follows_attention_is_cut() -> None:
    tail = "up = MatMul (added, wide)\n bent = Relu (up)\n result = Add (added, bent)"
    result = lwc.optimize(decoder(tail=tail), passes="last-logits")
    (note,) = [note for note in result.report.passes[0].notes if "last positions" in note]
    # The product with wo, the sum, the feed-forward layer's three, and the head.
    assert re.match(r"6 nodes", note)
    cuts = [node for node in result.module.graph if node.op_type == "Slice"]
    assert {node.inputs[0].name for node in cuts if node.inputs[0]} == {"attended", "hidden"}


def test_an_output_with_the_last_logits_is_left() -> None:
    once = lwc.optimize(decoder(), passes="last-logits").module
    assert not lwc.optimize(once, passes="last-logits").report.passes[0].changed


def test_no_such_output() -> None:
    with pytest.raises(LwcError, match="there is no output 'scores'"):
        lwc.optimize(decoder(), passes="last-logits{output=scores}")


@pytest.mark.parametrize(
    "passes", ["add-kv-cache", "last-logits", "add-kv-cache,last-logits{count=0}"]
)
def test_numeric_verification_feeds_an_empty_cache(passes: str) -> None:
    result = lwc.optimize(decoder(MASKED), passes=passes, grant="all", verify="numeric")
    assert all(entry.changed for entry in result.report.passes)


def test_numeric_verification_sees_a_wrong_cut() -> None:
    """Were the first positions kept and not the last, it would be found."""
    module = decoder()
    wrong = lwc.optimize(module, passes="last-logits").module
    for value in wrong.graph.initializers.values():
        if value.name and value.name.startswith("begin"):
            value.const_value = ir.Tensor(np.array([0], np.int64), name=value.name)
        if value.name and value.name.startswith("end"):
            value.const_value = ir.Tensor(np.array([1], np.int64), name=value.name)
    with pytest.raises(VerificationError, match="output 'logits' is"):
        compare(module, wrong, contract=LastLogits.contract)


@pytest.mark.parametrize("positions", [RANGE, MASKED])
def test_a_report_measures_before_and_after(positions: str) -> None:
    """The cache that came in is fed empty; sums of 8 floats differ in the last places at most."""
    before = decoder(positions)
    result = lwc.optimize(before, "add-kv-cache", grant="all")
    assert result.module.graph.inputs[-1].name not in {v.name for v in before.graph.inputs}
    settings = MeasureSettings(shapes=[settle_shape(before, result.module, {})], rounds=1)
    measured = measure(result.report, before, result.module, settings, backend=OnnxRuntimeBackend())
    values = {(each.metric, each.detail.split(",")[0]): each.after for each in measured.quality}
    error = values["max abs error", "output logits"]
    assert error is not None
    assert error < 1e-4
    assert len(measured.latency) == 1
