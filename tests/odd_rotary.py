"""Rotary embeddings whose tables or positions do not fit, as ONNX Runtime refuses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from fx_agreement import one_node

from lwc.core.module import Module

__all__ = ["MS", "REFUSED", "odd_rotary"]

MS = "com.microsoft"
BATCH, HEADS, LENGTH, SIZE, ROWS = 2, 3, 5, 16, 20
PLACES = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
RANGE = "tables of 20 rows have 0 to 19"

_BOTH: list[tuple[str, dict[str, Any], str]] = [
    ("behind the end", {"places": PLACES + 11}, f"positions are from 11 to 20, and {RANGE}"),
    ("negative", {"places": PLACES - 1}, f"positions are from -1 to 8, and {RANGE}"),
    ("one sequence", {"places": PLACES[:1]}, "position_ids has shape [1, 5], not [2, 5]"),
    ("one token", {"places": PLACES[:, :1]}, "position_ids has shape [2, 1], not [2, 5]"),
    ("narrow", {"table": (ROWS, 6)}, "cos_cache has shape [20, 6], not [20, 8]"),
    ("wide", {"table": (ROWS, 10)}, "cos_cache has shape [20, 10], not [20, 8]"),
    (
        "narrow for a part",
        {"table": (ROWS, 3), "rotary_embedding_dim": 8, "num_heads": HEADS},
        "cos_cache has shape [20, 3], not [20, 4]",
    ),
    ("of two sizes", {"sines": (19, 8)}, "sin_cache has shape [19, 8], not [20, 8]"),
]
_CONTRIB: list[tuple[str, dict[str, Any], str]] = [
    ("late first", {"places": np.array([16])}, f"positions are from 16 to 20, and {RANGE}"),
    ("negative first", {"places": np.array(-1)}, f"positions are from -1 to 3, and {RANGE}"),
    ("a vector", {"places": PLACES[0]}, "position_ids has shape [5], not [2, 5]"),
]
_STANDARD: list[tuple[str, dict[str, Any], str]] = [
    (
        f"tables {list(shape)} by token",
        {"places": None, "table": shape},
        f"cos_cache has shape {list(shape)}, not [2, 5, 8]",
    )
    for shape in [(1, 5, 8), (2, 7, 8), (2, 4, 8), (2, 5, 6), (20, 8)]
] + [("both", {"table": (BATCH, LENGTH, 8)}, "cos_cache has shape [2, 5, 8], not [2, 8]")]

REFUSED = [
    pytest.param(domain, odd, told, id=f"{domain or 'standard'}, {name}")
    for domain, more in (("", _STANDARD), (MS, _CONTRIB))
    for name, odd, told in [*_BOTH, *more]
]
"""Domain, what is odd, and what is told of it."""


def odd_rotary(domain: str, odd: Mapping[str, Any], rank: int) -> tuple[Module, dict[str, Any]]:
    """Make a node from what is odd about it, and its feed.

    Args:
        domain: Its domain.
        odd: `places`, shapes of `table` and `sines`, attributes.
        rank: Of what is turned.
    """
    given = {"places": PLACES, "table": (ROWS, SIZE // 2), **odd}
    shape = (BATCH, HEADS, LENGTH, SIZE) if rank == 4 else (BATCH, LENGTH, HEADS * SIZE)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    places, table = given.pop("places"), given.pop("table")
    cos = np.ones(table, np.float32)
    tables = {"cos": cos, "sin": np.zeros(given.pop("sines", table), np.float32)}
    if rank == 3:
        given["num_heads"] = HEADS
    if domain:
        inputs = {"x": x, "places": places, **tables}
    else:
        inputs = {"x": x, **tables, "places": places}
    return one_node("RotaryEmbedding", inputs, domain=domain, opset=23, **given)
