"""Attention of new tokens over a cache in the interpreter against torch."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from interpreted_attention import attention, numbers

from lwc.backends.triton import launch
from lwc.backends.triton.architectures import nearest
from lwc.backends.triton.kernels.decode_attention import decode_operation
from lwc.backends.triton.operation import Configuration
from lwc.core.errors import UsageError

ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 3), group=st.sampled_from([1, 2, 3, 7]), queries=st.integers(1, 3),
    capacity=st.integers(3, 300), size=st.sampled_from([16, 20, 64]),
    value_size=st.sampled_from([16, 24]), dtype=st.sampled_from(list(ROUNDING)),
    left=st.none() | st.integers(0, 120), cap=st.sampled_from([0.0, 3.0]), masked=st.booleans(),
    fill=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)  # fmt: skip
def test_equals_torch_at_every_length(
    *, groups: int, group: int, queries: int, capacity: int, size: int, value_size: int,
    dtype: torch.dtype, left: int | None, cap: float, masked: bool, fill: list[float],
) -> None:  # fmt: skip
    lengths = [round(queries + share * (capacity - queries)) for share in fill]
    q = numbers(0, 2, groups * group, queries, size, dtype=dtype)
    k, v = (
        numbers(i, 2, capacity, groups, width, dtype=dtype).transpose(1, 2)
        for i, width in ((1, size), (2, value_size))
    )
    mask = numbers(3, 2, 1, queries, capacity) > -1 if masked else None
    found = launch.decode_attention(
        q, k, v, key_lengths=torch.tensor(lengths, dtype=torch.int32), left=left, cap=cap, mask=mask
    )
    assert found.dtype == dtype
    for i, length in enumerate(lengths):
        expected = attention(
            q[i : i + 1], k[i : i + 1, :, :length], v[i : i + 1, :, :length], left=left, right=0,
            offset=length - queries, cap=cap,
            mask=None if mask is None else mask[i : i + 1, :, :, :length],
        )  # fmt: skip
        torch.testing.assert_close(
            found[i : i + 1].double(), expected, rtol=0, atol=ROUNDING[dtype]
        )


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
@pytest.mark.parametrize("length", [1, 64, 65, 500])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_splits_do_not_change_the_result(splits: int, length: int) -> None:
    q, k, v = numbers(0, 1, 6, 1, 32), numbers(1, 1, 2, 500, 32), numbers(2, 1, 2, 500, 32)
    lengths = torch.tensor([length], dtype=torch.int32)
    operation = decode_operation(q, k, v, nearest(80), key_lengths=lengths)
    tiles = {"ROWS": 16, "KEYS": 32, "SIZE": 32, "VALUE_SIZE": 32, "SPLITS": splits}
    for made in operation.prepare(Configuration(tiles)):
        made.run()
    expected = attention(q, k[:, :, :length], v[:, :, :length])
    torch.testing.assert_close(operation.results[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_edges_at_all_places_of_a_block(queries: int, splits: int) -> None:
    """Of a window, and of the keys before the first new token."""
    q, k, v = numbers(0, 1, 2, queries, 16), numbers(1, 1, 1, 40, 16), numbers(2, 1, 1, 40, 16)
    tiles = {"ROWS": 16, "KEYS": 16, "SIZE": 16, "VALUE_SIZE": 16, "SPLITS": splits}
    edges = [(left, 40) for left in range(6, 26)] + [(None, keys) for keys in range(16, 35)]
    for left, keys in edges:
        lengths = torch.tensor([keys])
        operation = decode_operation(q, k, v, nearest(80), left=left, key_lengths=lengths)
        for made in operation.prepare(Configuration(tiles)):
            made.run()
        expected = attention(
            q, k[:, :, :keys], v[:, :, :keys], left=left, right=0, offset=keys - queries
        )
        torch.testing.assert_close(operation.results[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_nothing_to_attend_to_gives_zero() -> None:
    q, k = numbers(0, 2, 2, 1, 16), numbers(1, 2, 1, 400, 16)
    lengths = torch.tensor([0, 400], dtype=torch.int32)
    found = launch.decode_attention(q, k, k, key_lengths=lengths)
    assert not found[0].any()
    assert found[1].abs().max() > 0
    hidden = torch.zeros(2, 1, 1, 400, dtype=torch.bool)
    assert not launch.decode_attention(q, k, k, mask=hidden).any()


def test_more_rows_than_a_tile_holds_are_refused() -> None:
    k: Any = numbers(1, 1, 1, 9, 16)
    with pytest.raises(UsageError, match=r"9 tokens of 8 heads a group are 72 rows.*attention"):
        launch.decode_attention(numbers(0, 1, 8, 9, 16), k, k)
