"""What rounding one layer alone to a few bits costs in quality, measured layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.calibration.collect import check_any, check_finite, check_rows, checked_feeds, has_rows
from lwc.calibration.divergence import Reference
from lwc.calibration.inputs import input_role
from lwc.calibration.replay import Replay
from lwc.calibration.stages import data_values
from lwc.calibration.text import id_input, token_feed
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, PassError
from lwc.core.weights import reading
from lwc.passes.quantization.rounding import LARGEST
from lwc.passes.quantization.trial_rounding import TrialRounding
from lwc.passes.quantization.weight_uses import WeightUses, find_weights

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.passes.quantization.layerwise import RoundingMethod
    from lwc.passes.quantization.quantize_weights import Bits, QuantizeWeights
    from lwc.passes.quantization.streaming import WeightSpec
    from lwc.pipeline.passes import Feed, PassContext

__all__ = ["Candidate", "Form", "Sensitivity", "find_candidates", "measure"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_MEASURED: tuple[Bits, ...] = (2, 3, 4)
"""Bits that are run. The cost of small errors grows with their square, so that of 8 bits is the
one of fewer bits times the quotient of the squared errors."""


class Form(NamedTuple):
    """What a weight would become in some bits.

    Attributes:
        spec: How it is rounded.
        nbytes: Bytes of codes, scales and zero points.
    """

    spec: WeightSpec
    nbytes: int


class Candidate(NamedTuple):
    """A weight of linear layers, and what it could become, by bits."""

    weight: WeightUses
    forms: Mapping[Bits, Form]


@dataclass(frozen=True)
class Sensitivity:
    """What the layers of a model cost.

    Attributes:
        costs: By weight and bits: KL divergence in nats per position, or relative squared error.
        measure: Which of them, for people.
        feeds: Feeds of the sample.
    """

    costs: Mapping[ir.Value, Mapping[Bits, float]]
    measure: str
    feeds: int


def find_candidates(
    module: Module, ctx: PassContext, quantizer: QuantizeWeights, bits: Sequence[Bits]
) -> list[Candidate]:
    """Return the weights that `quantizer` would round to each of `bits`, in the order of use.

    What embeddings read too is none: `embeddings` says its bits.

    Raises:
        PassError: The module's opset cannot express a form.
    """
    editor = ctx.editor()
    found = []
    for weight in find_weights(module):
        if any(use.role == "Gather" for use in weight.uses):
            continue
        forms: dict[Bits, Form] = {}
        for each in bits:
            form = replace(quantizer, bits=each).form(weight, editor)
            if not isinstance(form, str):
                forms[each] = Form(*form)
        if forms:
            found.append(Candidate(weight, forms))
    return found


def measure(
    module: Module,
    candidates: Sequence[Candidate],
    ctx: PassContext,
    how: RoundingMethod,
    *,
    samples: int,
    window: int,
) -> Sensitivity:
    """Round each weight alone, to each of its grids, and run what is behind.

    8 bits are not run where fewer are. The outputs are compared with those of the model as it is.
    Logits are the outputs whose last axis is as long as the table of token ids; where there are
    none, all float outputs count.

    Args:
        module: The model; it is not changed.
        candidates: What to measure; a weight that is no initializer, that nodes of subgraphs
            read, or that multiplies a constant, is left out.
        ctx: Gives calibration data and the runner.
        how: How weights are rounded; by all of the calibration data, where that matters.
        samples: Feeds of the data to use.
        window: Tokens of a feed to use, where feeds are plain token ids.

    Raises:
        UsageError: There is no calibration data.
        PassError: There is no backend or no float output, or a weight is not finite.
        InputError: The data has no feeds, or one that does not fit the inputs, or an output is
            not finite or has no rows.
        LwcError: The backend cannot run the model, or an output is no number.
    """
    feeds = _sample(module, ctx, samples, window)
    outputs = [v for v in module.graph.outputs if v.dtype is not None and _is_float(v.dtype)]
    if not outputs:
        raise PassError("no output holds floats, so nothing tells how good the model is")
    values = data_values(module)
    inside = [
        each
        for each in candidates
        if each.weight.belongs_to(module.graph) and each.weight.multiplies(values)
    ]
    for each in inside:
        _check_weight(each.weight)
    weights = {each.weight.value: each for each in inside}
    classes = _vocabulary(module)
    logits = [v for v in outputs if classes is not None and _last_extent(v) == classes]
    chosen = [value.name or "" for value in logits or outputs]
    replay = Replay(module, list(weights), chosen, feeds, ctx)
    before = list(replay.outputs())
    for count, given in enumerate(before, 1):
        for name, array in given.items():
            check_finite(array, name, count, module)
    check_rows(chosen, {name for each in before for name in each if has_rows(each[name])}, module)
    reference = Reference(before, frozenset(chosen if logits else ()))
    costs: dict[ir.Value, dict[Bits, float]] = {
        value: dict.fromkeys(each.forms, 0.0) for value, each in weights.items()
    }
    rounding = TrialRounding(module, [each.weight for each in inside], ctx, how)
    steps = ((part, weights[value]) for part in replay.parts() for value in part.weights)
    for part, candidate in ctx.progress.track(steps, "measuring sensitivity", len(inside)):
        value, found = candidate.weight.value, costs[candidate.weight.value]
        forms = sorted(candidate.forms.items())
        trials = rounding.round(candidate.weight, [form.spec for _, form in forms])
        errors = {bits: error for (bits, _), (_, error) in zip(forms, trials, strict=True)}
        for (bits, _), (rounded, error) in zip(forms, trials, strict=True):
            cheaper = [below for below in _MEASURED if below < bits and below in found]
            if bits not in _MEASURED and cheaper:
                coarse = errors[max(cheaper)]
                cost = found[max(cheaper)] * (error / coarse if coarse else 0.0)
            else:
                cost = reference.distance(part.run(value, rounded))
            if not np.isfinite(cost):
                raise LwcError(
                    f"with '{value.name}' in {bits} bits an output is no number",
                    node=describe(candidate.weight.uses[0].node),
                    remedy="exclude it",
                )
            found[bits] = cost
    name = "KL divergence, nats per position" if logits else "relative squared error of outputs"
    return Sensitivity(costs, name, len(feeds))


def _check_weight(weight: WeightUses) -> None:
    with reading(weight.tensor) as array:
        if not (np.abs(array) < LARGEST).all():
            raise PassError(
                f"'{weight.value.name}' holds infinities or NaN, or magnitudes above 1e19",
                node=describe(weight.uses[0].node),
                remedy="exclude it",
            )


def _sample(module: Module, ctx: PassContext, samples: int, window: int) -> list[Feed]:
    """Return the first feeds, cut to their first tokens if they are nothing but token ids."""
    feeds = list(itertools.islice(checked_feeds(module, ctx), samples))
    check_any(len(feeds), module)
    return [_cut(module, feed, window) for feed in feeds]


def _cut(module: Module, feed: Feed, window: int) -> Feed:
    try:
        ids = feed[id_input(module).name or ""]
        whole = token_feed(module, ids)
        short = token_feed(module, ids[:, :window])
    except (LwcError, KeyError):
        return feed
    plain = whole.keys() == feed.keys() and all(np.array_equal(whole[n], feed[n]) for n in feed)
    return short if plain else feed


def _vocabulary(module: Module) -> int | None:
    """Return the rows of the table that token ids look up."""
    try:
        return input_role(module, id_input(module)).high + 1
    except LwcError:
        return None


def _last_extent(value: ir.Value) -> int | None:
    extent = value.shape[-1] if value.shape is not None and len(value.shape) > 1 else None
    return extent if isinstance(extent, int) else None


def _is_float(dtype: ir.DataType) -> bool:
    return dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
