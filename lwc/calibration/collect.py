"""Running a model over calibration data and keeping statistics of its values."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.calibration.checkpoint import Trail, feeds_digest
from lwc.calibration.feeds import ReadFeed
from lwc.calibration.inputs import embedded_ids, misfit, wanted
from lwc.calibration.statistics import Statistic
from lwc.core.dims import evaluate
from lwc.core.errors import InputError, LwcError
from lwc.core.walk import runtime_values

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Feed, PassContext

__all__ = [
    "check_any",
    "check_finite",
    "check_rows",
    "checked_feeds",
    "collect",
    "has_rows",
    "on_feed",
    "place_of",
]


def collect(
    module: Module, wanted: Mapping[ir.Value, Sequence[Statistic]], ctx: PassContext
) -> int:
    """Run the calibration data of `ctx` through `module`, and update statistics of values.

    What is fetched from one run is held until the statistics took it. Where that is more than
    `ctx.max_memory`, values are dealt to several runs over the data, each within the bound; a
    single value that exceeds it has a run of its own. Statistics that the checkpoint of `ctx` holds
    are taken from there, without a run.

    Args:
        module: The model.
        wanted: Values of the main graph, and what is to be known of each.
        ctx: Gives the feeds, the runner, and the bound.

    Returns:
        The number of feeds.

    Raises:
        UsageError: There is no calibration data.
        PassError: There is no backend.
        InputError: The data has no feeds, one that does not fit the model's inputs, no rows for a
            value, or an activation that is not finite.
        LwcError: The backend cannot run a feed.
    """
    names = {value.name or "": statistics for value, statistics in wanted.items()}
    trail = Trail.begin(ctx, module, lambda: ctx.calibration_feeds(module))
    count = 0
    for group in _groups(module, list(names), ctx):
        # Also by what is fetched with it: that may change what the backend fuses.
        about = repr([(name, [_told(each) for each in names[name]]) for name in group])
        kept = trail.get("statistics", about, len(group))
        gathered = [statistic for name in group for statistic in names[name]]
        if kept is not None:
            count = int(kept["feeds"])
            for number, statistic in enumerate(gathered):
                parts = {part: kept[f"{number}.{part}"] for part in statistic.state()}
                statistic.restore(parts)
            continue
        count, seen = 0, set[str]()
        with ctx.runner(module, group) as runner:
            feeds = checked_feeds(module, ctx)
            for feed in ctx.progress.track(feeds, "calibrating"):
                count += 1
                with on_feed(count):
                    found = runner.run(feed, group)
                for name, array in found.items():
                    check_finite(array, name, count, module)
                    seen.update([name] if has_rows(array) else [])
                    for statistic in names[name]:
                        statistic.update(array)
        check_any(count, module)
        check_rows(group, seen, module)
        states = {
            f"{number}.{part}": array
            for number, statistic in enumerate(gathered)
            for part, array in statistic.state().items()
        }
        trail.put("statistics", about, {"feeds": np.asarray(count), **states})
    return count


def _told(statistic: Statistic) -> tuple[str, str]:
    """Return what tells a statistic from others: its kind, and what it has seen before."""
    return type(statistic).__qualname__, feeds_digest([statistic.state()])


@contextlib.contextmanager
def on_feed(count: int) -> Iterator[None]:
    """Name the feed, counted from 1, on which a backend fails.

    Raises:
        LwcError: What the backend raised.
    """
    try:
        yield
    except LwcError as error:
        error.message = f"feed {count} of the calibration data: {error.message}"
        raise


def check_finite(array: np.ndarray[Any, Any], name: str, feed: int, module: Module) -> None:
    """Check what a feed, counted from 1, gave for a value.

    Raises:
        InputError: Some of it is infinite or no number.
    """
    if not np.isfinite(array).all():
        raise InputError(
            f"value '{name}' is not finite on feed {feed} of the calibration data",
            file=module.source.path,
            remedy="look at the model's outputs on that feed",
        )


def checked_feeds(module: Module, ctx: PassContext) -> Iterator[Feed]:
    """Yield the calibration data.

    Raises:
        UsageError: There is none.
        InputError: A feed lacks an input, has something else, or an array that does not fit one, or
            a token id that its table does not hold.
    """
    inputs = {value.name or "": value for value in module.graph.inputs}
    ids = {name: embedded_ids(module, value) for name, value in inputs.items()}
    for count, feed in enumerate(ctx.calibration_feeds(module), 1):
        wrong, remedy = None, f"the inputs are {', '.join(inputs)}"
        for name in (*feed, *inputs):
            if name not in inputs:
                wrong = f"has '{name}', which is no input"
            elif name in feed:
                unfit = misfit(inputs[name], feed[name])
                if unfit is not None:
                    wrong = f"gives input '{name}' an array {unfit}"
                    remedy = f"feed {wanted(inputs[name])}"
                elif (odd := _odd_id(feed[name], ids[name])) is not None:
                    wrong = f"gives input '{name}' the id {odd}"
                    remedy = f"its ids are 0 to {(ids[name] or 0) - 1}, also where a mask is 0"
            elif inputs[name].const_value is None:
                wrong = f"lacks input '{name}'"
            if wrong is not None:
                file, what = place_of(feed, count, module)
                raise InputError(f"{what} {wrong}", file=file, remedy=remedy)
        yield feed


def place_of(feed: Feed, count: int, module: Module) -> tuple[str | None, str]:
    """Return a file and what in it a feed is, counted from 1; the model's where it was not read."""
    if isinstance(feed, ReadFeed):
        return str(feed.file), f"line {feed.line}" if feed.line else "it"
    return module.source.path, f"feed {count} of the calibration data"


