"""Rotary embeddings in PyTorch that do not fit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from fx_agreement import one_node, run_fx
from odd_rotary import MS, REFUSED, odd_rotary
from support import run_plain

from lwc.core.errors import LwcError


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(("domain", "odd", "told"), REFUSED)
def test_what_does_not_fit_is_refused(domain: str, odd: Any, told: str, rank: int) -> None:
    module, feed = odd_rotary(domain, odd, rank)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run_plain(module, feed)
    op = f"{domain}::RotaryEmbedding" if domain else "RotaryEmbedding"
    with pytest.raises(LwcError, match=rf"^{op} 'n': {re.escape(told)}$"):
        run_fx(module, feed)


@pytest.mark.parametrize("first", [-1, 19])
def test_positions_of_grouped_attention_that_no_table_has(first: int) -> None:
    drawn = np.random.default_rng(0)
    rows = {n: drawn.normal(size=(1, 2, 16)).astype(np.float32) for n in ("q", "k", "v")}
    given = {
        **rows,
        **dict.fromkeys(("past_k", "past_v")),
        **{"lengths": np.array([1], np.int32), "total": np.array(2, np.int32)},
        **{"cos": np.ones((20, 8), np.float32), "sin": np.zeros((20, 8), np.float32)},
        "places": np.array([[first, first + 1]]),
    }
    module, feed = one_node(
        "GroupQueryAttention", given, domain=MS, num_heads=1, kv_num_heads=1, do_rotary=1
    )
    told = f"positions are from {first} to {first + 1}, and tables of 20 rows have 0 to 19"
    with pytest.raises(LwcError, match=rf"^{MS}::GroupQueryAttention 'n': {told}$"):
        run_fx(module, feed)
