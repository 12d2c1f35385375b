"""Extents that a model runs at, found by trial, and feeds of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lwc.calibration.feeds import NO_SPEC, Array, Edge, FeedSpec, dim_names, make_feed
from lwc.core.errors import LwcError

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Runner

__all__ = ["Trial", "working_feeds", "working_trials"]

_UNNAMED = re.compile(r"(:|_d)\d+$")

_BATCHES = (2, 1, 3)
_BRIEF_LENGTHS = (5, 7, 1)
_LENGTHS = (16, 7, 1, 576, 640, 64, 128, 2048)
_PASTS = (8, 5, 0)
_SPATIAL = ((224, 224), (96, 160), (48, 320), (48, 192), (32, 320), (32, 128), (384, 384))
_TRIALS = 200


def working_feeds(
    module: Module,
    runner: Runner,
    count: int = 2,
    seed: int = 0,
    *,
    spec: FeedSpec = NO_SPEC,
) -> list[dict[str, Array]]:
    """Find feeds the model runs on, each at other extents of its free dimensions, by trial.

    A file's dimension names seldom tell everything: a network may want a height of 48, a state
    the batch of another input. Extents are tried from the usual to the rare; those that differ
    in every free dimension are preferred to those that differ in some.

    Args:
        module: The model.
        runner: Runs the model; what it refuses with an `LwcError` is no valid feed.
        count: Feeds wanted.
        seed: Seed of the random numbers; feed `i` has seed `seed + i`.
        spec: What the user knows about the inputs; its dimensions are not free.

    Returns:
        `count` feeds, or fewer where the model runs at fewer extents; one where all dimensions
        are fixed.

    Raises:
        LwcError: The model runs at none of the extents tried; the message is the first failure.
    """
    return [trial.feed for trial in working_trials(module, runner, count, seed, spec=spec)]


@dataclass(frozen=True)
class Trial:
    """A feed that a model ran on.

    Attributes:
        extents: Those of the free dimensions, by name.
        feed: The feed.
        outputs: What the model gave.
        edge: How the feed is filled.
    """

    extents: Mapping[str, int]
    feed: dict[str, Array]
    outputs: dict[str, Array]
    edge: Edge = "plain"


def working_trials(
    module: Module,
    runner: Runner,
    count: int = 2,
    seed: int = 0,
    *,
    spec: FeedSpec = NO_SPEC,
    brief: bool = False,
    first: Edge = "plain",
) -> list[Trial]:
    """Find feeds the model runs on, with what it gives on them; see `working_feeds`.

    Args:
        module: The model.
        runner: Runs the model.
        count: Feeds wanted.
        seed: Seed of the random numbers.
        spec: What the user knows about the inputs.
        brief: Try sequences of a few tokens first, on which a large model takes little time.
        first: How the first feed is filled, if the model runs on that.
    """
    free = {name: kind for name, kind in dim_names(module).items() if name not in spec.dims}
    chosen: list[Trial] = []
    spare: list[Trial] = []
    tried: list[dict[str, int]] = []
    failure: LwcError | None = None
    edge: Edge = first
    for extents in itertools.islice(_candidates(free, brief), _TRIALS):
        if len(chosen) == count:
            break
        if extents in tried:
            continue
        tried.append(extents)
        found = [trial.extents for trial in (*chosen, *spare)]
        clash = any(extents[name] == trial.extents[name] for trial in chosen for name in free)
        if clash and len(found) >= count:
            continue
        feed = make_feed(module, extents, seed + len(found), spec=spec, edge=edge)
        try:
            outputs = dict(runner.run(feed))
        except LwcError as error:
            failure, edge = failure or error, "plain"
            continue
        (spare if clash else chosen).append(Trial(extents, feed, outputs, edge))
        edge = "plain"
    if not chosen:
        raise LwcError(
            f"the model runs at none of the input shapes tried; the first failure: {failure}",
            file=module.source.path,
            remedy="give extents of its dimensions, or feeds in an .npz file",
        )
    return [*chosen, *spare][:count]


def _candidates(free: Mapping[str, str], brief: bool = False) -> Iterator[dict[str, int]]:
    """Yield extents to try, every dimension with its own first, then alike where kinds agree."""
    if not free:
        yield {}
        return
    doubtful = [name for name, kind in free.items() if kind == "length" and _UNNAMED.search(name)]
    for swaps in _subsets(doubtful):
        kinds = {name: "batch" if name in swaps else kind for name, kind in free.items()}
        present = set(kinds.values())
        known = (*_BRIEF_LENGTHS, *_LENGTHS) if brief else _LENGTHS
        lengths = known if "length" in present else (0,)
        spatial = _SPATIAL if "spatial" in present else ((0, 0),)
        pasts = _PASTS if "past" in present else (0,)
        batches = _BATCHES if "batch" in present else (0,)
        for apart in (True, False) if _repeats(kinds) else (False,):
            grid = list(enumerate(itertools.product(lengths, spatial)))
            # First those that differ in everything at once, then every batch with every length.
            turns = itertools.chain(
                ((0, each) for each in grid[: len(batches)]),
                ((turn, each) for each in grid for turn in range(len(batches))),
            )
            for turn, (index, (length, area)) in turns:
                base = {
                    "batch": batches[(index + turn) % len(batches)],
                    "length": length,
                    "past": pasts[index % len(pasts)],
                }
                yield _extents(kinds, base, area, apart)


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


def _repeats(kinds: Mapping[str, str]) -> bool:
    counted = [kind for kind in kinds.values() if kind in ("length", "past")]
    return len(counted) > len(set(counted))


def _extents(
    kinds: Mapping[str, str], base: Mapping[str, int], area: tuple[int, int], apart: bool
) -> dict[str, int]:
    seen: dict[str, int] = {}
    extents = {}
    for name, kind in kinds.items():
        place = seen.get(kind, 0)
        seen[kind] = place + 1
        if kind == "spatial":
            extents[name] = area[place % 2]
        else:
            step = 2 * place if apart and kind != "batch" else 0
            extents[name] = base[kind] + step
    return extents
