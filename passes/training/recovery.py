"""How `recover` trains: on a copy, which the module becomes where the held-out loss fell."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.analysis.manager import AnalysisManager
from lwc.calibration.checkpoint import Trail, module_digest
from lwc.calibration.collect import checked_feeds, on_feed, place_of
from lwc.calibration.stages import filed
from lwc.core.errors import InputError, PassError
from lwc.core.text import size
from lwc.passes.training.low_rank import find_adapters
from lwc.passes.training.merging import merge
from lwc.passes.training.trainable import Trainable, adapters_to_train, weights_to_train
from lwc.pipeline.passes import PassResult
from lwc.rewrite import RewriteLimit
from lwc.train.lesson import Lesson, check_teacher
from lwc.train.objective import Objective, choose_objective, predicts_next, text_model

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.passes.training.recover import Recover
    from lwc.pipeline.passes import Feed, PassContext, Runner

__all__ = ["recover"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_RATES = {"lora": 1e-3, "full": 1e-5}

_LARGEST = 700.0
"""Loss from which a perplexity leaves the range of floats, or nearly."""

_CLOSE = 1e-3
"""Relative difference of outputs up to which a teacher has nothing to teach."""

_DIVERGED = 2
"""Multiple of the loss before which training and held-out loss both reach where training diverged:
where it learned the feeds by heart the first is low."""

_TOLD = 5
"""Feeds that a remark names at most."""


def recover(module: Module, ctx: PassContext, options: Recover) -> PassResult:
    """Train a module; see `Recover`.

    Raises:
        UsageError: There is no calibration data.
        PassError: There is nothing to train or nothing to train it on, or a loss is not finite.
        InputError: The data has fewer than two feeds, or one that does not fit.
        MissingExtraError: PyTorch is not installed.
    """
    if ctx.limit.exhausted:
        return PassResult(changed=False)
    begun = time.perf_counter()
    feeds = _feeds(module, ctx)
    twin = module.clone()
    # What becomes of the copy is one rewrite of the module, or none.
    inner = dataclasses.replace(ctx, analyses=AnalysisManager(twin), limit=RewriteLimit())
    chosen = _chosen(twin, inner, options)
    with _lesson(module, ctx, options, feeds) as (lesson, teacher):
        trained, held = _divided(module, ctx, feeds, lesson.objective, options.held_out)
        facts = () if ctx.checkpoint is None else _facts(ctx, teacher)
        told = [*trained.values(), *held.values()]
        trail = Trail.begin(ctx, module, lambda: told, *facts)
        before, after, ended = _train(
            twin, chosen, lesson, inner, options, trained=trained, held=held, trail=trail
        )
    statistics: dict[str, int | float | str] = {
        "held-out loss before": before,
        "held-out loss after": after,
        "loss": lesson.objective.told,
        "steps": options.steps,
        "trained parameters": sum(_size(each) for each in chosen),
        "feeds trained on": len(trained),
        "feeds held out": len(held),
    }
    if lesson.objective.weight == 0:
        statistics["held-out perplexity before"] = _perplexity(before)
        statistics["held-out perplexity after"] = _perplexity(after)
    statistics["seconds"] = time.perf_counter() - begun
    improved = after < before
    for remark in twin.remarks:
        if improved or remark.kind != "applied":
            module.remarks.emit(remark)
    if not improved:
        ctx.missed(_worse(before, after, ended, _rate(options)))
        return PassResult(changed=False, statistics=statistics)
    ctx.limit.spend("recover")
    ctx.applied(f"trained, held-out loss {before:.4g} to {after:.4g}", rule="recover")
    said = len(twin.remarks)
    if options.merge and options.method == "lora":
        inner.analyses.invalidate()
        statistics["adapters merged"] = sum(merge(twin, inner).values())
    for remark in twin.remarks.since(said):
        module.remarks.emit(remark)
    module.adopt(twin)
    ctx.analyses.invalidate()
    return PassResult(changed=True, statistics=statistics)


def _train(
    twin: Module,
    chosen: Sequence[Trainable],
    lesson: Lesson,
    ctx: PassContext,
    options: Recover,
    *,
    trained: Mapping[int, Feed],
    held: Mapping[int, Feed],
    trail: Trail,
) -> tuple[float, float, float | None]:
    """Train the copy. Feeds are given by number.

    Returns:
        The held-out loss before and after, and the training loss of the last tenth of the steps.
    """
    names = [each.value.name or "" for each in chosen]
    with ctx.gradient_runner(twin, weights=names) as runner:
        # PyTorch is there: else there would be no runner.
        import torch

        from lwc.train.loop import Schedule, train

        counts = [lesson.objective.positions(feed) for feed in held.values()]

        def judged(when: str) -> float:
            losses = []
            for number, feed in ctx.progress.track(held.items(), f"held-out loss {when}"):
                with on_feed(number):
                    losses.append(runner.loss(feed, lesson.loss(feed)))
                    if when == "before" and not math.isfinite(losses[-1]):
                        raise PassError(
                            f"the held-out loss is {losses[-1]} before any training",
                            file=twin.source.path,
                            remedy="look for a number that is not finite in the model, its teacher "
                            "or the feed",
                        )
            return float(np.average(losses, weights=counts))

        def backward(number: int, factor: float) -> float:
            feed = trained[number]
            with on_feed(number):
                return runner.backward(feed, lesson.loss(feed), factor)

        before = judged("before")
        masks = {
            name: torch.from_numpy(each.mask)
            for name, each in zip(names, chosen, strict=True)
            if each.mask is not None
        }
        with torch.no_grad():  # not before: the loss before is that of the module as it was given
            for name, mask in masks.items():
                runner.parameters[name].masked_fill_(~mask, 0)
        losses = train(
            runner.parameters,
            backward,
            list(trained),
            Schedule(options.steps, options.batch, _rate(options), seed=ctx.seed),
            trail=trail,
            progress=ctx.progress,
            masks=masks,
        )
        after = judged("after")
        if ctx.max_memory is not None and runner.kept > ctx.max_memory:
            ctx.warn(
                f"activations take {size(runner.kept)} in the backward pass, although max-memory "
                f"is {size(ctx.max_memory)}: {runner.segments} segments are the fewest bytes"
            )
        sharing: dict[int, list[ir.Value]] = {}
        for graph in twin.graphs():
            for value in graph.initializers.values():
                sharing.setdefault(id(value.const_value), []).append(value)
        for name, each in zip(names, chosen, strict=True):
            array = runner.parameters[name].detach().numpy()
            tensor = twin.spilled(ir.Tensor(np.array(array)))
            for value in sharing[id(each.value.const_value)]:
                twin.replace_initializer(value, tensor)
    last = losses[-max(1, options.steps // 10) :]
    # Where all steps were taken by a run before this one, no loss is known.
    return before, after, sum(last) / len(last) if last else None


def _rate(options: Recover) -> float:
    return options.learning_rate or _RATES[options.method]


def _worse(before: float, after: float, ended: float | None, rate: float) -> str:
    """Tell that the held-out loss did not fall, and what may help."""
    idle = before <= _CLOSE**2
    # So written, a loss that is no number counts as diverged.
    lowest = after if ended is None else min(after, ended)
    diverged = not (idle or lowest <= _DIVERGED * before)
    if idle:
        remedy = "there was nothing to learn: see whether teacher= is the right file"
    elif diverged:
        remedy = f"lower learning-rate={rate:g}"
    else:
        remedy = f"give more data, or other steps and learning-rate than {rate:g}"
    where = "" if ended is None else f", where the training loss ended at {ended:.4g}"
    return (
        f"the held-out loss did not fall{', as training diverged' if diverged else ''}: "
        f"{before:.4g} before, {after:.4g} after{where}; the module stays as it is ({remedy})"
    )


def _perplexity(loss: float) -> float:
    return math.inf if loss > _LARGEST else math.exp(loss)


def _facts(ctx: PassContext, teacher: Module | None) -> tuple[object, ...]:
    """Return what the last bits rest on besides model, data, options and backend."""
    import torch

    told = None if teacher is None else module_digest(teacher)
    return ("recover", ctx.seed, ctx.max_memory, told, version("torch"), torch.get_num_threads())


# Data and what is trained


def _feeds(module: Module, ctx: PassContext) -> dict[int, Feed]:
    """Return the feeds by their numbers, counted from 1."""
    put = filed if ctx.max_memory is not None else np.asarray
    feeds: dict[int, Feed] = {}
    empty = []
    for number, feed in enumerate(checked_feeds(module, ctx), 1):
        _check_numbers(module, number, feed)
        if any(np.ndim(array) > 1 and not len(array) for array in feed.values()):
            empty.append(number)
        else:
            feeds[number] = {name: put(array) for name, array in feed.items()}
    if empty:
        ctx.warn(
            f"{len(empty)} of {len(feeds) + len(empty)} feeds are left out: they have no rows "
            f"(feed {', '.join(map(str, empty[:_TOLD]))}{', …' if len(empty) > _TOLD else ''})"
        )
    _enough(feeds, module)
    return feeds


def _check_numbers(module: Module, number: int, feed: Feed) -> None:
    """Check that a feed has no NaN; infinity may stand in a mask."""
    for value in module.graph.inputs:
        array = feed.get(value.name or "")
        if array is None or value.dtype is None or not value.dtype.is_floating_point():
            continue
        if np.isnan(array).any():
            file, what = place_of(feed, number, module)
            raise InputError(
                f"{what} gives input '{value.name}' a NaN",
                file=file,
                remedy="leave that feed out, or look at where it comes from",
            )


def _enough(feeds: Sized, module: Module) -> None:
    if len(feeds) < 2:
        raise InputError(
            f"training takes two feeds or more, of which some are held out, not {len(feeds)}",
            file=module.source.path,
            remedy="give more data, or cut a text into shorter windows",
        )


def _divided(
    module: Module,
    ctx: PassContext,
    feeds: Mapping[int, Feed],
    objective: Objective,
    share: float,
) -> tuple[dict[int, Feed], dict[int, Feed]]:
    """Return the feeds to train on and those to judge by."""
    told = [(number, feed) for number, feed in feeds.items() if objective.positions(feed)]
    if len(told) < len(feeds):
        ctx.warn(
            f"{len(feeds) - len(told)} of {len(feeds)} feeds are left out: they have one token, "
            "after which none follows, or nothing but padding"
        )
    _enough(told, module)
    held = min(len(told) - 1, max(1, round(share * len(told))))
    return dict(told[:-held]), dict(told[-held:])


def _chosen(twin: Module, ctx: PassContext, options: Recover) -> list[Trainable]:
    if options.method == "full":
        chosen = weights_to_train(twin, ctx, options.keep_zeros)
        if options.keep_zeros and any(find_adapters(ctx.editor())):
            ctx.warn(
                "its adapters are trained as weights of their own: merged, they fill zeros of the "
                "weights beside them (run merge-lora first)"
            )
    else:
        chosen = adapters_to_train(
            twin,
            ctx,
            rank=options.rank,
            alpha=options.alpha,
            layers=options.layers,
            keep_zeros=options.keep_zeros,
        )
    if not chosen:
        why = [each.message for each in twin.remarks if each.kind in ("missed", "warning")]
        full = options.method == "full"
        raise PassError(
            "there is no layer to train" + (f": {why[0]}" if why else ""),
            remedy="method=lora trains adapters, also beside quantized weights"
            if full
            else "try another rank= or layers=, or method=full",
        )
    return chosen


def _size(chosen: Trainable) -> int:
    tensor = chosen.value.const_value
    assert tensor is not None
    return (
        tensor.size
        if chosen.mask is None
        else int(np.broadcast_to(chosen.mask, tensor.shape.numpy()).sum())
    )


# The lesson


@contextlib.contextmanager
def _lesson(
    module: Module, ctx: PassContext, options: Recover, feeds: Mapping[int, Feed]
) -> Iterator[tuple[Lesson, Module | None]]:
    """Decide on the objective, and give it with its teacher at hand."""
    teacher = _teacher(module, ctx, options)
    inputs = () if teacher is None else check_teacher(teacher, module)
    text = text_model(module)
    if (
        text is not None
        and teacher is None
        and all(feed[text.inputs.ids].shape[1] < 2 for feed in feeds.values())
    ):
        raise InputError(
            "every feed has one token, after which none follows, and there is no teacher",
            file=module.source.path,
            remedy="give texts of two tokens or more",
        )
    with contextlib.ExitStack() as stack:
        runner = None if teacher is None else stack.enter_context(ctx.runner(teacher))
        causal = False
        if text is not None or (runner is not None and options.teacher == "auto"):
            with ctx.runner(module) as student:
                causal = text is not None and predicts_next(text, feeds, student)
                if (
                    runner is not None
                    and options.teacher == "auto"
                    and _agree(runner, student, feeds, inputs)
                ):
                    ctx.note(
                        "the module as it was before the pipeline gives the same outputs on every "
                        "feed, so it is no teacher"
                    )
                    runner, teacher = None, None
        objective = choose_objective(
            module,
            options.loss,
            options.kd_weight,
            options.temperature,
            taught=runner is not None,
            causal=causal,
        )
        file = None if teacher is None else teacher.source.path
        yield Lesson(objective, runner, inputs, file), teacher


def _teacher(module: Module, ctx: PassContext, options: Recover) -> Module | None:
    if options.teacher is None or options.loss == "cross-entropy":
        return None
    if options.teacher != "auto":
        from lwc.frontend.load import load

        return load(options.teacher)
    original = ctx.find_original()
    same = original is None or original.fingerprint() == module.fingerprint()
    return None if same else original


def _agree(
    teacher: Runner, student: Runner, feeds: Mapping[int, Feed], inputs: Sequence[str]
) -> bool:
    """Tell whether outputs are the same on all feeds: on one, they may be zeros, or empty."""
    for number, feed in feeds.items():
        given = {name: feed[name] for name in inputs if name in feed}
        with on_feed(number):
            if not _same(teacher.run(given), student.run(feed)):
                return False
    return True


def _same(taught: Mapping[str, Array], found: Mapping[str, Array]) -> bool:
    """Tell whether outputs are the same up to rounding, by their norms."""
    for name, array in found.items():
        if array.dtype.kind != "f" or name not in taught:
            continue
        if array.shape != taught[name].shape:
            return False
        off = np.linalg.norm(np.subtract(array, taught[name], dtype=np.float64))
        # So written, what is not a number does not agree.
        if not off <= _CLOSE * np.linalg.norm(array.astype(np.float64)):
            return False
    return True
