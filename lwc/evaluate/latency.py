"""Latency: of one model, and of several against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lwc.backends.base import Executable
from lwc.evaluate.execution import ModelLike, executable
from lwc.pipeline.passes import Feed

__all__ = ["Latency", "LatencyComparison", "Spread", "compare_latency", "latency"]


@dataclass(frozen=True)
class Spread:
    """The middle and the tails of a set of figures."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Latency:
    """Seconds of one run.

    Attributes:
        median: Of the timed runs.
        p10: Tenth percentile.
        p90: Ninetieth percentile.
        first: The first run of all, before any warm-up.
        runs: How many runs were timed.
    """

    median: float
    p10: float
    p90: float
    first: float
    runs: int


@dataclass(frozen=True)
class LatencyComparison:
    """Latencies measured in turns.

    Attributes:
        latencies: Of each model, by name.
        ratios: Time of each model over the time of the first one in the same round: noise that
            lasts longer than a round falls out.
    """

    latencies: dict[str, Latency]
    ratios: dict[str, Spread]


def latency(
    model: ModelLike | Executable,
    feed: Feed,
    *,
    runs: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> Latency:
    """Time `runs` runs of `feed` after `warmup` untimed ones.

    Inputs and outputs stay in place between runs, so what is timed is the model and not the
    copying of arrays.

    Args:
        model: A path, a module or an executable; `first` is cold only if it has not run before.
        feed: The inputs.
        runs: Runs to time.
        warmup: Runs before those.
        threads: Threads of one operator, where the model is compiled here.
    """
    with executable(model, threads=threads) as compiled:
        call, first = _prepare(compiled, feed, warmup)
        return _summary([_timed(call) for _ in range(runs)], first)


def compare_latency(
    models: Mapping[str, tuple[Executable, Feed]], *, rounds: int = 20, repeats: int = 3
) -> LatencyComparison:
    """Time several executables in turns, so that a disturbance hits all of them alike.

    In each round every model runs once untimed, to fill the caches another one emptied, then
    `repeats` times; the fastest counts. The order turns by one each round.

    Args:
        models: Executables, each with its inputs, by name; ratios are over the first.
        rounds: Rounds.
        repeats: Timed runs of a model in a round.
    """
    prepared = {name: _prepare(model, feed, 2) for name, (model, feed) in models.items()}
    names = list(prepared)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            call, _ = prepared[name]
            call()
            times[name].append(min(_timed(call) for _ in range(repeats)))
    base = np.asarray(times[names[0]]) if names else np.empty(0)
    return LatencyComparison(
        {name: _summary(times[name], prepared[name][1]) for name in names},
        {name: _spread(np.asarray(times[name]) / base) for name in names},
    )


def _prepare(compiled: Executable, feed: Feed, warmup: int) -> tuple[Callable[[], None], float]:
    start = time.perf_counter()
    compiled.run(feed)
    first = time.perf_counter() - start
    call = compiled.bind(feed)
    for _ in range(warmup):
        call()
    return call, first


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _summary(times: list[float], first: float) -> Latency:
    spread = _spread(np.asarray(times))
    return Latency(spread.median, spread.p10, spread.p90, first, len(times))


def _spread(figures: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Spread:
    median, p10, p90 = np.percentile(figures, [50, 10, 90])
    return Spread(float(median), float(p10), float(p90))
