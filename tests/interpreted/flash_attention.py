"""Attention of prompts in the interpreter against torch."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from interpreted_attention import attention, numbers

from lwc.backends.triton import launch
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
