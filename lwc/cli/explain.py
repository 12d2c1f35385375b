"""`--explain`: what a pass did at which node, what it did not do, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lwc.core.errors import UsageError
from lwc.pipeline.options import did_you_mean

if TYPE_CHECKING:
    from lwc.core.diagnostics import Remark
    from lwc.pipeline.passes import Pass
    from lwc.pipeline.record import PassRecord

__all__ = ["explain", "passes_until"]

_TITLES = {
    "applied": "applied",
    "missed": "missed",
    "note": "notes",
    "warning": "warnings",
}
_NODES_SHOWN = 8


def passes_until(name: str, passes: Sequence[Pass]) -> Sequence[Pass]:
    """Return the passes up to and including the first one called `name`.

    Raises:
        UsageError: There is none.
    """
    names = [pass_.name for pass_ in passes]
    if name not in names:
        raise UsageError(
            f"pass '{name}' is not in the pipeline",
            remedy=did_you_mean(name, names) or f"it has: {', '.join(names) or 'no passes'}",
        )
    return passes[: names.index(name) + 1]


def explain(record: PassRecord, node: str | None) -> str:
    """Group the remarks of a pass by kind, rule and reason.

    Args:
        record: What the pass did.
        node: Only remarks whose node's description contains this text.
    """
    remarks = [r for r in record.remarks if node is None or node in (r.node or "")]
    changed = "changed the module" if record.changed else "changed nothing"
    lines = [f"{record.spec}: {changed}, {record.applied} rewrites, {len(record.missed)} missed"]
    if node is None:
        lines.extend(f"  {count:>6} x {rule}" for rule, count in record.rewrites.items() if rule)
    elif not remarks:
        lines.append(f"  nothing about a node whose name contains '{node}'")
    for kind, title in _TITLES.items():
        chosen = [remark for remark in remarks if remark.kind == kind]
        if chosen:
            lines.append(f"{title}:")
            lines.extend(_group(chosen, everything=node is not None))
    return "\n".join(lines)


def _group(remarks: Iterable[Remark], *, everything: bool) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        places = groups.setdefault((remark.rule or "", remark.message), [])
        if remark.node:
            places.append(remark.node)
    lines = []
    for (rule, message), places in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {f'{rule}: ' if rule else ''}{message}")
        shown = places if everything else places[:_NODES_SHOWN]
        lines.extend(f"    at {place}" for place in shown)
        if len(places) > len(shown):
            lines.append(f"    and at {len(places) - len(shown)} more")
    return lines
