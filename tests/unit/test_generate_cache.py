"""Caches: their interface, how they are bound, and what policies keep, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from support import module_of  # noqa: E402
from tiny_llama import KV_HEADS, LAYERS, SIZE, WORDS, Spelling, as_module, tiny_llama  # noqa: E402

import lwc  # noqa: E402
from lwc.backends.onnxruntime.decoding import open_decoder  # noqa: E402
from lwc.core.errors import LwcError, UsageError  # noqa: E402
from lwc.core.module import Module  # noqa: E402
from lwc.core.walk import op_name  # noqa: E402
from lwc.generate.feeding import Feeder  # noqa: E402
from lwc.generate.interface import GQA, NO_CACHE, find_interface  # noqa: E402
from lwc.generate.perplexity import perplexity_with_cache  # noqa: E402
from lwc.generate.policies import (  # noqa: E402
    CachePolicy,
    FullCache,
    HeavyHitters,
    WindowCache,
    _moved,
    _moves,
)
from lwc.generate.policy_text import parse_policy  # noqa: E402
from lwc.generate.variants import told_positions, weighed  # noqa: E402

SPELLINGS = get_args(Spelling)
TOKENS = [int(each) for each in np.random.default_rng(5).integers(0, WORDS, 40)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def written(llama: Any) -> dict[str, Module]:
    return {spelling: as_module(llama, spelling) for spelling in SPELLINGS}


def close(found: Any, expected: Any) -> None:
    """Logits are of the order of ten: sums of a few hundred products in float32, in any order."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def fed(module: Module, policy: CachePolicy, steps: list[int], longest: int = 60) -> Any:
    """Feed `TOKENS` in steps of so many, and return the logits of all."""
    logits, at = [], 0
    with Feeder(module, policy, threads=1) as feeder:
        feeder.start(longest, max(steps))
        for count in steps:
            logits.append(feeder.feed(TOKENS[at : at + count], every=True))
            at += count
    return np.concatenate(logits)


# The interface


def test_the_interface_is_read_from_the_module(written: dict[str, Module]) -> None:
    found = find_interface(written["gqa"])
    assert (found.ids, found.mask, found.positions) == (
        "input_ids", "attention_mask", "position_ids",
    )  # fmt: skip
    assert (found.logits, found.keep, found.masses) == ("logits", None, None)
    assert [(each.past, each.present) for each in found.tensors[2:]] == [
        ("past_key_values.1.key", "present.1.key"),
        ("past_key_values.1.value", "present.1.value"),
    ]
    assert (found.tensors[0].heads, found.tensors[0].size) == (KV_HEADS, SIZE)
    assert found.bytes_per_token == 2 * LAYERS * KV_HEADS * SIZE * 4
    in_place = {name: find_interface(module).in_place for name, module in written.items()}
    assert in_place == {"gqa": True, "gqa-rotary": True, "plain": False, "standard": False}


def test_a_head_size_the_file_does_not_state_is_that_of_the_queries(llama: Any) -> None:
    module = as_module(llama, "gqa-rotary")
    for value in (*module.graph.inputs, *module.graph.outputs):
        if value.name and value.name.startswith(("past", "present")):
            value.shape = ir.Shape(["batch", KV_HEADS, "any", "size"])
    assert {each.size for each in find_interface(module).tensors} == {SIZE}


def renamed(module: Module, old: str, new: str) -> None:
    for value in (*module.graph.inputs, *module.graph.outputs):
        if value.name == old:
            value.name = new


def retyped(module: Module, name: str, dtype: ir.DataType) -> None:
    (value,) = [value for value in module.graph.inputs if value.name == name]
    value.dtype = dtype


