"""`--plan` of a decoder with a cache: a prompt and one token are predicted apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.plan import plan_rows
from lwc.analysis.shapes import Shapes
from lwc.core import text
from lwc.core.errors import LwcError
from lwc.generate.interface import find_interface

if TYPE_CHECKING:
    from lwc.analysis.target import Target
    from lwc.backends.decoding import CacheInterface
    from lwc.core.module import Module

__all__ = ["phases_table", "token_dimensions"]

_CONTEXT = 512


def phases_table(
    module: Module,
    analyses: AnalysisManager,
    bindings: Mapping[str, int],
    target: Target | None,
) -> Table | None:
    """Lay out what a prompt costs, and what one token behind it does; None without a cache.

    The prompt is as long as `bindings` says of the new or of the cached tokens, 512 by default;
    other dimensions that are not bound are 1. The cache takes, for each sequence, its tokens times
    the sum over its tensors of heads · size · bytes of an element.

    Args:
        module: The model.
        analyses: Its analyses.
        bindings: Numbers for symbolic dimensions.
        target: The measured machine to predict seconds for, or None.
    """
    try:
        interface = find_interface(module)
    except LwcError:
        return None
    names = token_dimensions(module, interface, analyses.get(Shapes))
    if not interface.tensors or names is None:
        return None
    new, cached, total, batch = names
    context = max(bindings.get(name, 0) for name in (new, cached)) or _CONTEXT
    sequences = bindings.get(batch, 1)
    table = Table(
        title=f"KV cache: {text.size(interface.bytes_per_token)} per token of a sequence",
        title_justify="left",
    )
    table.add_column("phase")
    headings = ["FLOPs", "read + written", "live activations", "cache"]
    for heading in [*headings, "predicted", "tokens/s"] if target else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    phases = {
        f"prompt of {context} tokens": (context, 0),
        f"one token behind {context}": (1, context),
    }
    free = plan_rows(module, analyses, {}, None, top=0).missing
    for name, (tokens, past) in phases.items():
        bound = dict.fromkeys(free, 1) | dict(bindings)
        bound |= {total: past + tokens, new: tokens, cached: past, batch: sequences}
        plan = plan_rows(module, analyses, bound, target, top=0)
        row, peak = plan.total, plan.peak
        assert row.flops is not None
        assert row.traffic is not None
        cells = [
            f"{row.flops:,}",
            text.size(row.traffic),
            text.size(peak.nbytes) if peak else "",
            text.size(interface.bytes_per_token * (past + tokens) * sequences),
        ]
        if row.seconds is not None:
            cells += [text.time(row.seconds), f"{tokens * sequences / row.seconds:.1f}"]
        table.add_row(name, *cells)
    return table


def token_dimensions(
    module: Module, interface: CacheInterface, shapes: Shapes
) -> tuple[str, str, str, str] | None:
    """Return the names of new, cached, and all tokens, and of the sequences; "" where fixed.

    None where the numbers of new or cached tokens are fixed, or no names of their own.
    """
    inputs = {value.name: shapes.shape(value) for value in module.graph.inputs}

    def name(value: str | None, axis: int) -> str:
        dims = inputs.get(value) if value is not None else None
        if dims is None or axis >= len(dims):
            return ""
        return str(getattr(dims[axis], "name", ""))

    new, batch = name(interface.ids, 1), name(interface.ids, 0)
    cached = name(interface.tensors[0].past, 2) if interface.tensors else ""
    total = name(interface.mask, 1)
    return (new, cached, total, batch) if new and cached and new != cached else None
