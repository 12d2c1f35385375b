"""From a module to PyTorch and back: the same function, and as much to fuse.

Tracing takes seconds: these are two of the families that `tools/bench/fx_round_trip.py` has.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bench.fx_round_trip import row_of
from families import LAYERS

pytestmark = pytest.mark.models

ERROR = 1e-5
"""Of the largest output: float32 through two layers."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["distilbert", "opt"])
def test_family(family: str) -> None:
    row = row_of(family)
    assert row.error <= ERROR
    assert row.error_fused <= ERROR
    assert row.attention == row.attention_back == LAYERS
