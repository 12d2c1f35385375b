"""Gradients of a module by weights, activations and masks, with checkpointed activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import onnx_ir as ir
import torch

from lwc.backends.checks import check_feed
from lwc.backends.fx.segments import Sizes, segmented
from lwc.backends.fx.walk import lowered
from lwc.core.errors import LwcError, UsageError
from lwc.core.torch_types import array_of, tensor_of_array
from lwc.pipeline.gradients import Gradients
from lwc.pipeline.options import did_you_mean

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.gradients import GradientRequest, Loss
    from lwc.pipeline.passes import Feed

__all__ = ["FxGradientRunner"]

Array = np.ndarray[Any, Any]

_TOLD = 5
"""Names that an error lists at most."""


class FxGradientRunner:
    """A module in PyTorch, differentiated by what is asked for; see `GradientRunner`.

    Args:
        module: The module; it is not changed.
        request: What to differentiate by.
        threads: Threads of one operator between entering and leaving; PyTorch's choice by default.

    Raises:
        LwcError: An operator has no lowering, or what is asked for is not there or no
            floating-point tensor, masks included.
        UsageError: There is to be less than one segment.
    """

    def __init__(
        self, module: Module, request: GradientRequest, *, threads: int | None = None
    ) -> None:
        if request.segments is not None and request.segments < 1:
            raise UsageError(f"segments={request.segments} is no number above 0")
        self._file = module.source.path
        self._request = request
        self._threads = threads
        self._threads_before = torch.get_num_threads()
        self._inputs = {value.name or "": value for value in module.graph.inputs}
        places = [*request.masks, *request.values]
        self._whole = lowered(module, straight_through=request.straight_through, expose=places)
        self._names: list[str] = self._whole.meta["lwc"]["inputs"]
        named = self._whole.meta["lwc"]["outputs"]
        self._outputs: list[str] = named[: len(named) - len(places)]
        self.parameters: Mapping[str, Any] = self._chosen(module)
        self._gates, self._taps = self._inserted(request)
        self._run: Any = self._whole
        self._largest = -1
        self.segments, self.kept = 1, 0

    def loss(self, feed: Feed, loss: Loss) -> float:
        """Return the loss on a feed; nothing is kept for gradients."""
        with torch.no_grad():
            return float(self._forward(feed, loss))

    def backward(self, feed: Feed, loss: Loss, factor: float = 1.0) -> float:
        """Add `factor` times the gradients to `grad` of the parameters; return the loss.

        Raises:
            LwcError: The feed does not fit, a node fails, or the loss is no scalar, depends on
                nothing that is asked for, or asks for an output or input that is not there.
        """
        found = self._forward(feed, loss)
        if not found.requires_grad:
            raise LwcError(
                "the loss does not depend on what it is to be differentiated by", file=self._file
            )
        (found if factor == 1.0 else found * factor).backward()
        return float(found.detach())

    def each(self, feeds: Iterable[Feed], loss: Loss) -> Iterator[Gradients]:
        """Yield the gradients of each feed alone.

        Raises:
            LwcError: See `backward`; or a gradient is not finite.
        """
        for feed in feeds:
            self._forget()
            yield self._taken(self.backward(feed, loss))

    def total(
        self, feeds: Iterable[Feed], loss: Loss, reduction: Literal["sum", "mean"] = "sum"
    ) -> Gradients:
        """Return loss and gradients, summed or averaged over feeds.

        Raises:
            LwcError: There are no feeds, activations have other shapes in some of them, or a
                gradient is not finite.
        """
        self._forget()
        losses = [self.backward(feed, loss) for feed in feeds]
        if not losses:
            raise LwcError("there are no feeds to differentiate on", file=self._file)
        return self._taken(sum(losses), 1 / len(losses) if reduction == "mean" else 1.0)

    def __enter__(self) -> Self:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads_before)

    # Making

    def _chosen(self, module: Module) -> dict[str, torch.nn.Parameter]:
        """Freeze all weights but those asked for, and return these."""
        held = {**dict(self._whole.named_parameters()), **dict(self._whole.named_buffers())}
        named = {
            name: held[key]
            for key, places in self._whole.meta["lwc"]["weights"].items()
            for graph, name in places
            if graph == 0
        }
        for parameter in self._whole.parameters():
            parameter.requires_grad_(False)
        chosen = {}
        for name in self._request.weights:
            parameter = named.get(name)
            if parameter is None:
                raise LwcError(
                    f"the main graph has no weight '{name}' that a node reads as a tensor",
                    file=self._file,
                    remedy=did_you_mean(name, module.graph.initializers),
                )
            if not isinstance(parameter, torch.nn.Parameter):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise LwcError(f"weight '{name}' is {kind}, which has no gradient", file=self._file)
            chosen[name] = parameter.requires_grad_()
        return chosen

    def _inserted(self, request: GradientRequest) -> tuple[dict[str, _Gate], dict[str, _Tap]]:
        """Put a module behind each value asked for, in the place of the output that exposes it."""
        graph = self._whole.graph
        output = next(node for node in graph.nodes if node.op == "output")
        gates = {name: _Gate(name, mask) for name, mask in request.masks.items()}
        taps = {name: _Tap(name) for name in request.values}
        if gates or taps:
            declared, exposed = _divided(output.args[0], len(self._outputs))
            output.args = (declared if len(declared) > 1 else declared[0],)
            inserted = zip((*gates.values(), *taps.values()), exposed, strict=True)
            for number, (each, node) in enumerate(inserted):
                place = f"lwc_gradient_{number}"
                self._whole.add_module(place, each)
                with graph.inserting_after(_end(node)):
                    made = graph.call_module(place, (node,))
                node.replace_all_uses_with(made, lambda user, made=made: user is not made)
            self._whole.recompile()
        return gates, taps

    # Running

    def _forward(self, feed: Feed, loss: Loss) -> torch.Tensor:
        check_feed(self._inputs, feed, self._file)
        given = {
            name: tensor_of_array(
                feed[name], self._inputs[name].dtype or ir.tensor(feed[name]).dtype
            )
            for name in self._names
            if name in feed
        }
        arguments = [given.get(name) for name in self._names]
        self._divide(arguments)
        results = self._run(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        outputs = dict(zip(self._outputs, results, strict=True))
        found = loss(_Tensors("output", outputs, self._file), _Tensors("input", given, self._file))
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            raise LwcError("the loss is no tensor of one number", file=self._file)
        return found.reshape(())

    def _divide(self, arguments: list[Any]) -> None:
        """Cut the graph for the largest feed seen so far."""
        request = self._request
        size = sum(each.nbytes for each in arguments if isinstance(each, torch.Tensor))
        if size <= self._largest or (request.segments is None and request.max_memory is None):
            return
        self._largest = size
        plan = Sizes(self._whole, arguments).plan(request.segments, request.max_memory)
        self.segments, self.kept = plan.segments, plan.kept
        self._run = segmented(self._whole, plan)

    def _forget(self) -> None:
        for parameter in (*self.parameters.values(), *(g.mask for g in self._gates.values())):
            parameter.grad = None
        for tap in self._taps.values():
            tap.gradient = None

    def _taken(self, loss: float, factor: float = 1.0) -> Gradients:
        def arrays(
            what: str, found: Mapping[str, tuple[torch.Tensor | None, torch.Tensor]]
        ) -> dict[str, Array]:
            made = {}
            for name, (kept, like) in found.items():
                gradient = torch.zeros_like(like, device="cpu") if kept is None else kept
                odd = gradient[~gradient.isfinite()]
                if len(odd):
                    raise LwcError(
                        f"the gradient by {what} '{name}' is {odd[0]:g}, where the loss is "
                        f"{loss:g}",
                        file=self._file,
                        remedy="look for a number that is not finite, or a slope that is infinite, "
                        "in the model, the feed or the loss",
                    )
                scaled = gradient * factor if factor != 1.0 else gradient
                made[name] = np.array(array_of(scaled, None))
            return made

        weights = {name: (each.grad, each) for name, each in self.parameters.items()}
        values = {name: (tap.gradient, tap.like) for name, tap in self._taps.items()}
        masks = {name: (gate.mask.grad, gate.mask) for name, gate in self._gates.items()}
        return Gradients(
            loss * factor,
            arrays("weight", weights),
            arrays("value", values),
            arrays("the mask of value", masks),
        )


class _Tensors(dict[str, Any]):
    """Tensors by name, which tell a loss that asks for another what there is."""

    def __init__(self, what: str, named: Mapping[str, Any], file: str | None) -> None:
        super().__init__(named)
        self._what, self._file = what, file

    def __missing__(self, name: str) -> Any:
        there = ", ".join(f"'{each}'" for each in [*self][:_TOLD]) or "none"
        more = ", …" if len(self) > _TOLD else ""
        raise LwcError(
            f"the loss asks for {self._what} '{name}', where there is {there}{more}",
            file=self._file,
            remedy=did_you_mean(name, self),
        )


class _Gate(torch.nn.Module):  # type: ignore[misc]
    """Multiplies a value by a mask."""

    def __init__(self, name: str, mask: Array) -> None:
        super().__init__()
        if not isinstance(mask, np.ndarray) or mask.dtype.kind != "f":
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise LwcError(
                f"the mask of value '{name}' is {kind}, which has no gradient",
                remedy="give an array of floats",
            )
        self.name = name
        self.mask = torch.nn.Parameter(torch.from_numpy(np.array(mask)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = self.mask.to(_floating(x, self.name).dtype)
        try:
            return x * factors.expand_as(x)
        except RuntimeError as error:
            raise LwcError(
                f"a mask {list(factors.shape)} does not fit value '{self.name}' {list(x.shape)}",
                remedy="it must broadcast against the value without widening it",
            ) from error


class _Tap(torch.nn.Module):  # type: ignore[misc]
    """Passes a value on, and keeps the gradient by it.

    Where a segment is computed anew its hooks are set again, on tensors through which nothing is
    propagated.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.gradient: torch.Tensor | None = None
        self.like = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _floating(x, self.name)
        if torch.is_grad_enabled():
            # A new tensor: a segment's input is the same one when it is computed anew.
            y = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
            self.like = torch.empty_like(y, device="meta")
            y.register_hook(self._keep)
        return y

    def _keep(self, gradient: torch.Tensor) -> None:
        if self.gradient is not None and self.gradient.shape != gradient.shape:
            raise LwcError(
                f"value '{self.name}' has other shapes in other feeds, so gradients do not add up",
                remedy="take them feed by feed",
            )
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


def _floating(x: Any, name: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise LwcError(f"value '{name}' is no floating-point tensor, so it has no gradient")
    return x


def _divided(results: Any, count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(results[:count]), tuple(results[count:])


def _end(node: torch.fx.Node) -> torch.fx.Node:
    """Return where something may be put behind a node: placeholders stay together."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node