def reshaped(module: Module, name: str, *shape: int | str) -> None:
    (value,) = [value for value in module.graph.inputs if value.name == name]
    value.shape = ir.Shape(shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: renamed(m, "present.1.value", "values"), "layer 1 .* output 'present.1.value'"),
        (
            lambda m: renamed(m, "past_key_values.0.key", "past_key_values.7.key"),
            "layer 0 .* input 'past_key_values.0.key'",
        ),
        (lambda m: renamed(m, "position_ids", "offsets"), "'offsets' is none of a decoder's"),
        (lambda m: retyped(m, "input_ids", ir.DataType.INT32), "'input_ids' is INT32"),
        (
            lambda m: reshaped(m, "past_key_values.0.key", "b", KV_HEADS, 5, SIZE),
            r"'past_key_values.0.key' has shape \[b, 2, 5, 16\]",
        ),
    ],
)
def test_what_is_missing_is_named(
    change: Callable[[Module], object], reason: str, llama: Any
) -> None:
    module = as_module(llama, "gqa")
    change(module)
    with pytest.raises(LwcError, match=reason):
        find_interface(module)


def test_a_model_without_token_ids_or_logits_is_none() -> None:
    module = module_of("g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }")
    with pytest.raises(LwcError, match="takes no token ids"):
        find_interface(module)


# Steps


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("steps", [[12], [4, 1, 3, 1, 1, 2]])
def test_a_full_cache_computes_what_transformers_does(
    spelling: str, steps: list[int], llama: Any, written: dict[str, Module]
) -> None:
    with torch.no_grad():
        expected = llama(torch.tensor([TOKENS[:12]])).logits[0].numpy()
    close(fed(written[spelling], FullCache(), steps), expected)


def test_buffers_stay_where_they_are(written: dict[str, Module]) -> None:
    """In place, every step writes one entry into the buffer; nothing else moves."""
    module = written["gqa"]
    interface = find_interface(module)
    with open_decoder(module, interface, threads=1) as decoder:
        decoder.start(20)
        (group,) = decoder._cache._past.groups  # type: ignore[union-attr]
        address = group.array.ctypes.data
        for number, token in enumerate(TOKENS[:20]):
            before = group.array.copy()
            decoder.step(np.array([[token]]), np.array([[number]]))
            changed = np.flatnonzero((group.array != before).any(axis=(0, 1, 2, 4)))
            assert changed.tolist() == [number]
        assert group.array.ctypes.data == address
        assert decoder.cached == [20]
        assert decoder.cache_bytes == 20 * interface.bytes_per_token
        with pytest.raises(LwcError, match="room for 20 tokens, and there are 21"):
            decoder.step(np.array([[1]]), np.array([[20]]))


def test_a_cache_that_is_cut_stays_where_it_is(written: dict[str, Module]) -> None:
    """In ping-pong, two buffers are bound from the first cut on."""
    with Feeder(written["plain"], WindowCache(6, 1), threads=1) as feeder:
        feeder.start(40, chunk=1)
        modes = []
        for token in TOKENS[:10]:
            feeder.feed([token])
            modes.append(feeder.decoder.cache_mode)
        assert modes == ["ping-pong"] * 6 + ["fixed"] * 4
        cache = feeder.decoder._cache  # type: ignore[attr-defined]
        (past,), (present,) = cache._past.groups, cache._present[1].groups
        assert past.array.shape[3:] == (6, SIZE)
        assert present.array.shape[3:] == (7, SIZE)
        binding = cache._bindings[1]
        feeder.feed([3])
        assert feeder.decoder._cache is cache  # type: ignore[attr-defined]
        assert cache._bindings[1] is binding
        per_token = feeder.interface.bytes_per_token
        assert feeder.decoder.cache_bytes == (6 + 7) * per_token


# Policies, against a cache of transformers that is cut by hand


