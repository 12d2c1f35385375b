"""torch.compile and torch.export of lowered models: they give what the GraphModule gives.

Compilation ends at graphs of PyTorch's own operators (the backend `aot_eager`): what makes machine
code of these is PyTorch's business, and needs a C++ compiler.
"""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import torch._dynamo.testing
from bench.fx_round_trip import FUSED, feed_of
from tiny_llama import as_module, tiny_llama

import lwc
from lwc.calibration.feeds import make_feed

pytestmark = [pytest.mark.models, pytest.mark.slow]

EXTENTS = {"batch": 3, "sequence": 9}, {"batch": 2, "sequence": 17}
RTOL, ATOL = 1e-4, 1e-5
"""float32 through two layers, in decomposed operators."""


def lowered_family(family: str, passes: str) -> tuple[Any, list[tuple[torch.Tensor, ...]]]:
    """Lower a family after passes; return the GraphModule and its arguments at two extents."""
    implementation = families.FAMILIES[family].implementations[-1]
    path = families.variant_path(families.Variant(family, implementation, "dynamo"))
    module = lwc.optimize(path, passes, grant="all").module
    lowered = lwc.to_fx(module)
    names = lowered.meta["lwc"]["inputs"]
    feeds = [feed_of(module, extents) for extents in EXTENTS]
    return lowered, [tuple(torch.from_numpy(feed[name]) for name in names) for feed in feeds]


def test_compiled_encoder() -> None:
    """One graph without breaks, which serves other extents too."""
    lowered, arguments = lowered_family("distilbert", "canonicalize")
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowered, backend=counted, fullgraph=True, dynamic=True)
    for given in arguments:
        torch.testing.assert_close(compiled(*given), lowered(*given), rtol=RTOL, atol=ATOL)
    assert counted.frame_count == 1


def test_compiled_decoder() -> None:
    """One graph, forward and backward."""
    lowered, (given, _) = lowered_family("opt", FUSED)
    weights = [p for p in lowered.parameters() if p.requires_grad]
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), lowered(*given), rtol=RTOL, atol=ATOL)
    wanted, found = (
        torch.autograd.grad(each(*given).square().mean(), weights, allow_unused=True)
        for each in (lowered, compiled)
    )
    assert any(gradient is not None for gradient in wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-8)


def test_a_decoder_with_a_cache_is_compiled_once() -> None:
    """With any extents: no float that decides a branch makes the compiler start again."""
    module = as_module(tiny_llama(), "gqa")
    lowered = lwc.to_fx(module)
    feed = make_feed(module, {"batch": 2, "past": 4, "sequence": 3, "total": 7})
    given = [torch.from_numpy(np.asarray(feed[name])) for name in lowered.meta["lwc"]["inputs"]]
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowered, backend=counted, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*given), lowered(*given), rtol=RTOL, atol=ATOL)
    assert counted.frame_count == 1


@pytest.mark.parametrize(
    ("family", "passes"), [("distilbert", "canonicalize"), ("opt", FUSED)], ids=["encoder", "fused"]
)
def test_exported(family: str, passes: str) -> None:
    lowered, (given, other) = lowered_family(family, passes)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    shapes = tuple({0: batch, 1: sequence} for _ in given)
    program = torch.export.export(lowered, given, dynamic_shapes=shapes, strict=False)
    again = program.module()
    for each in (given, other):
        torch.testing.assert_close(again(*each), lowered(*each), rtol=RTOL, atol=ATOL)
