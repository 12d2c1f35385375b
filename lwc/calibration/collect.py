"""Running a model over calibration data and keeping statistics of its values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.calibration.statistics import Statistic
from lwc.core.dims import evaluate
from lwc.core.errors import InputError

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["check_any", "check_finite", "collect"]


def collect(
    module: Module, wanted: Mapping[ir.Value, Sequence[Statistic]], ctx: PassContext
) -> int:
    """Run the calibration data of `ctx` through `module`, and update statistics of values.

    What is fetched from one run is held until the statistics took it. Where that is more than
    `ctx.max_memory`, values are dealt to several runs over the data, each within the bound; a
    single value that exceeds it has a run of its own.

    Args:
        module: The model.
        wanted: Values of the main graph, and what is to be known of each.
        ctx: Gives the feeds, the runner, and the bound.

    Returns:
        The number of feeds.

    Raises:
        PassError: There is no calibration data, or no backend.
        InputError: The data has no feeds, or an activation that is not finite.
        LwcError: A feed does not fit the model.
    """
    names = {value.name or "": statistics for value, statistics in wanted.items()}
    count = 0
    for group in _groups(module, list(names), ctx):
        count = 0
        with ctx.runner(module, group) as runner:
            feeds = ctx.calibration_feeds(module)
            for feed in ctx.progress.track(feeds, "calibrating"):
                count += 1
                for name, array in runner.run(feed, group).items():
                    check_finite(array, name, count, module)
                    for statistic in names[name]:
                        statistic.update(array)
        check_any(count, module)
    return count


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


def check_any(feeds: int, module: Module) -> None:
    """Check that there are feeds.

    Raises:
        InputError: There are none.
    """
    if not feeds:
        raise InputError("the calibration data has no feeds", file=module.source.path)


def _groups(module: Module, names: list[str], ctx: PassContext) -> list[list[str]]:
    """Deal values to runs, by their sizes at the extents of the first feed."""
    if ctx.max_memory is None:
        return [names] if names else []
    feed = next(iter(ctx.calibration_feeds(module)), {})
    shapes = ctx.analyses.get(Shapes)
    extents: dict[str, int] = {}
    for value in module.graph.inputs:
        shape = shapes.shape(value)
        array = feed.get(value.name or "")
        if array is not None and shape is not None:
            pairs = zip(shape, array.shape, strict=False)
            extents |= {str(dim): extent for dim, extent in pairs if not isinstance(dim, int)}
    sizes = {value.name: shapes.nbytes(value) for value in _values(module) if value.name in names}
    groups: list[list[str]] = []
    held = 0
    for name in names:
        size = ctx.max_memory  # where it is not known, the value has a run of its own
        with contextlib.suppress(KeyError):
            dim = sizes[name]
            size = size if dim is None else evaluate(dim, extents)
        if not groups or held + size > ctx.max_memory:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _values(module: Module) -> Iterator[ir.Value]:
    yield from module.graph.inputs
    for node in module.graph:
        yield from node.outputs
