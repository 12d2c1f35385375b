"""Choosing the feeds on which two modules are compared: extents of every kind, and edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lwc.calibration.feeds import Edge, FeedSpec, dim_names, make_feed
from lwc.calibration.inputs import RoleKind, fed_inputs, input_role
from lwc.calibration.trials import working_trials
from lwc.core.errors import LwcError

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Runner

__all__ = ["ChosenFeeds", "TestFeed", "choose_feeds", "is_small"]

Array = np.ndarray[Any, Any]

_SMALL = 256


@dataclass(frozen=True)
class TestFeed:
    """A feed to compare on.

    Attributes:
        arrays: The array of each input, by name.
        edge: How it is filled.
    """

    arrays: dict[str, Array]
    edge: Edge = "plain"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input."""
        return {name: np.shape(array) for name, array in self.arrays.items()}


ChosenFeeds: TypeAlias = list[tuple[TestFeed, dict[str, Array]]]
"""Feeds, with the outputs a module gives on them."""


def choose_feeds(
    module: Module,
    runner: Runner,
    bindings: Sequence[Mapping[str, int]] = (),
    *,
    seed: int = 0,
    spec: FeedSpec = FeedSpec(),  # noqa: B008
    edges: bool = True,
) -> ChosenFeeds:
    """Choose feeds the module runs on, with the outputs it gives.

    Args:
        module: The module.
        runner: Runs it.
        bindings: Extents of the free dimensions, one mapping per feed; found by trial by default.
        seed: Seed of the feeds.
        spec: What the user knows about the inputs.
        edges: Also feeds at the edges that concern the module's inputs. A small module is then
            run at extents of 1, odd, larger and mixed ones, integers of which the graph says
            nothing are any, and extents are found by trial only where it runs at none of these.

    Raises:
        LwcError: The module runs on none.
    """
    if edges and not bindings and is_small(module):
        planned = _planned_feeds(module, runner, seed, spec)
        if planned:
            return planned
    chosen = []
    wanted = _edges(module) if edges else []
    if bindings:
        for index, at in enumerate(bindings):
            arrays = make_feed(module, at, seed + index, spec=spec)
            chosen.append((TestFeed(arrays), dict(runner.run(arrays))))
        odd: Mapping[str, int] = bindings[min(1, len(bindings) - 1)]
    else:
        large = not is_small(module)
        first: Edge = "masked" if large and "masked" in wanted else "plain"
        trials = working_trials(module, runner, 3, seed, spec=spec, brief=large, first=first)
        chosen += [(TestFeed(trial.feed, trial.edge), trial.outputs) for trial in trials]
        odd = trials[min(1, len(trials) - 1)].extents
        wanted = [edge for edge in wanted if edge not in {trial.edge for trial in trials}]
    for edge in wanted:
        feed = TestFeed(make_feed(module, odd, seed + 1, spec=spec, edge=edge), edge)
        try:
            chosen.append((feed, dict(runner.run(feed.arrays))))
        except LwcError:
            continue  # an edge that the model refuses is none
    return chosen


_ODD, _LARGE = (3, 5, 7, 9, 11, 13), (4, 6, 8, 10, 12, 14)


def _planned_feeds(module: Module, runner: Runner, seed: int, spec: FeedSpec) -> ChosenFeeds:
    """Run a module at extents of every kind, each dimension with its own, and at every edge."""
    names = [name for name in dim_names(module) if name not in spec.dims]
    odd = dict(zip(names, _ODD * len(names), strict=False))
    large = dict(zip(names, _LARGE * len(names), strict=False))
    mixed = {name: 1 if index % 2 else odd[name] for index, name in enumerate(names)}
    any_integer = replace(spec, ranges={**_free_integers(module, spec, 9), **spec.ranges})
    large_integer = replace(spec, ranges={**_free_integers(module, spec, 300), **spec.ranges})
    plan: list[tuple[dict[str, int], FeedSpec, Edge]] = [
        (odd, any_integer, "plain"),
        (dict.fromkeys(names, 1), spec, "plain"),
        (large, spec, "masked"),
        (odd, any_integer, "zeros"),
        (odd, large_integer, "huge"),
        (large, any_integer, "tiny"),
    ]
    if len(names) > 1:
        plan.append((mixed, any_integer, "plain"))
    chosen: ChosenFeeds = []
    for index, (at, known, edge) in enumerate(plan):
        feed = TestFeed(make_feed(module, at, seed + index, spec=known, edge=edge), edge)
        try:
            chosen.append((feed, dict(runner.run(feed.arrays))))
        except LwcError:
            continue
    return chosen


def _free_integers(module: Module, spec: FeedSpec, size: int) -> dict[str, tuple[float, float]]:
    """Return a range for each integer input of which the graph says nothing."""
    found: dict[str, tuple[float, float]] = {}
    for value in fed_inputs(module):
        name = value.name or ""
        plain = value.dtype is not None and value.dtype.is_integer() and "mask" not in name
        if plain and name not in spec.masks and input_role(module, value).kind == RoleKind.MASK:
            assert value.dtype is not None
            limits = np.iinfo(value.dtype.numpy())
            found[name] = (max(limits.min, -size // 3), min(limits.max, size))
    return found


def _edges(module: Module) -> list[Edge]:
    """Return the edges that concern the inputs; of numbers only where the graph is small."""
    roles = {input_role(module, value).kind for value in fed_inputs(module)}
    edges: list[Edge] = ["masked"] if roles & {RoleKind.MASK, RoleKind.FLAG} else []
    if RoleKind.NUMBERS in roles and is_small(module):
        edges += ["zeros", "huge", "tiny"]
    return edges


def is_small(module: Module) -> bool:
    """Tell whether a graph is small enough to run in float64 too, and at every edge."""
    return sum(1 for _ in module.nodes()) <= _SMALL
