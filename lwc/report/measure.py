"""Fills a report with measurements: both models run side by side on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lwc.backends.base import Backend
from lwc.calibration.feeds import fixed_dims, make_feed, usual_extents
from lwc.calibration.text import id_input, load_tokenizer, read_text, text_feeds
from lwc.core.errors import InputError
from lwc.evaluate import latency as timing
from lwc.evaluate.agreement import Agreement, agreement
from lwc.evaluate.memory import peak_memory
from lwc.evaluate.perplexity import perplexity
from lwc.pipeline.passes import Feed
from lwc.report.build import Predict, onnx_file
from lwc.report.data import LatencyComparison, ModelEntry, Quality, Report
from lwc.verify.numeric.running import fitted

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["MeasureSettings", "check_text", "measure", "predictor", "settle_shape"]

_AGREEMENT_WINDOWS = 2


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure.

    Attributes:
        shapes: Numbers for the free dimensions of the model that went in, one set per timing.
        threads: Threads of the runtime.
        rounds: Interleaved rounds of each timing.
        text: A text to measure perplexity on, or None.
        tokenizer: The tokenizer of that text, as `lwc.calibration.text.load_tokenizer` takes it.
        max_tokens: Tokens of the text to use.
        window: Tokens of a perplexity window; windows do not overlap.
    """

    shapes: Sequence[Mapping[str, int]] = ()
    threads: int = 1
    rounds: int = 20
    text: Path | None = None
    tokenizer: Path | None = None
    max_tokens: int = 4097
    window: int = 512


def measure(
    report: Report,
    before: Module,
    after: Module,
    settings: MeasureSettings,
    *,
    backend: Backend,
    predict: Predict | None = None,
) -> Report:
    """Return `report` with latency, memory, agreement and perplexity of the two models.

    Args:
        report: What the passes did.
        before: The model that went in.
        after: The model that came out.
        settings: What to measure.
        backend: What runs both models.
        predict: Predicts the seconds of a model under bindings, or None.

    Raises:
        LwcError: A model does not run at one of the shapes.
    """
    fit = partial(fitted, module=after)
    latency, quality = [], list(report.quality)
    feeds = [make_feed(before, shape) for shape in settings.shapes]
    for shape, feed in zip(settings.shapes, feeds, strict=True):
        with (
            backend.compile(before, threads=settings.threads) as first,
            backend.compile(after, threads=settings.threads) as second,
        ):
            timed = timing.compare_latency(
                {"before": (first, feed), "after": (second, fit(feed))}, rounds=settings.rounds
            )
            if settings.text is None:
                where = " ".join(f"{name}={number}" for name, number in shape.items())
                agreed = agreement(first, second, [feed], fit=fit)
                quality += _agreement(agreed, f"one random feed{where and ', '}{where}")
        latency.append(
            LatencyComparison(
                bindings=dict(shape),
                threads=settings.threads,
                rounds=settings.rounds,
                before=_spread(timed.latencies["before"]),
                after=_spread(timed.latencies["after"]),
                ratio=_spread(timed.ratios["after"]),
                predicted_before=predict(before, shape) if predict else None,
                predicted_after=predict(after, shape) if predict else None,
            )
        )
    if settings.text is not None:
        quality.append(_perplexity(before, after, settings, backend))
        pieces = itertools.islice(_text_feeds(before, settings), _AGREEMENT_WINDOWS)
        agreed = agreement(before, after, pieces, threads=settings.threads, fit=fit)
        detail = f"the first {_AGREEMENT_WINDOWS} windows of {settings.window} tokens"
        quality += _agreement(agreed, detail)
    source = report.input
    if source.path is None or not _is_same_file(source.path, report.output.path):
        source = _with_memory(source, feeds[:1], settings.threads)
    return dataclasses.replace(
        report,
        latency=latency,
        quality=quality,
        input=source,
        output=_with_memory(report.output, [fit(feed) for feed in feeds[:1]], settings.threads),
    )


def check_text(module: Module, text: str, tokenizer: str | None) -> None:
    """Check before any work that perplexity can be measured.

    Raises:
        LwcError: The text or the tokenizer cannot be read, or the model takes no token ids.
    """
    read_text(text)
    id_input(module)
    load_tokenizer(tokenizer or module.source.path or "")


