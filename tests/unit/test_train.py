"""The training loop, and what it makes of two divergences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.calibration.checkpoint import CheckpointFolder, Trail
from lwc.core.errors import PassError
from lwc.pipeline.passes import PassContext
from lwc.train.loop import Schedule, train
from lwc.train.losses import kl_divergence, reverse_kl_divergence

SILENT = PassContext(
    AnalysisManager(module_of("g (float[1] x) => (float[1] y) { y = Tanh(x) }"))
).progress
NOTHING = Trail(None, "", lambda _: None)


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    distance=st.floats(2.0, 3.0),
    side=st.sampled_from([-1, 1]),
    seed=st.integers(0, 1000),
)
def test_forward_kl_covers_both_modes_and_reverse_kl_picks_one(
    distance: float, side: int, seed: int
) -> None:
    """The best single bell for a teacher of two: wide across both, or narrow on one of them."""
    places = torch.linspace(-10, 10, 201, dtype=torch.float64)
    bells = [-((places - mode) ** 2) / (2 * 0.5**2) for mode in (-distance, distance)]
    teacher = torch.logsumexp(torch.stack(bells), 0)
    found = {}
    for loss in (kl_divergence, reverse_kl_divergence):
        start = 0.5 * side * distance + 0.1 * np.random.default_rng(seed).normal()
        centre = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
        spread = torch.nn.Parameter(torch.tensor([-0.7], dtype=torch.float64))

        def backward(_: int, factor: float, loss: Any = loss, own: Any = (centre, spread)) -> float:
            student = -((places - own[0]) ** 2) / (2 * own[1].exp() ** 2)
            value = loss(teacher, student)
            (value * factor).backward()
            return float(value.detach())

        schedule = Schedule(steps=150, batch=1, learning_rate=0.08, clip=10.0)
        train(
            {"centre": centre, "spread": spread}, backward, [1], schedule,
            trail=NOTHING, progress=SILENT,
        )  # fmt: skip
        found[loss.__name__] = (float(centre.detach()), float(spread.detach().exp()))
    centre_, spread_ = found["kl_divergence"]
    # The moments of both bells together: mean 0, variance distance² + 0.25.
    assert abs(centre_) < 0.15 * distance
    assert spread_ == pytest.approx((distance**2 + 0.25) ** 0.5, rel=0.1)
    centre_, spread_ = found["reverse_kl_divergence"]
    assert centre_ == pytest.approx(side * distance, rel=0.1)
    assert spread_ == pytest.approx(0.5, rel=0.2)


def test_schedule_rises_falls_and_draws_every_feed_once_an_epoch() -> None:
    schedule = Schedule(steps=20, batch=3, learning_rate=1.0, seed=3)
    factors = [schedule.factor(step) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 0.02
    seen = [feed for step in range(20) for feed in schedule.feeds(step, 6)]
    epochs = [seen[start : start + 6] for start in range(0, 60, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert seen == [feed for step in range(20) for feed in schedule.feeds(step, 6)]
    other = replace(schedule, seed=4)
    assert epochs[0] != [feed for step in range(2) for feed in other.feeds(step, 6)]
    assert Schedule(1, 1, 1.0).factor(0) == 1


def problem(
    start: Any = None, size: float = 1.0
) -> tuple[dict[str, torch.nn.Parameter], Callable[[int, float], float]]:
    """Least squares of eight feeds, times a size."""
    x, wanted = drawn(8, 5, 3), drawn(8, 5, 2, seed=1)
    weight = torch.nn.Parameter(drawn(3, 2, seed=2) if start is None else start)

    def backward(index: int, factor: float) -> float:
        loss = (x[index] @ weight - wanted[index]).square().mean() * size
        (loss * factor).backward()
        return float(loss.detach())

    return {"weight": weight}, backward


@pytest.mark.parametrize(("size", "clip"), [(1.0, 1.0), (1e-8, 1.0), (1.0, 1e-8)])
def test_a_step_is_that_of_adamw_on_the_mean_gradient(size: float, clip: float) -> None:
    """AdamW divides by the gradient's own size, unless that is as small as its epsilon."""
    start, rate, decay, epsilon = drawn(3, 2, seed=2), 0.1, 0.1, 1e-8
    mask = torch.tensor([[1.0], [0.0], [1.0]])
    parameters, backward = problem(start.clone(), size)
    losses = train(
        parameters, backward, range(8), Schedule(1, 8, rate, weight_decay=decay, clip=clip),
        trail=NOTHING, progress=SILENT, masks={"weight": mask},
    )  # fmt: skip
    twin, backward = problem(start.clone(), size)
    each = [backward(index, 1.0) for index in range(8)]
    assert losses == [pytest.approx(sum(each) / 8)]
    gradient = twin["weight"].grad
    assert gradient is not None
    mean = gradient / 8 * mask
    # PyTorch divides by the norm and 1e-6.
    mean = mean * min(1.0, clip / (float(mean.norm()) + 1e-6))
    wanted = start - rate * decay * start - rate * mean / (mean.abs() + epsilon)
    torch.testing.assert_close(parameters["weight"].detach(), wanted, rtol=1e-12, atol=1e-12)


