"""fuse-attention keeps its contract on drawn attention, in every form."""

from __future__ import annotations

import pytest

from lwc.passes.attention.fuse_attention import FuseAttention
from lwc.passes.attention.lowering import Form
from lwc.verify import check_pass, sketches
from lwc.verify.generate.motifs import spelled_attention


@pytest.mark.parametrize("form", ["auto", "mha", "gqa", "standard"])
def test_forms(form: Form) -> None:
    opset = 23 if form == "standard" else None
    graphs = sketches(spelled_attention.MOTIFS, steps=(1, 1), evenly=True, opset=opset)
    report = check_pass(FuseAttention(form), examples=100, graphs=graphs, seed=3, seconds=20)
    assert report.rewrites["attention"] > 3


def test_joined_axes() -> None:
    graphs = sketches(spelled_attention.JOINED, steps=(1, 1), evenly=True)
    report = check_pass(FuseAttention(), examples=100, graphs=graphs, seed=3, seconds=20)
    assert report.rewrites["joined-values"] > 3
    assert report.rewrites["attention"] > 3
