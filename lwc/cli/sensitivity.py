"""`--sensitivity`: which layers lose most when they alone are rounded to a few bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lwc.core import text
from lwc.core.diagnostics import describe
from lwc.core.errors import PassError, UsageError
from lwc.passes.quantization.mixed_precision import MixedPrecision
from lwc.passes.quantization.sensitivity import find_candidates, measure
from lwc.pipeline.grammar import Argument, PassSpec, Place, Scalar, parse_arguments
from lwc.pipeline.spec import build_pass
from lwc.report.data import LayerSensitivity

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.optimizer import RunSettings
    from lwc.pipeline.passes import Pass

__all__ = ["print_ranking", "rank", "settings_for"]

_PLAIN_WIDTH = 160


def settings_for(options: str, passes: Sequence[Pass]) -> MixedPrecision:
    """Return what to measure: as the options say, as `mixed-precision` does, or 3, 4 and 8 bits.

    Args:
        options: Options of `mixed-precision` without the budget; may be empty.
        passes: The pipeline.

    Raises:
        UsageError: An option is unknown or has a wrong value.
    """
    if not options:
        used = [each for each in passes if isinstance(each, MixedPrecision)]
        return used[0] if used else MixedPrecision(32, bits=(3, 4, 8), format="lwc")
    budget = Argument(Scalar("budget"), (Scalar("32"),))
    try:
        given = parse_arguments(options)
        for each in given:
            if each.name is None or each.name.text == "budget":
                raise each.place.error(
                    "takes options of mixed-precision as name=value, and no budget",
                    "such as --sensitivity='bits=2,4 samples=8'",
                )
        chosen = build_pass(PassSpec(MixedPrecision.name, (budget, *given), Place(options)))
    except UsageError as error:
        error.message = f"--sensitivity: {error.message}"
        raise
    assert isinstance(chosen, MixedPrecision)
    return chosen


def rank(
    modules: Sequence[Module], chosen: MixedPrecision, settings: RunSettings
) -> tuple[list[LayerSensitivity], list[str]]:
    """Measure the layers, the one that loses most at the fewest bits first.

    Returns them, and the names of weights that cannot be measured: nodes of subgraphs read them, or
    they are no initializers.

    Args:
        modules: The module at every point of the pipeline; the last whose layers hold floats is
            measured.
        chosen: Bits, format and sample.
        settings: Calibration data and threads.

    Raises:
        PassError: No module has such layers.
        LwcError: See `lwc.passes.quantization.sensitivity.measure`.
    """
    from lwc.optimizer import make_context

    bits = sorted(chosen.bits)
    quantizer = chosen.quantizer(bits[-1])
    for module in reversed(modules):
        ctx = make_context(module, settings)
        ctx.source = "sensitivity"
        candidates = find_candidates(module, ctx, quantizer, bits)
        if candidates:
            break
    else:
        raise PassError("no layer of the model could be quantized, so none is sensitive")
    found = measure(
        module, candidates, ctx, quantizer.how, samples=chosen.samples, window=chosen.window
    )
    known = [each for each in candidates if each.weight.value in found.costs]
    known.sort(key=lambda each: -next(iter(found.costs[each.weight.value].values())))
    unknown = [each.weight.value.name or "" for each in candidates if each not in known]
    entries = [
        LayerSensitivity(
            weight=each.weight.value.name or "",
            node=describe(each.weight.uses[0].node),
            bits=number,
            cost=found.costs[each.weight.value][number],
            measure=found.measure,
            bytes_saved=each.weight.tensor.nbytes - form.nbytes,
        )
        for each in known
        for number, form in sorted(each.forms.items())
    ]
    return entries, unknown


def print_ranking(entries: Sequence[LayerSensitivity], unknown: Sequence[str], color: str) -> None:
    """Print the ranking to stdout.

    Args:
        entries: What `rank` returned.
        unknown: Likewise.
        color: `auto`, `always` or `never`.
    """
    console = Console(
        force_terminal=True if color == "always" else None,
        no_color=color == "never",
        width=None if sys.stdout.isatty() else _PLAIN_WIDTH,
        highlight=False,
        markup=False,
    )
    table = Table(caption=f"cost: {entries[0].measure}" if entries else None)
    table.add_column("layer", overflow="fold")
    table.add_column("node", overflow="fold")
    every = sorted({entry.bits for entry in entries})
    for bits in every:
        for heading in (f"cost of {bits} bits", "saves"):
            table.add_column(heading, justify="right", no_wrap=True)
    for weight in dict.fromkeys(entry.weight for entry in entries):
        own = {entry.bits: entry for entry in entries if entry.weight == weight}
        cells = [text.printable(weight), text.printable(next(iter(own.values())).node)]
        for bits in every:
            entry = own.get(bits)
            cells += ["–", "–"] if entry is None else _cells(entry)
        table.add_row(*cells)
    console.print(table)
    if unknown:
        listed = ", ".join(map(text.printable, unknown))
        reason = "they are no initializers that the main graph alone reads"
        console.print(f"not measured, for {reason}: {listed}", soft_wrap=True)


def _cells(entry: LayerSensitivity) -> list[str]:
    return [f"{entry.cost:.3g}", text.size(entry.bytes_saved)]