def _odd_id(array: object, count: int | None) -> int | None:
    """Return one of the ids that are not within `[0, count)`, if there is one."""
    if count is None or not isinstance(array, np.ndarray):
        return None
    odd = array[(array < 0) | (array >= count)]
    return int(odd[0]) if odd.size else None


def has_rows(array: np.ndarray[Any, Any]) -> bool:
    """Tell whether an array has anything but a last axis of channels."""
    return 0 not in (array.shape[:-1] or array.shape)


def check_rows(names: Iterable[str], seen: Container[str], module: Module) -> None:
    """Check that all values had rows in some feed.

    Raises:
        InputError: One is not among those seen.
    """
    for name in names:
        if name not in seen:
            raise InputError(
                f"the calibration data holds no rows for value '{name}'",
                file=module.source.path,
                remedy="give feeds with at least one row",
            )


def check_any(feeds: int, module: Module) -> None:
    """Check that there are feeds.

    Raises:
        InputError: There are none.
    """
    if not feeds:
        raise InputError("the calibration data has no feeds", file=module.source.path)


def _groups(module: Module, names: list[str], ctx: PassContext) -> list[list[str]]:
    """Deal values to runs, each by its size on the feed where it is largest."""
    if ctx.max_memory is None or not names:
        return [names] if names else []
    shapes = ctx.analyses.get(Shapes)
    feeds = checked_feeds(module, ctx)
    extents = {frozenset(_extents(module, feed, shapes).items()) for feed in feeds}
    made = runtime_values(module.graph)
    sizes = {value.name: shapes.nbytes(value) for value in made if value.name in names}
    groups: list[list[str]] = []
    held = 0
    for name in names:
        size = ctx.max_memory  # where it is not known, the value has a run of its own
        with contextlib.suppress(KeyError):
            dim = sizes[name]
            if dim is not None:
                size = max((evaluate(dim, dict(each)) for each in extents), default=0)
        if not groups or held + size > ctx.max_memory:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _extents(module: Module, feed: Feed, shapes: Shapes) -> dict[str, int]:
    """Return what the symbolic dimensions of the inputs are in a feed."""
    found: dict[str, int] = {}
    for value in module.graph.inputs:
        shape = shapes.shape(value)
        array = feed.get(value.name or "")
        if array is not None and shape is not None:
            pairs = zip(shape, array.shape, strict=False)
            found |= {str(dim): extent for dim, extent in pairs if not isinstance(dim, int)}
    return found
