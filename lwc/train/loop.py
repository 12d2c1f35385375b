"""The training loop: AdamW over feeds in a seeded order, which a killed run can take up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from lwc.core.errors import PassError

if TYPE_CHECKING:
    from lwc.calibration.checkpoint import Trail
    from lwc.pipeline.passes import Progress

__all__ = ["Schedule", "train"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_KIND = "training"
_KEPT = 10
"""Into how many parts the steps are divided, after each of which the state is kept."""


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: Updates of the parameters.
        batch: Feeds whose gradients are averaged for each.
        learning_rate: The highest one: it rises linearly, then falls to 0 along half a cosine.
        warm_up: Share of the steps in which it rises.
        weight_decay: Of AdamW (Loshchilov and Hutter 2019).
        clip: Norm that gradients, all together, are scaled down to.
        seed: Seed of the order of feeds.
    """

    steps: int
    batch: int
    learning_rate: float
    warm_up: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def factor(self, step: int) -> float:
        """Return the share of the learning rate that an update has, counted from 0."""
        rising = max(1, round(self.warm_up * self.steps))
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return 0.5 * (1 + math.cos(math.pi * done))

    def feeds(self, step: int, count: int) -> list[int]:
        """Return the feeds of an update, out of `count`: each epoch has an order of its own."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [int(self._order(place // count, count)[place % count]) for place in places]

    def _order(self, epoch: int, count: int) -> Array:
        return np.random.default_rng([self.seed, epoch]).permutation(count)


def train(
    parameters: Mapping[str, torch.nn.Parameter],
    backward: Callable[[int, float], float],
    feeds: Sequence[int],
    schedule: Schedule,
    *,
    trail: Trail,
    progress: Progress,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> list[float]:
    """Train parameters in place; return the losses of the updates that were computed here.

    The state is kept in `trail` from time to time, and a run that finds one goes on from there: to
    the same last bit, since orders and learning rates are functions of the step.

    Args:
        parameters: What to train, by name.
        backward: Given the number of a feed and a factor, adds that much of the gradients to the
            parameters', and returns the loss.
        feeds: Numbers of the feeds, by which errors name them.
        schedule: How.
        trail: Keeps the state.
        progress: Shows the loss.
        masks: By name of a parameter: 0 where it must stay as it is, broadcast against it.

    Raises:
        PassError: A loss or a gradient is not finite; it names step and feed.
    """
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    start = _resume(parameters, optimizer, schedule, trail)
    for group in optimizer.param_groups:
        group["initial_lr"] = schedule.learning_rate
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor, start - 1)
    losses: list[float] = []

    def described() -> str:
        return f"training, loss {losses[-1]:.4g}" if losses else "training"

    for step in progress.track(range(start, schedule.steps), described):
        optimizer.zero_grad(set_to_none=True)
        chosen = [feeds[index] for index in schedule.feeds(step, len(feeds))]
        found = [backward(number, 1 / schedule.batch) for number in chosen]
        gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
        for name, mask in (masks or {}).items():
            if name in gradients:
                gradients[name].mul_(mask)
        norm = torch.nn.utils.get_total_norm(gradients.values())
        losses.append(sum(found) / len(found))
        if not (math.isfinite(losses[-1]) and torch.isfinite(norm)):
            bad = [at for at, loss in zip(chosen, found, strict=True) if not math.isfinite(loss)]
            what = "the loss" if bad else _odd_one(gradients)
            where = ", ".join(map(str, sorted({*(bad or chosen)})))
            raise PassError(
                f"{what} is no finite number at step {step + 1}, on feed {where} of the "
                "calibration data",
                remedy=f"lower learning-rate={schedule.learning_rate:g}, or look at the data"
                if step
                else "nothing was updated yet: look for a number that is not finite, or huge, in "
                "the feed, the model or its teacher",
            )
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), schedule.clip, norm)
        optimizer.step()
        scheduler.step()
        if step + 1 in _kept_steps(schedule.steps):
            _keep(parameters, optimizer, step + 1, schedule, trail)
    return losses


def _odd_one(gradients: Mapping[str, torch.Tensor]) -> str:
    """Name a gradient that is not finite, or all, where only their norm is not."""
    odd = [name for name, each in gradients.items() if not each.isfinite().all()]
    return f"the gradient by '{odd[0]}'" if odd else "the norm of all gradients"


def _kept_steps(steps: int) -> list[int]:
    """Return the steps after which the state is kept: some, and the last one."""
    return sorted({round(steps * part / _KEPT) for part in range(1, _KEPT + 1)} - {0})


def _keep(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    schedule: Schedule,
    trail: Trail,
) -> None:
    """Keep the state after a step, in the place of the one before."""
    entry = {}
    for number, parameter in enumerate(parameters.values()):
        entry[f"{number}"] = parameter.detach().numpy()
        for part, content in optimizer.state[parameter].items():
            entry[f"{number}.{part}"] = content.numpy()
    trail.put(_KIND, str(step), entry)
    earlier = [each for each in _kept_steps(schedule.steps) if each < step]
    if earlier:
        trail.drop(_KIND, str(earlier[-1]))


def _resume(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    trail: Trail,
) -> int:
    """Bring back the last state that was kept; return how many steps it took."""
    for step in reversed(_kept_steps(schedule.steps)):
        entry = trail.get(_KIND, str(step), step)
        if entry is None:
            continue
        state = {}
        for number, parameter in enumerate(parameters.values()):
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(entry[f"{number}"]))
            start = f"{number}."
            parts = {key.removeprefix(start): entry[key] for key in entry if key.startswith(start)}
            state[number] = {part: torch.from_numpy(array) for part, array in parts.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return step
    return 0
