"""ONNX's backend tests: what ONNX Runtime runs correctly it runs correctly after passes too."""

from __future__ import annotations

from collections import Counter

import pytest
from bench.backend_cases import VARIANTS
from bench.backend_check import Outcome
from bench.backend_nodes import outcomes, summarize

PIPELINE = "canonicalize,fold-linear,canonicalize"


def failures(rows: list[Outcome]) -> list[str]:
    return [f"{r.case}, {r.variant}: {r.reason}" for r in rows if r.status == "failed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_node_case_holds() -> None:
    rows = list(outcomes(["node"], "canonicalize"))
    assert not failures(rows)
    assert max(Counter((row.case, row.variant) for row in rows).values()) == 1
    counts = summarize(rows)
    written, constant, half, _ = (counts[f"node, {name}"] for name in VARIANTS)
    for each in counts.values():
        assert each["cases"] >= 1800
        assert each["correct"] >= 0.85 * each["cases"]
        assert each["refused"] <= 0.01 * each["cases"]
    assert written["changed"] >= 0.15 * written["correct"]
    assert constant["changed"] >= 0.75 * constant["correct"]
    assert written["changed"] < half["changed"] < constant["changed"]


@pytest.mark.slow
@pytest.mark.parametrize("only", ["conv", "batchnorm", "gemm", "matmul"])
def test_fold_linear_holds_on_linear_operators(only: str) -> None:
    rows = list(outcomes(["node"], PIPELINE, only))
    assert not failures(rows)
    assert sum(row.before == "correct" for row in rows) >= 4 * len(VARIANTS)


@pytest.mark.slow
def test_light_models_hold() -> None:
    rows = list(outcomes(["light"], PIPELINE))
    assert not failures(rows)
    assert len(rows) == 9 * len(VARIANTS)
    assert all(row.before == "correct" and row.changed for row in rows)


@pytest.mark.slow
def test_models_older_than_the_passes_hold() -> None:
    rows = list(outcomes(["simple", "pytorch-operator", "pytorch-converted"], PIPELINE))
    assert not failures(rows)
    assert sum(row.before == "correct" for row in rows) >= 300