def by_hand(model: Any, tokens: list[int], drop: Callable[..., int], budget: int) -> Any:
    """Feed tokens one by one; `drop(positions, masses)` says what a head loses over the budget."""
    held: list[Any] = []
    state: dict[tuple[int, int], tuple[list[int], list[float]]] = {
        (layer, head): ([], []) for layer in range(LAYERS) for head in range(KV_HEADS)
    }
    logits = []
    for position, token in enumerate(tokens):
        cache = transformers.DynamicCache(held) if held else None
        with torch.no_grad():
            found = model(
                torch.tensor([[token]]), position_ids=torch.tensor([[position]]),
                cache=cache, use_cache=True, output_attentions=True,
            )  # fmt: skip
        logits.append(found.logits[0, 0].numpy())
        held = []
        for layer, each in enumerate(found.past_key_values.layers):
            shares = found.attentions[layer][0, :, 0].reshape(KV_HEADS, -1, each.keys.shape[2])
            kept = []
            for head in range(KV_HEADS):
                positions, masses = state[layer, head]
                positions.append(position)
                masses.append(0.0)
                for place, mass in enumerate(shares[head].sum(axis=0).tolist()):
                    masses[place] += mass
                rows = list(range(len(positions)))
                if len(positions) > budget:
                    gone = drop(positions, masses)
                    del positions[gone], masses[gone], rows[gone]
                kept.append((each.keys[0, head, rows], each.values[0, head, rows]))
            held.append(tuple(torch.stack(part)[None] for part in zip(*kept, strict=True)))
    return np.stack(logits)


def oldest_but_sinks(positions: list[int], _: list[float]) -> int:
    return positions.index(min(p for p in positions if p >= 2))


