"""Norms and rotary embeddings at the edges of what kernels take, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from fx_agreement import one_node
from interpreted_lowering import MS, normal, reasons

# Norms


@pytest.mark.parametrize(
    ("op", "domain", "other"),
    [
        ("RMSNormalization", "", "scale"),
        ("SimplifiedLayerNormalization", MS, "scale"),
        ("LayerNormalization", "", "scale"),
        ("LayerNormalization", "", "bias"),
        ("SkipSimplifiedLayerNormalization", MS, "gamma"),
        ("SkipSimplifiedLayerNormalization", MS, "bias"),
        ("SkipLayerNormalization", MS, "gamma"),
        ("SkipLayerNormalization", MS, "beta"),
        ("SkipLayerNormalization", MS, "bias"),
        ("SkipLayerNormalization", MS, "skip"),
    ],
)
def test_norms_of_two_types_stay(op: str, domain: str, other: str) -> None:
    names = {
        "RMSNormalization": ["x", "scale"],
        "SimplifiedLayerNormalization": ["x", "scale"],
        "LayerNormalization": ["x", "scale", "bias"],
        "SkipSimplifiedLayerNormalization": ["x", "skip", "gamma", "bias"],
        "SkipLayerNormalization": ["x", "skip", "gamma", "beta", "bias"],
    }[op]
    wide = ("x", "skip")
    given = {name: normal(*((2, 8) if name in wide else (8,))) for name in names}
    given = {name: array.astype(np.float16) for name, array in given.items()}
    given[other] = given[other].astype(np.float32)
    module, _ = one_node(op, given, domain=domain, opset=23)
    assert reasons(module) == [f"{other} has another type than x"]
