"""From a module to PyTorch and back: the same function, and as much to fuse.

Tracing takes seconds: these are two of the families that `tools/bench/fx_round_trip.py` has.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
import transformers
from bench.fx_round_trip import row_of
from families import LAYERS
from support import run_plain

import lwc

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
    assert row.warnings == 0


@pytest.mark.slow
def test_a_mixture_of_experts() -> None:
    """Its router takes the best experts by TopK."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        use_cache=False,
        experts_implementation="batched_mm",
    )
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.ones(2, 6, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    feed = dict.fromkeys(names, ids)
    shapes = {name: {0: "batch", 1: "sequence"} for name in names}
    module = lwc.trace(model, (), feed, dynamic_shapes=shapes)
    back = lwc.trace(
        lwc.to_fx(module), (ids, ids), dynamic_shapes=tuple(shapes.values()), input_names=names
    )
    given = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(given).logits.numpy()
    fed = {"input_ids": given.numpy(), "attention_mask": np.ones((3, 5), np.int64)}
    for each in (module, back):
        np.testing.assert_allclose(run_plain(each, fed)[0], wanted, rtol=0, atol=ERROR)
        assert not [remark for remark in each.remarks if remark.kind == "warning"]
