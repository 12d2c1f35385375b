"""Attention lowered to kernels, in the interpreter, against the fx backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fx_agreement import compare, one_node, run_fx
from interpreted_lowering import ATOL, MS, RTOL, agree, check, integers, normal, reasons, run

from lwc.core.errors import LwcError


def grouped(new: int, past: int, batch: int, **attributes: Any) -> dict[str, Any]:
    total = new + past
    given = {
        "q": normal(batch, new, 64),
        "k": normal(batch, new, 32),
        "v": normal(batch, new, 32, seed=1),
        "past_k": normal(batch, 2, past, 16),
        "past_v": normal(batch, 2, past, 16, seed=1),
        "seqlens": np.full(batch, total - 1, np.int32),
        "total": np.array(total, np.int32),
    }
    if attributes.get("do_rotary"):
        angles = normal(32, 8)
        given |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    return given


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"do_rotary": 1},
        {"do_rotary": 1, "rotary_interleaved": 1},
        {"local_window_size": 3},
        {"softcap": 2.0, "scale": -0.2},
        {"softcap": -2.0},
        {"causal": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("new", "past"), [(5, 0), (1, 6), (3, 4), (40, 9)])
def test_grouped_attention(attributes: Any, new: int, past: int) -> None:
    """Prompts, one token and several behind a cache, and too many for the kernel of caches."""
    given = grouped(new, past, 2, **attributes)
    sizes = {"num_heads": 4, "kv_num_heads": 2}
    if attributes.get("do_rotary") and new + past > 32:
        angles = normal(64, 8)
        given |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    check("GroupQueryAttention", given, domain=MS, outputs=3, **sizes, **attributes)


def test_grouped_attention_of_sequences_of_other_lengths() -> None:
    sizes: dict[str, Any] = {"domain": MS, "num_heads": 4, "kv_num_heads": 2, "outputs": 3}
    for new, past, causal in ((1, 6, 1), (7, 0, 1), (7, 0, 0)):
        given = grouped(new, past, 2)
        given["seqlens"] = np.array([6, 3], np.int32)
        module, feed = one_node("GroupQueryAttention", given, **sizes, causal=causal)
        found, wanted = run(module, feed), run_fx(module, feed)
        for a, b in zip(found, wanted, strict=True):
            if (
                new == 7 and causal and a.ndim == 3
            ):  # queries behind the end of a sequence mean nothing
                a, b = a[1:, :4], b[1:, :4]  # noqa: PLW2901
            compare(a, b, RTOL, ATOL)


def test_prompts_in_caches_with_room() -> None:
    room = {f"past_{name}": normal(2, 2, 9, 16) for name in "kv"}
    absent = dict.fromkeys(("cos", "sin", "positions"))
    for bias in (None, normal(1, 4, 5, 5)):
        for causal in (0, 1):
            check(
                "GroupQueryAttention",
                {**grouped(5, 0, 2), **room, **absent, "bias": bias},
                domain=MS, outputs=3, num_heads=4, kv_num_heads=2, causal=causal,
            )  # fmt: skip


def test_grouped_attention_with_a_bias_and_packed() -> None:
    given = grouped(3, 4, 2)
    absent = dict.fromkeys(("cos", "sin", "positions"))
    biased = {**given, **absent, "bias": normal(1, 4, 3, 7)}
    check("GroupQueryAttention", biased, domain=MS, num_heads=4, kv_num_heads=2)
    given |= {"q": normal(2, 3, 128), "k": None, "v": None}
    check("GroupQueryAttention", given, domain=MS, outputs=3, num_heads=4, kv_num_heads=2)


def test_positions_of_one_sequence_stand_for_all() -> None:
    given = {**grouped(4, 0, 2, do_rotary=1), "positions": np.array([[3, 4, 5, 9]], np.int64)}
    check("GroupQueryAttention", given, domain=MS, num_heads=4, kv_num_heads=2, do_rotary=1)


def test_what_grouped_attention_refuses() -> None:
    sizes: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2}
    module, _ = one_node(
        "GroupQueryAttention", grouped(3, 0, 1), domain=MS, smooth_softmax=1, **sizes
    )
    assert reasons(module) == ["it has smooth_softmax"]
    wide = {**grouped(3, 0, 1), "q": normal(1, 3, 2048), "k": normal(1, 3, 1024)}
    wide |= {"v": normal(1, 3, 1024), "past_k": None, "past_v": None}
    module, _ = one_node("GroupQueryAttention", wide, domain=MS, **sizes)
    assert reasons(module) == ["heads of 512 elements are larger than 256"]


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    "mask",
    [None, [5, 3], [5, 3, 0, 5, 10, 0, 5, 10], [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], "whole"],
    ids=str,
)
def test_multi_head_attention(mask: Any, causal: int) -> None:
    given = {name: normal(2, 5, 16, seed=i) for i, name in enumerate("qkv")}
    given |= {"bias": normal(48), "mask": None, "more": None}
    if mask == "whole":
        # Each token sees itself: scores that are all -10000 have no digits left for a difference.
        open_ = integers(0, 2, 2, 5, 5, dtype=np.int32) | np.eye(5, dtype=np.int32)
        given |= {"more": normal(1, 2, 5, 5), "mask": open_}
    elif mask is not None:
        given["mask"] = np.array(mask, np.int32)
    rest: dict[str, Any] = {"scale": 0.3, "mask_filter_value": -2.0} if causal else {}
    check("MultiHeadAttention", given, domain=MS, num_heads=2, unidirectional=causal, **rest)


def test_multi_head_attention_with_a_past_and_across() -> None:
    given = {name: normal(2, 3, 16, seed=i) for i, name in enumerate("qkv")}
    past = {"past_k": normal(2, 2, 4, 8), "past_v": normal(2, 2, 4, 8, seed=1)}
    whole = {**given, "bias": None, "mask": None, "more": None, **past}
    check("MultiHeadAttention", whole, domain=MS, num_heads=2, outputs=3)
    across = {"q": normal(2, 3, 16), "k": normal(2, 2, 7, 8), "v": normal(2, 2, 7, 8, seed=1)}
    check("MultiHeadAttention", across, domain=MS, num_heads=2)
    module, _ = one_node("MultiHeadAttention", across, domain=MS, num_heads=2, unidirectional=1)
    assert reasons(module) == ["queries and new keys may differ in number"]


def test_packed_attention_by_ends_and_starts() -> None:
    given = {"x": normal(1, 5, 8), "weights": normal(8, 48), "bias": normal(48)}
    given["mask"] = np.array([4, 1], np.int32)
    module, feed = one_node("Attention", given, domain=MS, num_heads=2)
    agree(module, feed, atol=1e-4)


@pytest.mark.parametrize("past", [False, True])
def test_packed_attention(*, past: bool) -> None:
    given = {"x": normal(2, 5, 8), "weights": normal(8, 48), "bias": normal(48)}
    given["mask"] = None if past else integers(0, 2, 2, 5, dtype=np.int32)
    if past:
        given["past"] = normal(2, 2, 2, 3, 8)
    outputs = 2 if past else 1
    rest: dict[str, Any] = {"domain": MS, "num_heads": 2, "scale": 0.1, "mask_filter_value": -2.0}
    module, feed = one_node("Attention", given, outputs=outputs, unidirectional=1, **rest)
    agree(module, feed, atol=1e-4)  # the projections by torch are of the size of 10


def test_packed_attention_with_values_of_another_size() -> None:
    given = {"x": normal(2, 5, 8), "weights": normal(8, 56), "bias": normal(56)}
    sizes = [16, 16, 24]
    module, feed = one_node("Attention", given, domain=MS, num_heads=2, qkv_hidden_sizes=sizes)
    agree(module, feed, atol=1e-4)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"is_causal": 1},
        {"softcap": 1.5},
        {"softcap": -1.5},
        {"is_causal": 1, "scale": 0.3},
        {"scale": -0.3},
        {"is_causal": 1, "left_window_size": 2**31 - 1},
        {"left_window_size": 2, "right_window_size": 2**31 - 1},
        {"left_window_size": 0, "right_window_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "short", "short float"])
def test_standard_attention(mask: str, attributes: Any) -> None:
    given = {"q": normal(2, 5, 64), "k": normal(2, 7, 32), "v": normal(2, 7, 32, seed=1)}
    masks = {
        "bool": integers(0, 2, 5, 7, dtype=bool),
        "float": normal(2, 1, 5, 7),
        "short": integers(0, 2, 5, 6, dtype=bool),
        "short float": normal(2, 1, 5, 6),
    }
    if mask != "none":
        given["mask"] = masks[mask]
    opset = 24 if mask.startswith("short") else 23
    check("Attention", given, opset=opset, q_num_heads=4, kv_num_heads=2, **attributes)


def test_standard_attention_with_a_cache() -> None:
    given = {name: normal(2, heads, 1, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    past = {"past_k": normal(2, 2, 9, 16), "past_v": normal(2, 2, 9, 16, seed=1)}
    for causal in (0, 1):
        check("Attention", {**given, "mask": None, **past}, opset=23, outputs=3, is_causal=causal)
    # Queries and new keys that differ in number: a query's place is behind the past all the same.
    for queries, new, behind in ((3, 5, 4), (3, 5, 0), (6, 2, 1)):
        given = {"q": normal(1, 2, queries, 16), "k": normal(1, 2, new, 16, seed=1)}
        given["v"] = normal(1, 2, new, 16, seed=2)
        past = {"past_k": normal(1, 2, behind, 16), "past_v": normal(1, 2, behind, 16, seed=3)}
        check("Attention", {**given, "mask": None, **past}, opset=23, outputs=3, is_causal=1)
    full = {"q": normal(2, 4, 3, 16), "k": normal(2, 2, 9, 16), "v": normal(2, 2, 9, 16, seed=1)}
    more = dict.fromkeys(("mask", "past_k", "past_v"))
    for causal in (0, 1):
        given = {**full, **more, "lengths": np.array([9, 6])}
        check("Attention", given, opset=24, is_causal=causal)
    module, feed = one_node("Attention", {**given, "lengths": np.array([3, 10])}, opset=24)
    with pytest.raises(LwcError, match="nonpad_kv_seqlen is from 3 to 10, and there are 9 keys"):
        run(module, feed)


def test_standard_attention_of_nothing_and_of_other_values() -> None:
    for queries, keys in ((3, 0), (0, 3)):
        given = {"q": normal(2, 2, queries, 16), "k": normal(2, 2, keys, 16)}
        check("Attention", {**given, "v": normal(2, 2, keys, 16)}, opset=23)
    given = {name: normal(1, 2, 4, 16) for name in "qkv"}
    given["v"] = given["v"].astype(np.float16)
    module, _ = one_node("Attention", given, opset=23)
    assert reasons(module) == ["queries and values are of different types"]


def test_what_is_not_asked_for_is_no_reason() -> None:
    given = {name: normal(1, 2, 4, 16, seed=i) for i, name in enumerate(("q", "k", "v"))}
    check("Attention", given, opset=23, softmax_precision=1, qk_matmul_output_mode=1)
    module, _ = one_node("Attention", given, opset=23, softmax_precision=11)
    assert reasons(module) == ["its softmax is taken in torch.float64"]
    cached = grouped(3, 0, 1)
    sizes = {"num_heads": 4, "kv_num_heads": 2}
    check("GroupQueryAttention", cached, domain=MS, kv_cache_bit_width=0, **sizes)


@pytest.mark.parametrize("least", [-3.0e38, float(np.finfo(np.float32).min)])
def test_the_least_number_of_a_mask_is_seen(least: float) -> None:
    """A row that is masked by finite numbers attends to all alike, as the operator does."""
    given = {name: normal(1, 5, 32, seed=i) for i, name in enumerate(("q", "k", "v"))}
    mask = np.zeros((1, 1, 5, 5), np.float32)
    mask[..., 3:] = mask[:, :, 4] = least
    check(
        "MultiHeadAttention",
        {**given, "bias": None, "padding": None, "mask": mask},
        domain=MS,
        num_heads=2,
    )
