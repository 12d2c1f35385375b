"""Cutting a lowered module into segments, of which only the inputs are kept for backward passes."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lwc.backends.fx.module import OnnxGraphModule

__all__ = ["Sizes", "segmented"]


class Sizes:
    """What the nodes of a graph make and keep on one run, in bytes, and where it could be cut.

    Args:
        graph_module: The lowered module; it runs once, and nothing is kept.
        arguments: Its arguments.
    """

    def __init__(self, graph_module: torch.fx.GraphModule, arguments: Sequence[Any]) -> None:
        meter = _Meter(graph_module)
        meter.measure(arguments)
        self._nodes = [node for node in graph_module.graph.nodes if node in meter.sizes]
        self._sizes = [meter.sizes[node] for node in self._nodes]
        kept = (meter.kept.get(node, 0) for node in self._nodes)
        self._kept = list(itertools.accumulate(kept, initial=0))
        places = {node: index for index, node in enumerate(self._nodes)}
        self._last = [
            max((places.get(user, len(places)) for user in node.users), default=index)
            for index, node in enumerate(self._nodes)
        ]

    def plan(self, segments: int | None, max_memory: int | None) -> Plan:
        """Choose the cuts.

        Args:
            segments: How many segments; None for as few as keep within `max_memory`, or, where
                no number of them does, as many as keep least.
            max_memory: Bytes; only looked at where `segments` is None.
        """
        most = max(1, len(self._nodes))
        if segments is not None:
            return self._plan(min(segments, most))
        if max_memory is None:
            return self._plan(1)
        best = self._plan(1)
        for count in range(2, min(most, _MOST) + 1):
            if best.kept <= max_memory:
                break
            best = min(best, self._plan(count), key=lambda plan: plan.kept)
        return best

    def _plan(self, count: int) -> Plan:
        """Cut near equal shares of what is kept, where the fewest bytes are alive."""
        share = self._kept[-1] / count
        cuts: list[int] = []
        for number in range(1, count):
            ideal, first = number * share, cuts[-1] + 1 if cuts else 1
            places = range(first, len(self._nodes) - (count - 1 - number))
            near = [place for place in places if abs(self._kept[place] - ideal) <= share / 3]
            off = {place: abs(self._kept[place] - ideal) for place in near or places}
            if near:
                cuts.append(min(off, key=lambda place: (self._alive([place]), off[place])))
            else:
                cuts.append(min(off, key=lambda place: off[place]))
        ends = [0, *cuts, len(self._nodes)]
        largest = max(self._kept[b] - self._kept[a] for a, b in itertools.pairwise(ends))
        starts = {self._nodes[place].name for place in cuts}
        return Plan(frozenset(starts), count, self._alive(cuts) + largest)

    def _alive(self, cuts: Sequence[int]) -> int:
        """Return the bytes that must outlive any of some cuts, each in front of a node."""
        return sum(
            size
            for index, (size, last) in enumerate(zip(self._sizes, self._last, strict=True))
            if any(index < cut <= last for cut in cuts)
        )


@dataclass(frozen=True)
class Plan:
    """Where a graph is cut.

    Attributes:
        starts: Names of the nodes that begin a segment, without the first one.
        segments: How many there are.
        kept: Bytes that are held at once: what lives across cuts, and what the largest segment
            keeps for its backward pass.
    """

    starts: frozenset[str]
    segments: int
    kept: int


def segmented(graph_module: torch.fx.GraphModule, plan: Plan) -> torch.nn.Module:
    """Return a module that computes the same, segment by segment; it shares the weights."""
    if plan.segments == 1:
        return graph_module
    numbers: dict[str, int] = {}
    number = 0
    for node in graph_module.graph.nodes:
        number += node.name in plan.starts
        numbers[node.name] = number
    split = split_module(graph_module, None, lambda node: numbers[node.name])
    *early, _ = names = [name for name, _ in split.named_children() if name.startswith("submod_")]
    for name in names:
        part = getattr(split, name)
        made = OnnxGraphModule(part, part.graph)
        made.meta["lwc"] = {"file": graph_module.meta["lwc"]["file"]}
        # What follows the last cut would be computed anew at once.
        setattr(split, name, _Checkpointed(made) if name in early else made)
    return split


class _Checkpointed(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any) -> Any:
        # To stop early is an exception, in which the inner module would see a failure of a node.
        with set_checkpoint_early_stop(False):
            return checkpoint(self.inner, *arguments, use_reentrant=False)


_MOST = 64
"""Segments beyond which hardly anything is left to gain."""


class _Meter(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs a graph, and counts what each node makes and what it keeps for its backward pass.

    What would be kept is let go of at once.
    """

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.sizes: dict[torch.fx.Node, int] = {}
        self.kept: Counter[torch.fx.Node] = Counter()
        self._node: torch.fx.Node | None = None
        self._seen: dict[int, Any] = {}

    def measure(self, arguments: Sequence[Any]) -> None:
        """Run the graph."""
        weights = (*self.module.parameters(), *self.module.buffers())
        for tensor in (*weights, *_tensors(arguments)):
            self._is_new(tensor)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda _: None)
        with torch.enable_grad(), hooks:
            self.run(*arguments)

    def run_node(self, node: torch.fx.Node) -> Any:
        self._node = node
        result = super().run_node(node)
        if node.op not in ("placeholder", "get_attr", "output"):
            self.sizes[node] = sum(each.nbytes for each in _tensors([result]))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        if self._node is not None and self._is_new(tensor):
            self.kept[self._node] += tensor.untyped_storage().nbytes()

    def _is_new(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._seen.get(storage._cdata)
        if known is not None and known() is storage:
            return False
        self._seen[storage._cdata] = weakref.ref(storage)
        return True


def _tensors(values: Sequence[Any]) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
