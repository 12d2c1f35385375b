"""ONNX's backend tests: what ONNX Runtime runs correctly it runs correctly after passes too."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from bench.backend_cases import VARIANTS, cases_of, variant_of
from bench.backend_check import Outcome, check
from bench.backend_nodes import outcomes, summarize

from lwc.core.module import Module
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult

PARTS = 3
"""Of the node cases, so that processes share them."""

PIPELINE = "canonicalize,fold-linear,canonicalize"


def failures(rows: list[Outcome]) -> list[str]:
    return [f"{r.case}, {r.variant}: {r.reason}" for r in rows if r.status == "failed"]


@dataclass(frozen=True)
class SwapOperands(Pass):
    name: ClassVar[str] = "swap-operands"
    contract: ClassVar[Exact] = Exact()

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        for node in module.graph:
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
        return PassResult(True)


@pytest.mark.slow
def test_a_wrong_pass_fails(tmp_path: Path) -> None:
    (case,) = cases_of("node", "test_sub_example")
    for name in VARIANTS:
        variant = variant_of(case, name)
        wrong = check("node", case, variant, (SwapOperands(),), tmp_path)
        assert (wrong.before, wrong.status) == ("correct", "failed")
        assert "values differ" in wrong.reason
        assert check("node", case, variant, (), tmp_path).status == "held"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_node_case_holds(part: int) -> None:
    rows = list(outcomes(["node"], "canonicalize", part=slice(part, None, PARTS)))
    assert not failures(rows)
    assert max(Counter((row.case, row.variant) for row in rows).values()) == 1
    counts = summarize(rows)
    written, constant, half, _ = (counts[f"node, {name}"] for name in VARIANTS)
    for each in counts.values():
        assert each["cases"] >= 1800 // PARTS
        assert each["correct"] >= 0.85 * each["cases"]
        assert each["refused"] <= 0.01 * each["cases"]
    assert written["changed"] >= 0.15 * written["correct"]
    assert constant["changed"] >= 0.75 * constant["correct"]
    assert written["changed"] < half["changed"] < constant["changed"]


@pytest.mark.slow
def test_the_fx_backend_gives_what_onnx_expects() -> None:
    pytest.importorskip("torch")
    from bench.fx_nodes import rows_of
    from bench.fx_nodes import summarize as summarize_fx

    rows = list(rows_of(["node"]))
    failed = {row.operator.partition("::")[0] for row in rows if row.onnxruntime and not row.passed}
    strings = {"Equal", "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"}
    assert failed <= strings | {"MelWeightMatrix", "TfIdfVectorizer", "ai.onnx.ml"}
    counts = summarize_fx(rows)
    assert counts["cases"] >= 1800
    assert counts["passed"] >= 0.95 * counts["cases"]
    assert counts["passed_of_these"] >= 0.975 * counts["onnxruntime_passes"]


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