def test_each_step_has_its_own_learning_rate() -> None:
    """Of a gradient that never changes AdamW makes steps of the learning rate."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    schedule, seen = Schedule(20, 1, 0.1), []

    def backward(_: int, factor: float) -> float:
        seen.append(weight.item())
        (weight.sum() * factor).backward()
        return float(weight.item())

    train({"w": weight}, backward, [1], schedule, trail=NOTHING, progress=SILENT)
    steps = -np.diff([*seen, weight.item()])
    # Its epsilon makes them smaller by 1e-8.
    np.testing.assert_allclose(steps, [0.1 * schedule.factor(n) for n in range(20)], rtol=2e-8)


def test_masked_entries_stay() -> None:
    start = drawn(3, 2, seed=2)
    mask = torch.tensor([[1.0], [0.0], [1.0]])
    parameters, backward = problem(start.clone())
    losses = train(
        parameters, backward, range(8), Schedule(30, 2, 0.1),
        trail=NOTHING, progress=SILENT, masks={"weight": mask},
    )  # fmt: skip
    assert torch.equal(parameters["weight"][1], start[1])
    assert not torch.any(parameters["weight"][0] == start[0])
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize("killed", [1, 7, 19, 20])
def test_killed_and_resumed_it_ends_at_the_same_bits(killed: int, tmp_path: Path) -> None:
    schedule = Schedule(20, 3, 0.05, weight_decay=0.01)
    whole, backward = problem()
    train(whole, backward, range(8), schedule, trail=NOTHING, progress=SILENT)

    class Killed(BaseException):
        pass

    def trail() -> Trail:
        return Trail(CheckpointFolder(tmp_path / "kept"), "state", lambda _: None)

    parameters, plain = problem()
    calls = 0

    def dying(index: int, factor: float) -> float:
        nonlocal calls
        calls += 1
        if calls > 3 * killed:
            raise Killed
        return plain(index, factor)

    if killed < 20:
        with pytest.raises(Killed):
            train(parameters, dying, range(8), schedule, trail=trail(), progress=SILENT)
    else:
        train(parameters, plain, range(8), schedule, trail=trail(), progress=SILENT)
    # Kept after every second step, each time in the place of the one before.
    assert len(list((tmp_path / "kept").iterdir())) == min(1, killed // 2)
    again, backward = problem()
    losses = train(again, backward, range(8), schedule, trail=trail(), progress=SILENT)
    assert len(losses) == 20 - killed // 2 * 2
    assert torch.equal(again["weight"], whole["weight"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_an_error_that_names_the_step(where: str) -> None:
    parameters, plain = problem()
    parameters = {"other": torch.nn.Parameter(torch.ones(2)), **parameters}
    calls = 0

    def backward(index: int, factor: float) -> float:
        nonlocal calls
        calls += 1
        loss = plain(index, factor)
        parameters["other"].grad = torch.ones(2)
        if calls == 4 and where == "gradient":
            gradient = parameters["weight"].grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        return float("nan") if calls == 4 and where == "loss" else loss

    schedule = Schedule(5, 2, 0.1)
    seen = schedule.feeds(1, 8)  # one of them is the feed in which a loss is not finite
    words = "the loss" if where == "loss" else "the gradient by 'weight'"
    told = f"feed {seen[1] if where == 'loss' else ', '.join(map(str, sorted(seen)))} of"
    with pytest.raises(
        PassError, match=f"{words} is no finite number at step 2, on {told}.*learning-rate"
    ):
        train(parameters, backward, range(8), schedule, trail=NOTHING, progress=SILENT)


def test_before_any_update_no_learning_rate_is_to_blame() -> None:
    parameters, plain = problem()

    def backward(number: int, factor: float) -> float:
        return plain(number - 10, factor) * float("inf")

    (first,) = Schedule(5, 1, 0.1).feeds(0, 8)
    told = f"the loss is no finite number at step 1, on feed {first + 10} of"
    with pytest.raises(PassError, match=told) as caught:
        train(parameters, backward, range(10, 18), Schedule(5, 1, 0.1), trail=NOTHING,
              progress=SILENT)  # fmt: skip
    assert "nothing was updated yet" in str(caught.value)
    assert "learning-rate" not in str(caught.value)
