"""Attention of prompts in the interpreter against torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from interpreted_attention import attention, numbers

from lwc.backends.triton import launch
from lwc.backends.triton.architectures import nearest
from lwc.backends.triton.kernels.flash_attention import Attended, flash_operation
from lwc.backends.triton.operation import Configuration
from lwc.core.errors import UsageError

# Weights are rounded to the type of the values before they are multiplied, and results once more:
# means of values below 2 in magnitude, so two halves of a unit in the last place there.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


SHAPES: dict[str, Any] = {
    "batch": st.integers(1, 2), "groups": st.integers(1, 2), "group": st.sampled_from([1, 2, 3]),
    "queries": st.integers(1, 150), "keys": st.integers(1, 150),
    "size": st.sampled_from([8, 16, 20, 64]), "value_size": st.sampled_from([16, 24, 64]),
    "dtype": st.sampled_from(list(ROUNDING)),
}  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    **SHAPES, left=st.none() | st.integers(0, 90), right=st.none() | st.integers(-3, 40),
    offset=st.none() | st.integers(-20, 60), cap=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_windows_equal_torch(
    *, batch: int, groups: int, group: int, queries: int, keys: int, size: int, value_size: int,
    dtype: torch.dtype, left: int | None, right: int | None, offset: int | None, cap: float,
) -> None:  # fmt: skip
    q = numbers(0, batch, groups * group, queries, size, dtype=dtype)
    k, v = (
        numbers(i, batch, groups, keys, w, dtype=dtype) for i, w in ((1, size), (2, value_size))
    )
    found = launch.attention(q, k, v, window=(left, right), offset=offset, cap=cap)
    expected = attention(
        q,
        k,
        v,
        left=left,
        right=right,
        cap=cap,
        offset=keys - queries if offset is None else offset,
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("masked", [False, True])
def test_edges_of_windows_at_all_places_of_a_block(*, masked: bool) -> None:
    """Blocks of 16 keys, of which some are computed without a mask and some not at all."""
    q, k, v = numbers(0, 1, 1, 20, 16), numbers(1, 1, 1, 70, 16), numbers(2, 1, 1, 70, 16)
    mask = numbers(3, 1, 1, 20, 70) if masked else None
    tiles = {"QUERIES": 16, "KEYS": 16, "SIZE": 16, "VALUE_SIZE": 16}
    for at in range(17):
        for left, right, offset in ((at, None, 50), (None, at - 1, 10), (at + 20, at, 25)):
            attended = Attended(left, right, offset)
            operation = flash_operation(q, k, v, attended, nearest(80), mask=mask)
            (made,) = operation.prepare(Configuration(tiles))
            made.run()
            expected = attention(q, k, v, left=left, right=right, offset=offset, mask=mask)
            (found,) = operation.results
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_causal_windows_end_at_the_query_or_before() -> None:
    q = numbers(0, 1, 1, 20, 16)
    for right, last in ((None, 0), (5, 0), (-2, -2)):
        found = launch.attention(q, q, q, causal=True, window=(3, right))
        expected = attention(q, q, q, left=3, right=last)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    **SHAPES, boolean=st.booleans(), causal=st.booleans(),
    spread=st.lists(st.booleans(), min_size=4, max_size=4),
)  # fmt: skip
def test_masks_equal_torch(
    *, batch: int, groups: int, group: int, queries: int, keys: int, size: int, value_size: int,
    dtype: torch.dtype, boolean: bool, causal: bool, spread: list[bool],
) -> None:  # fmt: skip
    heads = groups * group
    q = numbers(0, batch, heads, queries, size, dtype=dtype)
    k, v = (
        numbers(i, batch, groups, keys, w, dtype=dtype) for i, w in ((1, size), (2, value_size))
    )
    whole = (batch, heads, queries, keys)
    shape = [1 if narrow else extent for narrow, extent in zip(spread, whole, strict=True)]
    mask = numbers(3, *shape)
    mask = mask > -0.5 if boolean else mask.masked_fill(mask < -1, -torch.inf).to(dtype)
    mask[..., 0, :] = False if boolean else -torch.inf
    found = launch.attention(q, k, v, mask=mask, causal=causal)
    expected = attention(q, k, v, mask=mask, right=0 if causal else None, offset=keys - queries)
    assert not found[:, :, 0].any()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype])


def test_sequences_of_many_lengths_equal_each_alone() -> None:
    lengths = [(1, 1), (70, 70), (5, 40), (33, 33), (2, 130)]
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).int() for i in (0, 1)]
    q = numbers(0, int(starts[0][-1]), 4, 16)
    k, v = (numbers(i, int(starts[1][-1]), 2, 16) for i in (1, 2))
    found = launch.attention_packed(q, k, v, *starts, longest=(70, 130), causal=True)
    for i, (queries, keys) in enumerate(lengths):
        at = slice(int(starts[0][i]), int(starts[0][i + 1]))
        keys_at = slice(int(starts[1][i]), int(starts[1][i + 1]))
        alone = [t.transpose(0, 1)[None] for t in (q[at], k[keys_at], v[keys_at])]
        expected = attention(*alone, right=0, offset=keys - queries)[0].transpose(0, 1)
        torch.testing.assert_close(found[at].double(), expected, rtol=0, atol=1e-5)


def packed(lengths: list[tuple[int, int]], rest: int = 0) -> tuple[list[Any], list[Any]]:
    """Return q, k and v of sequences of some queries and keys, and where these begin."""
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0) for i in (0, 1)]
    tokens = [int(each[-1]) + rest for each in starts]
    return [numbers(i, tokens[i > 0], 2, 16) for i in range(3)], starts


@pytest.mark.parametrize(
    ("queries", "keys", "longest", "told"),
    [
        ([0, 2, 9], [0, 4, 5], (9, 9), "query_starts ends at 9, and there are 5 tokens"),
        ([0, 2, 5], [0, 4, 6], (9, 9), "key_starts ends at 6, and there are 5 tokens"),
        ([1, 2, 5], [0, 4, 5], (9, 9), "query_starts begins at 1, not 0"),
        ([0, 4, 2], [0, 4, 5], (9, 9), "query_starts falls from 4 to 2"),
        ([0, -1, 5], [0, 4, 5], (9, 9), "query_starts falls from 0 to -1"),
        ([0, 2, 5], [0, 4, 5], (2, 4), "query_starts has a sequence of 3, and longest says 2"),
        ([0, 2, 5], [0, 4, 5], (3, 3), "key_starts has a sequence of 4, and longest says 3"),
        ([0, 2, 5], [0, 5], (9, 9), r"key_starts has shape \[2\], not \[3\]"),
        ([0], [0], (9, 9), r"query_starts has shape \[1\], not \[sequences \+ 1\]"),
        ([], [], (9, 9), r"query_starts has shape \[0\], not"),
        (0, 0, (9, 9), r"query_starts has shape \[\], not"),
        ([0.0, 5.0], [0, 5], (9, 9), "query_starts is of type torch.float32, not int32 or int64"),
    ],
    ids=str,
)
def test_starts_that_do_not_fit_are_refused(
    queries: Any, keys: Any, longest: tuple[int, int], told: str
) -> None:
    tensors, _ = packed([(5, 5)])
    starts = [torch.tensor(each) for each in (queries, keys)]
    with pytest.raises(UsageError, match=told):
        launch.attention_packed(*tensors, *starts, longest=longest)


def test_tokens_of_no_sequence_give_zero() -> None:
    tensors, starts = packed([(3, 7), (2, 4)], rest=90)
    found = launch.attention_packed(*tensors, *starts, longest=(3, 7))
    alone = [t[: int(each[-1])] for t, each in zip(tensors, [*starts, starts[1]], strict=True)]
    expected = launch.attention_packed(*alone, *starts, longest=(3, 7))
    torch.testing.assert_close(found[:5], expected, rtol=0, atol=0)
    assert not found[5:].any()
    nothing = [t[:0] for t in tensors]
    none = [each[:1] for each in starts]
    assert launch.attention_packed(*nothing, *none, longest=(0, 0)).shape == (0, 2, 16)


EXTREMES = [-(2**63), -(2**31), -1, 2**31 - 1, 2**31, 2**63 - 1]


@pytest.fixture
def unseen() -> Iterator[None]:
    """As on a GPU: the content of starts is not looked at, and new memory holds anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_check_starts", lambda *_: None)
        patch.setattr(torch, "empty", lambda *args, **rest: torch.zeros(*args, **rest) + 777)
        yield


