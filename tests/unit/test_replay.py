"""The part of a model behind a weight gives what the whole model with that weight gives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import module_of, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.replay import Replay
from lwc.core.module import Module
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]

TEXT = """g (float[rows, 4] x, bool c) => (float[rows, 4] y, float[rows, 4] early)
    <float[4, 4] a = {1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 1, 0, 0, 1},
     float[4, 4] b = {1, 0, 0, 2, 0, 1, 0, 0, 5, 0, 1, 3, 1, 0, 0, 1},
     float[4, 4] d = {1, 0, 0, 2, 0, 1, 0, 0, 5, 0, 1, 3, 1, 0, 4, 1},
     float[4, 4] unread = {1, 0, 0, 2, 0, 1, 0, 0, 5, 0, 1, 3, 1, 0, 4, 1}>
    { p = MatMul (x, a)
      early = Relu (p)
      turned = Transpose <perm = [1, 0]> (b)
      q = MatMul (early, turned)
      e = If (c) <then_branch = t () => (float[rows, 4] m) { m = Add (q, x) },
                  else_branch = o () => (float[rows, 4] n) { n = Sub (q, p) }>
      h = Gemm <transB = 1> (e, d)
      u = MatMul (h, a)
      nothing = MatMul (h, unread)
      y = Add (u, x) }"""

FEEDS = [
    {"x": np.arange(n * 4, dtype=np.float32).reshape(n, 4) - 5, "c": np.array(n % 2 == 0)}
    for n in (2, 3)
]


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("parts", [1, 32])
def test_each_weight_is_as_in_the_whole(
    parts: int, max_memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a` is read again at the end, `b` through a transpose; `early` lies before most cuts."""
    monkeypatch.setattr("lwc.calibration.replay._PARTS", parts)
    monkeypatch.setattr("lwc.calibration.stages._SPILLED", 1)
    module, opened = module_of(TEXT), list[int]()

    def counting(stage: Module, expose: Sequence[str] = ()) -> AbstractContextManager[Any]:
        opened.append(len(stage.graph))
        return make_runner(stage, expose)

    ctx = PassContext(AnalysisManager(module), make_runner=counting, max_memory=max_memory)
    weights = [module.graph.initializers[name] for name in ("d", "unread", "b", "a")]
    replay = Replay(module, weights, ["y", "early"], FEEDS, ctx)
    for feed, found in zip(FEEDS, replay.outputs(), strict=True):
        for name, wanted in zip(("y", "early"), run_plain(module, feed), strict=True):
            np.testing.assert_array_equal(found[name], wanted)
    seen = []
    for part in replay.parts():
        for weight in part.weights:
            seen.append(weight.name)
            content = np.arange(16, dtype=np.float32).reshape(4, 4) - 7
            other = module_of(TEXT)
            changed = other.graph.initializers[weight.name or ""]
            other.replace_initializer(changed, ir.Tensor(content))
            for feed, found in zip(FEEDS, part.run(weight, content), strict=True):
                y, early = run_plain(other, feed)
                np.testing.assert_array_equal(found["y"], y)
                assert ("early" in found) or weight.name != "a"
                if "early" in found:
                    np.testing.assert_array_equal(found["early"], early)
    assert seen == ["a", "b", "d"]  # in the order of first use; no output depends on `unread`
    assert len(opened) == (2 if parts == 1 else 6)