def settle_shape(before: Module, after: Module, shape: Mapping[str, int]) -> dict[str, int]:
    """Give every free dimension of the model that went in a number to measure both models at.

    Args:
        before: The model that went in.
        after: The model that came out; dimensions it fixed have the extents it needs.
        shape: Wished extents, by dimension name; others get a usual one (see `make_feed`).

    Raises:
        InputError: A name is unknown, or `after` needs another extent.
    """
    usual, fixed = usual_extents(before), fixed_dims(before, after)
    for name, extent in shape.items():
        if name not in usual:
            raise InputError(
                f"no input has a dimension '{name}' to measure at",
                file=before.source.path,
                remedy=f"the dimensions are {', '.join(usual) or 'all fixed'}",
            )
        if fixed.get(name, extent) != extent:
            raise InputError(
                f"dimension '{name}' is {fixed[name]} after the passes: it cannot be measured "
                f"at {extent}",
                file=before.source.path,
            )
    return {**usual, **fixed, **shape}


def predictor(threads: int = 1) -> Predict:
    """Return a function that predicts the seconds of a run on ONNX Runtime on this machine.

    The machine is measured on first use and the result kept in the cache folder. What is
    predicted is the graph that ONNX Runtime runs after its own fusions.
    """
    from lwc.analysis.cost import Cost
    from lwc.analysis.manager import AnalysisManager
    from lwc.analysis.predict import predict
    from lwc.backends.onnxruntime.measure import load_or_measure
    from lwc.backends.onnxruntime.optimized import optimized_module

    target = load_or_measure(threads)
    costs: dict[int, tuple[Module, Cost]] = {}

    def seconds(module: Module, bindings: Mapping[str, int]) -> float:
        if id(module) not in costs:
            run = optimized_module(module, threads=threads)
            costs[id(module)] = (module, AnalysisManager(run).get(Cost))
        return predict(costs[id(module)][1], target, bindings).seconds

    return seconds


def _agreement(agreed: Agreement, detail: str) -> list[Quality]:
    found = []
    for name, output in agreed.outputs.items():
        measured = {
            "cosine": output.cosine,
            "top-1 agreement": output.top1,
            "max abs error": output.max_error,
            "differing NaN, infinite or text elements": output.nonfinite or None,
        }
        found += [
            Quality(metric, None, value, f"output {name}, {detail}")
            for metric, value in measured.items()
            if value is not None
        ]
    return found


def _text_feeds(module: Module, settings: MeasureSettings) -> Iterator[Feed]:
    assert settings.text is not None
    return text_feeds(
        module,
        _tokenizer(module, settings),
        read_text(settings.text),
        window=settings.window,
    )


def _tokenizer(module: Module, settings: MeasureSettings) -> Path:
    return settings.tokenizer or Path(module.source.path or "")


def _spread(timed: timing.Latency | timing.Spread) -> timing.Spread:
    return timing.Spread(timed.median, timed.p10, timed.p90)


def _perplexity(
    before: Module, after: Module, settings: MeasureSettings, backend: Backend
) -> Quality:
    assert settings.text is not None
    text = read_text(settings.text)
    tokenizer = _tokenizer(before, settings)
    one, two = (
        perplexity(
            model,
            tokenizer,
            text,
            window=settings.window,
            stride=settings.window,
            max_tokens=settings.max_tokens,
            threads=settings.threads,
            backend=backend,
        )
        for model in (before, after)
    )
    ratio = two.over(one)
    detail = (
        f"{settings.text.name}, {one.tokens} tokens, windows of {settings.window} without overlap; "
        f"after / before {ratio.ratio:.4f} ± {ratio.standard_error:.4f}"
    )
    return Quality("perplexity", one.value, two.value, detail)


def _is_same_file(first: str, second: str | None) -> bool:
    return second is not None and os.path.exists(second) and os.path.samefile(first, second)


def _with_memory(entry: ModelEntry, feeds: Sequence[Feed], threads: int) -> ModelEntry:
    file = None if entry.path is None else onnx_file(Path(entry.path))
    if file is None or not feeds:
        return entry
    peak = peak_memory(file, feeds, threads=threads).peak
    return dataclasses.replace(entry, peak_rss_bytes=peak)
