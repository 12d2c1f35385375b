"""A module as a torch.fx.GraphModule in which kernels compute what they can."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lwc.backends.fx.module import OnnxGraphModule, described
from lwc.backends.fx.walk import lowered
from lwc.backends.triton import lowerings
from lwc.backends.triton.lowerings.registry import KERNELS, Refused, Site
from lwc.core.diagnostics import Remark
from lwc.core.module import Module
from lwc.pipeline.plugins import import_installed

__all__ = ["Placement", "lowered_to_kernels", "placements"]

_ = lowerings  # registers the kernels

_BODIES = "no kernel is looked for in its bodies"


@dataclass(frozen=True)
class Placement:
    """Where a node of the ONNX graph runs.

    Attributes:
        node: The node, as messages name it.
        op: Its operator.
        calls: Calls that compute it in the lowered module; none where another node's do.
        kernels: Names of the kernels that compute it; none where PyTorch does.
        note: What is to be known of these, such as when which of them runs; may be empty.
        reason: Why no kernel does; None where one does, or where the operator has none.
    """

    node: str
    op: str
    calls: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    note: str = ""
    reason: str | None = None


def lowered_to_kernels(module: Module, *, expose: Sequence[str] = ()) -> OnnxGraphModule:
    """Lower a module; see `lwc.backends.triton.convert.to_triton`."""
    import_installed("lwc.kernels")
    plain = lowered(module, expose=expose)
    graph = torch.fx.Graph(tracer_cls=plain.graph._tracer_cls)
    made: dict[torch.fx.Node, torch.fx.Node] = {}
    results: dict[torch.fx.Node, Mapping[int, torch.fx.Node]] = {}
    sites: dict[torch.fx.Node, Site] = {}
    refused: dict[torch.fx.Node, str] = {}
    for node in plain.graph.nodes:
        if node.target is operator.getitem and node.args[0] in results:
            made[node] = results[node.args[0]][node.args[1]]
            continue
        entry = KERNELS.get(node.meta.get("computes", ""))
        if entry is not None:
            site = Site(node, plain, graph, made, entry)
            try:
                found = entry.substitute(site)
            except Refused as refusal:
                found, refused[node] = None, str(refusal)
            if found:
                results[node], sites[node] = found, site
                made[node] = next(iter(found.values()))
                continue
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.owning_module = plain  # which is asked whether modules that are called have effects
    graph.eliminate_dead_code()
    result = OnnxGraphModule(plain, graph, type(plain).__name__)
    result.requires_grad_(False)
    kept = {name for name, _ in (*result.named_parameters(), *result.named_buffers())}
    origin = plain.meta["lwc"]
    weights = {name: places for name, places in origin["weights"].items() if name in kept}
    placed = _placed(plain.graph, set(graph.nodes), made, sites, refused)
    result.meta["lwc"] = {**origin, "weights": weights, "placements": placed}
    for placement in placed:
        _tell(module, placement)
    return result


def placements(graph_module: torch.fx.GraphModule) -> tuple[Placement, ...]:
    """Return where each node of a lowered module runs, in the order of the graph.

    Left out are nodes that only reckon with extents, which are Python integers, and those that no
    output needs.
    """
    found: tuple[Placement, ...] = graph_module.meta["lwc"]["placements"]
    return found


def _placed(
    plain: torch.fx.Graph,
    alive: set[torch.fx.Node],
    made: Mapping[torch.fx.Node, torch.fx.Node],
    sites: Mapping[torch.fx.Node, Site],
    refused: Mapping[torch.fx.Node, str],
) -> tuple[Placement, ...]:
    found = []
    for node in plain.nodes:
        op = node.meta.get("computes")
        if op is None:
            continue
        name = described(node)
        if node in sites:
            site = sites[node]
            found.append(Placement(name, op, tuple(site.calls), site.runs, site.note))
        elif made[node] in alive:
            reason = _BODIES if op in ("If", "Loop", "Scan") else refused.get(node)
            found.append(Placement(name, op, (made[node].name,), reason=reason))
        else:  # nothing reads it any more: a kernel computes it with what follows, or it was dead
            by = next((user for user in node.users if user in sites), None)
            if by is not None:
                found.append(Placement(name, op, (), sites[by].runs, sites[by].note))
    return tuple(found)


def _tell(module: Module, placement: Placement) -> None:
    if placement.kernels:
        note = f" ({placement.note})" if placement.note else ""
        message = f"runs in {', '.join(placement.kernels)}{note}"
        module.remarks.emit(Remark("applied", "triton", message, placement.node))
    elif placement.reason is not None:
        message = f"stays in PyTorch: {placement.reason}"
        module.remarks.emit(Remark("missed", "triton", message, placement.node))