@pytest.mark.usefixtures("unseen")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), long=st.booleans(), causal=st.booleans())
def test_no_starts_lead_outside(*, data: st.DataObject, long: bool, causal: bool) -> None:
    """What is touched is watched; here, that each token has a result, of what there is."""
    ends = [each for each in EXTREMES if long or -(2**31) <= each < 2**31]
    number = st.integers(-3, 40) | st.sampled_from(ends)
    lists = [data.draw(st.lists(number, min_size=4, max_size=4)) for _ in range(2)]
    starts = [torch.tensor(each, dtype=torch.int64 if long else torch.int32) for each in lists]
    tensors, _ = packed([(30, 20)])
    longest = data.draw(st.sampled_from([(0, 0), (7, 5), (30, 20), (10**9, 10**9)]))
    found = launch.attention_packed(*tensors, *starts, longest=longest, causal=causal)
    assert bool((found.isnan() | (found.abs() <= 2)).all())


@pytest.mark.usefixtures("unseen")
def test_queries_beyond_the_longest_are_seen() -> None:
    tensors, starts = packed([(40, 9), (3, 30)])
    found = launch.attention_packed(*tensors, *starts, longest=(16, 9))
    expected = launch.attention_packed(*tensors, *starts, longest=(40, 30))
    expected[16:40] = torch.nan
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_windows_of_any_width_are_windows() -> None:
    q, k, v = numbers(0, 1, 2, 20, 16), numbers(1, 1, 2, 40, 16), numbers(2, 1, 2, 40, 16)
    whole = attention(q, k, v)
    for far in (2**31 - 17, 2**31 - 1, 2**31, 2**63 - 1, 2**70):
        found = launch.attention(q, k, v, window=(far, far), offset=2**29)
        torch.testing.assert_close(found.double(), whole, rtol=0, atol=1e-5)
        for side in ((-far, None), (None, -far)):
            assert not launch.attention(q, k, v, window=side, offset=-(2**29)).any()
        with pytest.raises(UsageError, match=f"offset -{far} is more than 536870912 from 0"):
            launch.attention(q, k, v, offset=-far)


