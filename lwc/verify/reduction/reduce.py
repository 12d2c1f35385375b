"""Reduction: the smallest module, and the fewest passes, that still fail (delta debugging)."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import onnx_ir as ir

from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.verify.reduction import edits
from lwc.verify.reduction.extract import Usage, bind_extents, extract, nodes_within, owners, sweep
from lwc.verify.reduction.observe import Observed, observe
from lwc.verify.structure.well_formed import verify_structure

if TYPE_CHECKING:
    from lwc.pipeline.passes import Pass

__all__ = ["count_nodes", "minimize", "reduce_module", "reduce_pipeline"]

_Item = TypeVar("_Item")


def reduce_module(
    module: Module,
    fails: Callable[[Module], bool],
    *,
    seconds: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Module:
    """Make a failing module small.

    Calls of `fails` are what costs: large parts go first, by bisection. The result is the same on
    every run, unless time runs out.

    Args:
        module: The module; it is not changed. What is returned shares weights with it.
        fails: Tells whether a well-formed module still fails in the same way. It gets a copy of
            its own each time. An `LwcError` that it raises counts as no.
        seconds: Time after which no further candidate is tried; the best so far is returned.
        progress: Told in a few words how far the reduction is, after each success.

    Raises:
        LwcError: The module does not fail.
    """
    return _Reduction(module, fails, seconds, progress).run()


def reduce_pipeline(passes: Sequence[Pass], fails: Callable[[Sequence[Pass]], bool]) -> list[Pass]:
    """Return the fewest of the passes, in order, that still fail.

    Args:
        passes: A pipeline that fails.
        fails: Tells whether a pipeline still fails in the same way.
    """
    for pass_ in reversed(passes):
        if len(passes) > 1 and fails([pass_]):
            return [pass_]
    return minimize(passes, fails)


def minimize(items: Sequence[_Item], test: Callable[[list[_Item]], bool]) -> list[_Item]:
    """Remove items in ever smaller runs while `test` holds of those left, in order.

    The result has no single item that could go, unless `test` is not a function of its argument.
    It never becomes empty.

    Args:
        items: Items of which `test` holds.
        test: Whether a selection is still good.
    """
    left = list(items)
    size = len(left) // 2
    while size:
        start, removed = 0, False
        while start < len(left):
            fewer = left[:start] + left[start + size :]
            if fewer and test(fewer):
                left, removed = fewer, True
            else:
                start += size
        if size == 1 and not removed:
            break
        size = max(1, min(size // 2, len(left) // 2))
        if len(left) == 1:
            break
    return left


def count_nodes(module: Module) -> int:
    """Count the nodes of a module, those of bodies and functions included."""
    return sum(1 for _ in module.nodes())


class _OutOfTimeError(Exception):
    """The reduction has used its time."""


class _Reduction:
    """One run of `reduce_module`.

    `best` is the smallest failing module so far. Values keep their names from candidate to
    candidate, so that what was observed once holds for all of them.
    """

    def __init__(
        self,
        module: Module,
        fails: Callable[[Module], bool],
        seconds: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.best = module
        self.fails = fails
        self.deadline = time.monotonic() + seconds
        self.progress = progress
        self.observed = Observed()
        self.tried: dict[tuple[Any, ...], object] = {}

    def run(self) -> Module:
        """Reduce; see `reduce_module`."""
        if not self._attempt(self.best.clone, timed=False):
            raise LwcError("the module does not fail, so there is nothing to reduce")
        with contextlib.suppress(_OutOfTimeError):
            self._shrink()
        return self.best

    def _shrink(self) -> None:
        self.observed = observe(self.best)
        if self._attempt(self._with_fixed_dims):
            self.observed = observe(self.best)
        if self._edit(edits.inlined_functions):
            self.observed = observe(self.best)
        # Roughly first: calls on large modules cost most, and the front goes by halves.
        rough = self.best.graph.num_nodes() // 16
        self._prefix(rough)
        self._suffix(rough)
        self._prefix()
        self._outputs()
        self._neighbourhood()
        self._suffix()
        while True:
            before = self.best.fingerprint()
            self._nodes()
            self._outputs()
            self._bypass()
            if self._edit(edits.inlined_bodies):
                self.observed = observe(self.best)
            self._edit(lambda module: edits.nested_bypasses(module, self.observed))
            self._edit(edits.absent_inputs)
            self._edit(edits.unused_inputs)
            if self.best.fingerprint() == before:
                break
        self._edit(edits.smaller_extents)
        self.observed = observe(self.best)
        self._edit(lambda module: edits.fixed_inputs(module, self.observed))
        self._edit(edits.shorter_weights)

    def _attempt(self, make: Callable[[], Module], *, timed: bool = True) -> bool:
        """Try a candidate; where it fails it becomes the best.

        Raises:
            _OutOfTimeError: The time is used up.
        """
        if timed and time.monotonic() > self.deadline:
            raise _OutOfTimeError
        try:
            candidate = make()
            print_ = candidate.fingerprint()
            if print_.key in self.tried:
                return False
            self.tried[print_.key] = print_  # it keeps the tensors alive whose identity it has
            verify_structure(candidate)
            failed = self.fails(candidate.clone())
        except LwcError:
            return False
        if failed:
            self.best = candidate
            if self.progress is not None:
                self.progress(f"{count_nodes(candidate)} nodes left")
        return failed

    # Selections of nodes

    def _keep(self, base: Module, nodes: Iterable[ir.Node]) -> bool:
        keep = set(nodes)
        if len(keep) == base.graph.num_nodes():
            return False
        return self._attempt(lambda: extract(base, keep, self.observed))

    def _prefix(self, grain: int = 1) -> None:
        """Cut off the end: a failing prefix that `grain` nodes fewer do not make fail."""
        base, nodes = self.best, list(self.best.graph)
        good, bad = 0, len(nodes)
        while bad - good > max(1, grain):
            middle = (good + bad) // 2
            if self._keep(base, nodes[:middle]):
                bad = middle
            else:
                good = middle

    def _suffix(self, grain: int = 1) -> None:
        """Cut off the front, likewise."""
        base, nodes = self.best, list(self.best.graph)
        good, bad = 0, len(nodes)
        while bad - good > max(1, grain):
            middle = (good + bad) // 2
            if self._keep(base, nodes[middle:]):
                good = middle
            else:
                bad = middle

    def _neighbourhood(self) -> None:
        """Keep what is near the last node, which a prefix needs: first upstream, then around."""
        base, nodes = self.best, list(self.best.graph)
        if len(nodes) < 2:
            return
        for around in (False, True):
            distances = _distances(base.graph, nodes[-1], around=around)
            farthest = max(distances.values())
            radius = 1
            while radius <= farthest:
                near = [node for node in nodes if distances.get(node, farthest + 1) <= radius]
                if self._keep(base, near):
                    return
                radius *= 2

    def _nodes(self) -> None:
        base = self.best
        minimize(list(base.graph), lambda nodes: self._keep(base, nodes))

    # Outputs

    def _outputs(self) -> None:
        """Leave out outputs, with the nodes that only they need, and nodes no output needs."""
        names = _output_names(self.best)
        self._return(self.best, names, spare=())
        base, spare = self.best, _spare(self.best)
        names = _output_names(base)
        if len(names) < 2:
            return
        position = {value: i for i, node in enumerate(base.graph) for value in node.outputs}
        last = max(base.graph.outputs, key=lambda value: position.get(value, -1)).name or ""
        if not self._return(base, [last], spare=spare):
            minimize(names, lambda chosen: self._return(base, chosen, spare=spare))

    def _return(
        self,
        base: Module,
        names: Sequence[str],
        *,
        spare: Iterable[ir.Node],
        substitutes: Mapping[str, str] = MappingProxyType({}),
    ) -> bool:
        """Try `base` with these outputs, the nodes they need, and `spare` nodes."""
        keep = {*_needed(base, names, substitutes), *spare}
        return self._attempt(
            lambda: extract(base, keep, self.observed, outputs=names, substitutes=substitutes)
        )

    # Single nodes

    def _bypass(self) -> None:
        """Replace nodes by one of their inputs."""
        position = self.best.graph.num_nodes() - 1
        while position >= 0:
            self._bypass_node(list(self.best.graph)[position])
            position = min(position, self.best.graph.num_nodes()) - 1

    def _bypass_node(self, node: ir.Node) -> bool:
        base = self.best
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        if len(used) != 1:
            return False
        names, spare = _output_names(base), _spare(base)
        return any(
            self._return(
                base, names, spare=spare, substitutes={used[0].name or "": value.name or ""}
            )
            for value in dict.fromkeys(node.inputs)
            if value is not None and edits.may_replace(used[0], value, self.observed)
        )

    # Edits

    def _with_fixed_dims(self) -> Module:
        twin = self.best.clone()
        bind_extents(twin, self.observed, self.observed.extents)
        return twin

    def _edit(self, find: Callable[[Module], Iterator[edits.Edit]]) -> bool:
        """Apply the edits that `find` yields, each tried once; tell whether any helped."""
        tried: set[object] = set()
        improved, more = False, True
        while more:
            more = False
            for edit in find(self.best):
                if edit.key not in tried:
                    tried.add(edit.key)
                    more = self._attempt(lambda edit=edit: _edited(self.best, edit))  # type: ignore[misc]
                    improved = improved or more
                    if more:
                        break
        return improved


def _edited(module: Module, edit: edits.Edit) -> Module:
    twin = module.clone()
    usage = Usage(twin)
    edit.change(twin)
    sweep(twin, usage)
    twin.forget_names()
    return twin


def _output_names(module: Module) -> list[str]:
    return [value.name or "" for value in module.graph.outputs]


def _needed(module: Module, names: Iterable[str], substitutes: Mapping[str, str]) -> set[ir.Node]:
    """Return the nodes that outputs depend on, through bodies too."""
    by_name = {value.name: node for node in module.graph for value in node.outputs}
    owner = owners(module.graph)
    found: set[ir.Node] = set()
    waiting = deque(names)
    while waiting:
        name = waiting.popleft()
        node = by_name.get(substitutes.get(name, name))
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(
            value.name or ""
            for value in _read(node)
            if (producer := value.producer()) is not None and owner[producer] is producer
        )
    return found


def _spare(module: Module) -> set[ir.Node]:
    """Return the nodes that no output depends on."""
    return set(module.graph) - _needed(module, _output_names(module), {})


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node and its bodies read."""
    for each in (node, *nodes_within(node)):
        yield from (value for value in each.inputs if value is not None)


def _distances(graph: ir.Graph, start: ir.Node, *, around: bool) -> dict[ir.Node, int]:
    """Count the steps from a node to those upstream of it, or to those it is connected with."""
    owner = owners(graph)
    found = {start: 0}
    waiting = deque([start])
    while waiting:
        node = waiting.popleft()
        near = [value.producer() for value in _read(node)]
        if around:
            near.extend(user for value in node.outputs for user, _ in value.uses())
        for other in near:
            home = None if other is None else owner.get(other)
            if home is not None and home not in found:
                found[home] = found[node] + 1
                waiting.append(home)
    return found
