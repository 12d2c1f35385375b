"""Generated graphs are what they claim: well formed, valid ONNX, and they run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from support import plain_session

from lwc.calibration.feeds import dim_names, make_feed
from lwc.core.module import Module
from lwc.verify.generate.motifs import MOTIFS
from lwc.verify.generate.sketch import Motif, Sketch, sketches
from lwc.verify.structural import verify_structure

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

OPSETS = (13, 17, 18, 21, 23)
EXTENTS = ((1, 1), (2, 3))
EXAMPLES = 30
DRAWN = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def feeds_of(module: Module) -> list[dict[str, Any]]:
    """Make a feed at each pair of extents; what is neither batch nor length gets the second."""
    feeds = []
    for batch, length in EXTENTS:
        extents = {name: batch if name == "N" else length for name in dim_names(module)}
        feeds.append(make_feed(module, extents, seed=length))
    return feeds


def check(module: Module) -> None:
    """Check structure, strict ONNX inference and execution; numbers must stay tame."""
    verify_structure(module)
    proto = ir.to_proto(module.model)
    onnx.checker.check_model(proto, full_check=True)
    session = plain_session(proto)
    for feed in feeds_of(module):
        for value, array in zip(module.graph.outputs, session.run(None, feed), strict=True):
            if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                assert not np.isnan(array).any(), f"{value.name} is NaN\n{module}"


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("motif", MOTIFS, ids=lambda motif: motif.name)
def test_motif(motif: Motif, opset: int) -> None:
    counts: Counter[str] = Counter()

    @DRAWN
    @given(st.data())
    def run(data: st.DataObject) -> None:
        counts["drawn"] += 1
        try:
            sketch = Sketch(cast("DrawFn", data.draw), opset)
            made = motif(sketch)
            module = sketch.finish()
        except UnsatisfiedAssumption:
            counts["rejected"] += 1
            raise
        assert made, "a motif returns what later pieces may build on"
        check(module)

    run()
    assert counts["rejected"] <= 0.2 * counts["drawn"], counts


@pytest.mark.parametrize("opset", OPSETS)
def test_sketches(opset: int) -> None:
    @DRAWN
    @given(sketches(MOTIFS, opset=opset))
    def run(module: Module) -> None:
        check(module)

    run()
