"""What `--explain` and `--bisect` print: what a pass did at which node, did not do, and why."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lwc.core.errors import UsageError
from lwc.pipeline.options import did_you_mean

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.diagnostics import Remark
    from lwc.core.module import Module
    from lwc.pipeline.bisect import Culprit
    from lwc.pipeline.instruments import History
    from lwc.pipeline.passes import Pass
    from lwc.pipeline.record import PassRecord

__all__ = ["FoundNodes", "describe_culprit", "explain", "find_nodes", "passes_until"]

_TITLES = {
    "applied": "applied",
    "missed": "missed",
    "note": "notes",
    "warning": "warnings",
}
_NODES_SHOWN = 8
_NEAREST = 3


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


@dataclass(frozen=True)
class FoundNodes:
    """What a user means by the text behind the `@` of `--explain`.

    Attributes:
        nodes: For each node, as `describe` names it, why nothing might be known about it.
        note: What the user should know about how they were found, or None.
    """

    nodes: Mapping[str, str]
    note: str | None = None


def find_nodes(text: str, history: History) -> FoundNodes:
    """Find the nodes that a user means by `text`, before and after the last pass of a run.

    Those that are called so, or whose output or operator is, are meant. Where no module of the
    run has one, those are that have the text as a part of a name.

    Raises:
        UsageError: There are none; the error names the nearest, or the pass that removed it.
    """
    from lwc.core.diagnostics import answers_to

    note = f"no node is called '{text}': shown are those that have it in their names"
    nodes = _matches(text, history, _is_called)
    if nodes:
        return FoundNodes(nodes)
    nodes = _matches(text, history, answers_to)
    if nodes:
        return FoundNodes(nodes, note)
    names = list(dict.fromkeys(_names(history.modules[-2])))
    near = difflib.get_close_matches(text, names, n=_NEAREST, cutoff=0.5)
    shown = ", ".join(f"'{each}'" for each in near or names[:_NEAREST])
    remedy = f"did you mean {shown}?" if near else f"there are {shown} …" if shown else None
    raise UsageError(f"no node has '{text}' in its name or its outputs' names", remedy=remedy)


def _is_called(node: ir.Node, text: str) -> bool:
    from lwc.core.diagnostics import describe

    return text in (describe(node), node.name, node.op_type, *(v.name for v in node.outputs))


def _matches(
    text: str, history: History, means: Callable[[ir.Node, str], bool]
) -> dict[str, str] | None:
    """Return the nodes around the last pass that `text` means, or None where there never were any.

    Raises:
        UsageError: An earlier pass removed them all.
    """
    from lwc.core.diagnostics import describe

    name = history.passes[-1].name
    old, new = (
        [describe(node) for node in module.nodes() if means(node, text)]
        for module in history.modules[-2:]
    )
    if old or new:
        return {
            **dict.fromkeys(old, f"{name} removed it where nothing read it any more"),
            **dict.fromkeys(new, f"{name} made it"),
            **dict.fromkeys(set(old) & set(new), f"no rule of {name} starts there"),
        }
    for index in range(len(history.modules) - 3, -1, -1):
        if any(means(node, text) for node in history.modules[index].nodes()):
            raise UsageError(
                f"no node '{text}' is left where {name} runs",
                remedy=f"pass {index + 1}, {history.passes[index].name}, removed or renamed it: "
                f"--explain={history.passes[index].name}@{text}",
            )
    return None


def _names(module: Module) -> Iterator[str]:
    for node in module.nodes():
        if node.name:
            yield node.name
        yield from (value.name for value in node.outputs if value.name)


def explain(record: PassRecord, found: FoundNodes | None) -> str:
    """Group the remarks of a pass by kind, rule and reason.

    Args:
        record: What the pass did.
        found: Only remarks about these nodes; see `find_nodes`.
    """
    nodes = None if found is None else found.nodes
    remarks = [r for r in record.remarks if nodes is None or _is_about(r, nodes)]
    changed = "changed the module" if record.changed else "changed nothing"
    lines = [f"{record.spec}: {changed}, {record.applied} rewrites, {len(record.missed)} missed"]
    if found is not None and found.note is not None:
        lines.append(f"  {found.note}")
    if nodes is None:
        lines.extend(f"  {count:>6} x {rule}" for rule, count in record.rewrites.items() if rule)
    else:
        silent = [node for node in nodes if not any(_is_about(r, [node]) for r in remarks)]
        lines.extend(f"  nothing about {node}: {nodes[node]}" for node in silent[:_NODES_SHOWN])
        if len(silent) > _NODES_SHOWN:
            lines.append(f"  nor about {len(silent) - _NODES_SHOWN} more")
    for kind, title in _TITLES.items():
        chosen = [remark for remark in remarks if remark.kind == kind]
        if chosen:
            lines.append(f"{title}:")
            lines.extend(_group(chosen, everything=nodes is not None))
    return "\n".join(lines)


def describe_culprit(culprit: Culprit) -> str:
    """Say which pass is the first to go wrong, and at which rewrite."""
    place = f" at {culprit.node}" if culprit.node else ""
    what = "to fail verification" if culprit.broken else f"to differ{place}"
    lines = [f"pass {culprit.index + 1}, {culprit.spec}, is the first {what}: {culprit.message}"]
    step = culprit.rewrite
    if step is None:
        lines.append(f"  no rewrite of it can be named: {culprit.why_no_rewrite}")
    else:
        where = f" at {step.node}" if step.node else ""
        lines.append(
            f"  rewrite {step.number} of {step.total}, {step.rule}{where}, is the first after "
            "which it does"
        )
    return "\n".join(lines)


def _is_about(remark: Remark, nodes: Collection[str]) -> bool:
    return remark.node is not None and any(node in remark.node for node in nodes)


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
