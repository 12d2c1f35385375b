"""Running the part of a model behind a weight again and again, with other contents of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.calibration.stages import between, filed, leading_to, varying
from lwc.core.walk import values_read
from lwc.core.weights import reading

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Feed, PassContext, Runner

__all__ = ["Part", "Replay"]

Array = np.ndarray[Any, Any]

_PARTS = 32
"""Into how many parts the model is cut, by the elements of its weights: a part has a session, and
what is run needlessly is at most one part."""


class Part:
    """The model from a cut on, in which the contents of the first weights can be changed.

    Args:
        weights: The weights, of the main graph, whose contents are given with each run.
        runner: Runs the model from the cut to the outputs.
        kept: For each feed, what is known at the cut.
        outputs: Names of the outputs.
    """

    def __init__(
        self,
        weights: Sequence[ir.Value],
        runner: Runner,
        kept: Sequence[Mapping[ir.Value, Array]],
        outputs: Sequence[str],
    ) -> None:
        self.weights = tuple(weights)
        self._runner = runner
        self._kept = kept
        self._outputs = outputs

    def run(self, changed: ir.Value, content: Array) -> Iterator[dict[str, Array]]:
        """Yield the outputs on each feed with another content of one weight.

        Raises:
            LwcError: The backend cannot run the model.
        """
        weights = {w.name or "": content if w is changed else _content(w) for w in self.weights}
        for kept in self._kept:
            feed = {value.name or "": array for value, array in kept.items()}
            yield self._runner.run({**feed, **weights}, self._outputs)


class Replay:
    """A model cut in front of its weights, one cut after the other.

    What is known at a cut is kept for all feeds, in files without a name where `ctx` bounds
    memory; behind the last weight of a cut it is dropped.

    Args:
        module: The model; it is not changed.
        weights: Constants that only nodes of the main graph read.
        outputs: Names of the graph outputs to compute.
        feeds: The data.
        ctx: Gives the runner.
    """

    def __init__(
        self,
        module: Module,
        weights: Sequence[ir.Value],
        outputs: Sequence[str],
        feeds: Sequence[Feed],
        ctx: PassContext,
    ) -> None:
        self._module = module
        self._ctx = ctx
        self._outputs = [value for value in module.graph.outputs if value.name in outputs]
        self._put = filed if ctx.max_memory is not None else lambda array: array
        inputs = {value.name: value for value in module.graph.inputs}
        self._kept = [{inputs[name]: array for name, array in feed.items()} for feed in feeds]
        self._varying = varying(module, self._kept[0])
        self._nodes = leading_to(module, self._outputs, self._varying)
        places = {node: index for index, node in enumerate(self._nodes)}
        self._first = {
            weight: min((places[n] for n in _readers(weight) if n in places), default=-1)
            for weight in weights
        }

    def outputs(self) -> Iterator[dict[str, Array]]:
        """Yield the outputs on each feed with the weights as they are.

        Raises:
            LwcError: The backend cannot run the model.
        """
        names = [value.name or "" for value in self._outputs]
        whole = between(self._module, self._kept[0], self._outputs)
        with self._ctx.runner(whole) as runner:
            for kept in self._kept:
                yield runner.run({v.name or "": a for v, a in kept.items()}, names)

    def parts(self) -> Iterator[Part]:
        """Yield the parts from the front of the model to its end.

        A weight that no output depends on is in none. The runner of a part is closed when the
        next is asked for.

        Raises:
            LwcError: The backend cannot run the model.
        """
        for start, weights in self._cuts():
            self._advance(start)
            behind = set(self._nodes[start:])
            made = [value for value in self._outputs if value.producer() in behind]
            contents = {weight: _content(weight) for weight in weights}
            given = {**self._kept[0], **contents}
            stage = between(self._module, given, made)
            fixed = {weight.name: array.shape for weight, array in contents.items()}
            for value in stage.graph.inputs:
                if value.name in fixed:
                    value.shape = ir.Shape(fixed[value.name])
            with self._ctx.runner(stage) as runner:
                yield Part(weights, runner, self._kept, [value.name or "" for value in made])

    def _cuts(self) -> list[tuple[int, list[ir.Value]]]:
        """Return the places of the cuts, and the weights between each and the next."""
        ordered = sorted(
            (w for w, at in self._first.items() if at >= 0), key=self._first.__getitem__
        )
        share = sum(map(_elements, ordered)) / _PARTS
        cuts: list[tuple[int, list[ir.Value]]] = []
        held = 0
        for weight in ordered:
            at, size = self._first[weight], _elements(weight)
            if not cuts or (held + size > share and at > cuts[-1][0]):
                cuts.append((at, []))
                held = 0
            cuts[-1][1].append(weight)
            held += size
        return cuts

    def _advance(self, start: int) -> None:
        """Bring the data to the front of a node."""
        before = set(self._nodes[:start])
        live = [
            value
            for value in dict.fromkeys(v for n in self._nodes[start:] for v in values_read(n))
            if value in self._varying and (value.producer() is None or value.producer() in before)
        ]
        made = [value for value in live if value not in self._kept[0]]
        if made:
            stage = between(self._module, self._kept[0], made)
            names = [value.name or "" for value in made]
            with self._ctx.runner(stage) as runner:
                for kept in self._kept:
                    results = runner.run({v.name or "": a for v, a in kept.items()}, names)
                    kept.update({v: self._put(results[v.name or ""]) for v in made})
        wanted = set(live)
        for kept in self._kept:
            for value in [value for value in kept if value not in wanted]:
                del kept[value]


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield what reads a constant, or a transpose of it."""
    for node, _ in value.uses():
        yield node
        if node.op_type == "Transpose":
            yield from _readers(node.outputs[0])


def _content(weight: ir.Value) -> Array:
    assert weight.const_value is not None
    with reading(weight.const_value) as array:
        return np.array(array)


def _elements(weight: ir.Value) -> int:
    assert weight.const_value is not None
    return int(np.prod(weight.const_value.shape.numpy()))