def lightest_of_old(positions: list[int], masses: list[float]) -> int:
    old = [n for n, position in enumerate(positions) if position <= max(positions) - 3]
    return min(old, key=lambda n: masses[n])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_window_keeps_the_first_and_the_last_tokens(
    spelling: str, llama: Any, written: dict[str, Module]
) -> None:
    expected = by_hand(llama, TOKENS[:30], oldest_but_sinks, 7)
    found = fed(written[spelling], WindowCache(7, sink=2), [1] * 30)
    close(found, expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heavy_hitters_are_those_with_most_attention(
    spelling: str, llama: Any, written: dict[str, Module]
) -> None:
    expected = by_hand(llama, TOKENS[:30], lightest_of_old, 8)
    found = fed(written[spelling], HeavyHitters(heavy=5, recent=3), [1] * 30)
    close(found, expected)
    window = fed(written[spelling], WindowCache(8, sink=0), [1] * 30)
    assert np.abs(window - expected).max() > 0.1


@pytest.mark.parametrize("policy", [WindowCache(7, 2), HeavyHitters(5, 3)])
@pytest.mark.parametrize("steps", [[20, 1, 1, 1], [3, 9, 5, 2, 2, 1]])
def test_every_spelling_is_cut_alike_after_many_tokens(
    policy: CachePolicy, steps: list[int], written: dict[str, Module]
) -> None:
    """Steps longer than what is kept as recent drop new entries, too."""
    found = [fed(written[spelling], policy, steps) for spelling in SPELLINGS]
    for other in found[1:]:
        close(other, found[0])


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("policy", [WindowCache(40), HeavyHitters(20, 20)])
def test_a_budget_for_everything_changes_no_bit(
    spelling: str, policy: CachePolicy, written: dict[str, Module]
) -> None:
    full = perplexity_with_cache(written[spelling], TOKENS, threads=1)
    kept = perplexity_with_cache(written[spelling], TOKENS, policy, threads=1)
    assert np.array_equal(full.nll_per_token, kept.nll_per_token)


def test_a_budget_that_is_not_reached_yet_changes_no_bit(written: dict[str, Module]) -> None:
    """Were there more tokens, attention would be counted, and nothing was dropped so far."""
    module, interface = weighed(written["plain"], find_interface(written["plain"]))
    with open_decoder(module, interface, threads=1) as decoder:
        decoder.start(30)
        full = [decoder.step(np.array([[t]]), np.array([[n]])) for n, t in enumerate(TOKENS[:20])]
    kept = fed(written["plain"], HeavyHitters(15, 5), [1] * 20)
    assert np.array_equal(np.concatenate(full), kept)


def test_masses_are_the_attention_of_each_step(llama: Any, written: dict[str, Module]) -> None:
    with torch.no_grad():
        found = llama(torch.tensor([TOKENS[:6]]), output_attentions=True).attentions
    shares = torch.stack([each[0] for each in found]).numpy()
    expected = shares.reshape(LAYERS, KV_HEADS, -1, 6, 6)[..., 4:, :].sum(axis=(2, 3))
    for module in written.values():
        twin, interface = weighed(*told_positions(module, find_interface(module)))
        with open_decoder(twin, interface, threads=1) as decoder:
            decoder.start(10)
            decoder.step(np.array([TOKENS[:4]]), np.arange(4)[None])
            decoder.step(np.array([TOKENS[4:6]]), np.arange(4, 6)[None])
            np.testing.assert_allclose(decoder.masses(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keep_io", "mode"), [(True, "fixed"), (False, "in place")])
def test_caches_in_half_precision(keep_io: bool, mode: str, written: dict[str, Module]) -> None:
    """Behind a Cast the cache is no buffer of attention; without, it takes half the bytes."""
    option = str(keep_io).lower()
    half = lwc.optimize(written["gqa"], f"convert-dtype{{keep-io={option}}}").module
    policy = HeavyHitters(5, 3)
    with Feeder(half, policy, threads=1) as feeder:
        feeder.start(30, 1)
        found = np.stack([feeder.feed([token]) for token in TOKENS[:30]])
        assert feeder.decoder.cache_mode == mode
        assert feeder.interface.tensors[0].dtype == (np.float32 if keep_io else np.float16)
    expected = fed(written["gqa"], policy, [1] * 30)
    # Eleven bits of a number, and here and there another entry that stays.
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95


def test_a_planted_key_outlives_the_window() -> None:
    """An entry that gets most attention stays, where recency alone would drop it."""
    tracker = HeavyHitters(heavy=2, recent=3).tracker(1, 1)
    assert tracker is not None
    positions: list[int] = []
    for step in range(20):
        held = [*positions, step]
        masses = np.array([[[0.9 if position == 4 else 0.01 for position in held]]])
        moves = tracker.seen(np.array([step]), masses)
        positions = held
        if moves is not None:
            (place,), (entry,) = moves.places[0, 0], moves.entries[0, 0]
            positions[place] = positions[entry]
            del positions[moves.kept :]
    assert len(positions) == 5
    assert 4 in positions
    assert {17, 18, 19} < set(positions)


@pytest.mark.parametrize("seed", range(30))
def test_moves_keep_what_is_not_dropped(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget, surplus = (int(each) for each in rng.integers(1, 9, 2))
    shape = (2, 3, budget + surplus)
    dropped = rng.random(shape).argsort(axis=2)[..., :surplus]
    if seed % 2 and surplus <= budget:
        dropped = rng.random((2, 3, budget)).argsort(axis=2)[..., :surplus]
    moves = _moves(dropped, budget, surplus)
    after = _moved(np.broadcast_to(np.arange(budget + surplus), shape), moves)
    for layer, head in np.ndindex(2, 3):
        wanted = set(range(budget + surplus)) - set(dropped[layer, head].tolist())
        assert set(after[layer, head].tolist()) == wanted


# What cannot be cut


def test_without_a_cache_there_is_a_remark_and_nothing_to_cut(llama: Any) -> None:
    module = as_module(llama, "plain", cache=False)
    with torch.no_grad():
        expected = llama(torch.tensor([TOKENS[:9]])).logits[0].numpy()
    close(fed(module, FullCache(), [4, 1, 3, 1]), expected)
    assert [remark.message for remark in module.remarks] == [NO_CACHE]
    with pytest.raises(LwcError, match=r"no cache to cut .*add-kv-cache"):
        Feeder(module, WindowCache(4, 1))


def test_counted_positions_are_refused(llama: Any) -> None:
    module = as_module(llama, "plain")
    (positions,) = [v for v in module.graph.inputs if v.name == "position_ids"]
    module.graph.inputs.remove(positions)
    (queries,) = [
        node.outputs[0]
        for node in module.graph
        if node.op_type == "Unsqueeze"
        and node.inputs[0] is not None
        and (made := node.inputs[0].producer()) is not None
        and made.op_type == "Range"
    ]
    for user, index in list(positions.uses()):
        user.replace_input_with(index, queries)
    with pytest.raises(LwcError, match="no input 'position_ids' in use"):
        told_positions(module, find_interface(module))


def test_positions_counted_beside_attention_are_refused_by_name(llama: Any) -> None:
    module = as_module(llama, "gqa-rotary")
    past = next(n for n in module.graph if n.op_type == "Sub").outputs[0]
    logits = module.graph.outputs[0].producer()
    assert logits is not None
    cast = ir.node("Cast", [past], {"to": int(ir.DataType.FLOAT)}, name="counting")
    shifted = ir.node("Add", [logits.inputs[0], cast.outputs[0]], name="shifting")
    module.graph.insert_before(logits, [cast, shifted])
    logits.replace_input_with(0, shifted.outputs[0])
    with pytest.raises(LwcError, match="something else than attention counts the cached tokens"):
        told_positions(module, find_interface(module))


def test_a_window_of_attention_is_refused(llama: Any) -> None:
    module = as_module(llama, "gqa")
    node = next(n for n in module.graph if op_name(n) == GQA)
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 8)
    with pytest.raises(LwcError, match="GroupQueryAttention 'attended_0': attention has a window"):
        Feeder(module, WindowCache(4, 1))


def test_attention_without_probabilities_is_refused(llama: Any) -> None:
    module = as_module(llama, "plain")
    for node in module.graph:
        if node.op_type == "Softmax":
            node.op_type = "LogSoftmax"
    with pytest.raises(LwcError, match=r"probabilities that belong to 'present\.0\.key'"):
        Feeder(module, HeavyHitters(2, 2))


def test_the_original_is_left_as_it_is(written: dict[str, Module]) -> None:
    before = written["gqa-rotary"].fingerprint()
    Feeder(written["gqa-rotary"], HeavyHitters(2, 2))
    assert written["gqa-rotary"].fingerprint() == before


def test_too_few_logits_for_a_chunk(llama: Any) -> None:
    module = as_module(llama, "gqa")
    head = module.graph.outputs[0].producer()
    assert head is not None
    cut = [module.add_initializer(n, np.array([v])) for n, v in (("a", -1), ("b", 99), ("c", 1))]
    last = ir.node("Slice", [head.inputs[0], *cut], name="last")
    module.graph.insert_before(head, last)
    head.replace_input_with(0, last.outputs[0])
    assert perplexity_with_cache(module, TOKENS[:9], threads=1).tokens == 8
    with pytest.raises(LwcError, match="the logits of 1 of 4 tokens"):
        perplexity_with_cache(module, TOKENS[:9], chunk=4, threads=1)


# Policies as text


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", FullCache()),
        ("window{512}", WindowCache(512, 4)),
        ("window{window=9 sink=2}", WindowCache(9, 2)),
        ("h2o{heavy=3 recent=4}", HeavyHitters(3, 4)),
    ],
)
def test_policies_are_read(text: str, policy: CachePolicy) -> None:
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("windw{3}", "did you mean 'window'"),
        ("", "one cache policy"),
        ("full,full", "one cache policy"),
        ("h2o{3}", "needs a number for 'recent'"),
        ("window{a=3}", "no option 'a'"),
        ("full{3}", "no option '3'"),
        ("window{3 window=4}", "given twice"),
        ("window{x}", "expected int"),
        ("window{4 sink=4}", "cannot keep the first 4"),
        ("h2o{0 recent=4}", "both are at least 1"),
    ],
)
def test_other_texts_are_no_policies(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_policy(text)
