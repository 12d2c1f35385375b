"""Gradients of lowered language models are those that transformers takes of its own models."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from bench.fx_gradients import FUSED, PIPELINES, Subject, compare, minilm, smollm2, wanted_gradients

import lwc
from lwc.core.module import Module

pytestmark = pytest.mark.models

COSINE, ERROR = 1 - 1e-7, 1e-5
"""float32 through a few layers, forward and back; seen: 2e-6."""


def assert_same(subject: Subject, pipelines: list[str], weights: int) -> None:
    wanted = wanted_gradients(subject)
    for pipeline in pipelines:
        found = compare(subject, wanted, PIPELINES[pipeline])
        assert len(found) == weights
        for weight in found:
            assert weight.cosine >= COSINE, (pipeline, weight)
            assert weight.error <= ERROR, (pipeline, weight)


@pytest.mark.slow
def test_smollm2() -> None:
    """Two layers; all thirty are `tools/bench/fx_gradients.py`."""
    subject = smollm2(2, 64)
    assert_same(subject, ["read", "packed"], 2 * 9 + 2)
    module = lwc.optimize(subject.module.clone(), FUSED, grant="all").module
    assert [node.op_type for node in module.graph].count("GroupQueryAttention") == 2


def test_minilm() -> None:
    assert_same(minilm(None, 16), ["read", "fused"], 6 * 16 + 5)


class Doubled(torch.nn.Module):  # type: ignore[misc]
    """A model beside which another gradient is the wanted one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x @ self.w * torch.tensor([1.0, 2.0]),)


def test_another_gradient_is_noticed(tiny: Module) -> None:
    subject = Subject(Doubled(), tiny, {"x": torch.ones(1, 2)}, torch.sum)
    (weight,) = compare(subject, wanted_gradients(subject), "")
    assert weight.cosine < 0.95
    assert weight.error == pytest.approx((2 / 10) ** 0.5)


def test_a_weight_that_is_not_there_is_named(tiny: Module) -> None:
    subject = Subject(Doubled(), tiny, {"x": torch.ones(1, 2)}, torch.sum)
    with torch.no_grad():
        subject.model.w.add_(1)
    with pytest.raises(SystemExit, match="no weight like 'w'"):
        compare(subject, {"w": torch.ones(2, 2)}, "")


@pytest.fixture
def tiny() -> Module:
    from support import module_of

    return module_of(
        "g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] v = {1, 2, 3, 4}> { y = MatMul(x, v) }"
    )