@pytest.mark.parametrize("length", [*EXTREMES, -7, 0, 41])
@pytest.mark.parametrize("left", [None, 3])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_lengths_count_the_keys_that_exist(*, length: int, left: int | None, decode: bool) -> None:
    q, k, v = numbers(0, 1, 2, 3, 16), numbers(1, 1, 2, 40, 16), numbers(2, 1, 2, 40, 16)
    for dtype in (torch.int32, torch.int64):
        if torch.iinfo(dtype).min <= length <= torch.iinfo(dtype).max:
            lengths = torch.tensor([length], dtype=dtype)
            if decode:
                found = launch.decode_attention(q, k, v, key_lengths=lengths, left=left)
            else:
                found = launch.attention(
                    q, k, v, key_lengths=lengths, window=(left, None), causal=True
                )
            expected = attention(q, k, v, right=0, left=left, offset=37) * (length > 0)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_keys_beyond_a_length_do_not_count() -> None:
    q, k, v = numbers(0, 3, 2, 9, 16), numbers(1, 3, 1, 70, 16), numbers(2, 3, 1, 70, 16)
    k[1, :, 40:] = torch.nan
    v[1, :, 40:] = torch.inf
    lengths = torch.tensor([70, 40, 0], dtype=torch.int32)
    found = launch.attention(q, k, v, key_lengths=lengths, offset=20, causal=True)
    for i, length in enumerate(lengths.tolist()):
        expected = attention(
            q[i : i + 1], k[i : i + 1, :, :length], v[i : i + 1, :, :length], right=0, offset=20
        )
        torch.testing.assert_close(found[i : i + 1].double(), expected, rtol=0, atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    q = numbers(0, 1, 1, 20, 16) * 100
    found = launch.attention(q, q, q)
    torch.testing.assert_close(found.double(), attention(q, q, q), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    q, k = numbers(0, 1, 4, 3, 8), numbers(1, 1, 2, 5, 8)
    with pytest.raises(UsageError, match="k is of type"):
        launch.attention(q, k.half(), k)
    with pytest.raises(UsageError, match="does not fit q's"):
        launch.attention(q[:, :3], k, k)
    with pytest.raises(UsageError, match="does not fit v's"):
        launch.attention(q, k, k[:, :, :4])
    with pytest.raises(UsageError, match="does not broadcast"):
        launch.attention(q, k, k, mask=numbers(2, 3, 4))
    for groups, size in ((0, 8), (2, 0)):
        with pytest.raises(UsageError, match="does not fit q's"):
            launch.attention(q[..., :size], k[:, :groups, :, :size], k[:, :groups])
    for cap in (-1.0, float("nan"), float("inf")):
        for kernel in (launch.attention, launch.decode_attention):
            with pytest.raises(UsageError, match=rf"cap is {cap} \(0 leaves scores as they are\)"):
                kernel(q, k, k, cap=cap)
    for kernel in (launch.attention, launch.decode_attention):
        with pytest.raises(UsageError, match=r"key_lengths is of type torch.float32, not int32"):
            kernel(q, k, k, key_lengths=torch.ones(1))
