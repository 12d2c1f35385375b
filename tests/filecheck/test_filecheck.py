"""Before and after, as text: each `*.txt` here holds a pipeline, a graph, and what is left of it.

The three parts are divided by lines of `===`. The result is compared with the printer's output
and run against the original on ONNX Runtime without optimisations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import plain_session, run_pass

from lwc.core.module import Module
from lwc.core.printer import print_module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear

PASSES = {"canonicalize": Canonicalize(), "fold-linear": FoldLinear()}
CASES = sorted(Path(__file__).parent.glob("*.txt"))
EXTENTS = ({"N": 2, "S": 3}, {"N": 3, "S": 5})


def run(proto: onnx.ModelProto, extents: dict[str, int]) -> list[np.ndarray[Any, Any]]:
    session = plain_session(proto)
    random = np.random.default_rng(0)
    feed = {}
    for each in session.get_inputs():
        shape = [extents[d] if isinstance(d, str) else d for d in each.shape]
        if each.type == "tensor(float)":
            feed[each.name] = random.standard_normal(shape).astype(np.float32)
        else:
            assert each.type == "tensor(bool)"
            feed[each.name] = np.asarray(random.random(shape) > 0.5)
    return list(session.run(None, feed))


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_before_after(case: Path) -> None:
    pipeline, before, after = case.read_text().split("\n===\n")
    proto = onnx.parser.parse_model(before)
    module = Module(ir.from_proto(proto))
    for name in pipeline.strip().split(","):
        run_pass(PASSES[name], module)
    assert print_module(module).strip() == after.strip()
    result = ir.to_proto(module.model)
    for extents in EXTENTS:
        for wanted, found in zip(run(proto, extents), run(result, extents), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
