"""What a pass gets that needs gradients: a module that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    from lwc.pipeline.passes import Feed

__all__ = ["GradientRequest", "GradientRunner", "Gradients", "Loss"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Tensors: TypeAlias = Mapping[str, Any]

Loss: TypeAlias = Callable[[Tensors, Tensors], Any]
"""Given the outputs and the inputs of a run, by name, as torch tensors: a scalar tensor."""


@dataclass(frozen=True)
class GradientRequest:
    """What a loss is to be differentiated by.

    Attributes:
        weights: Initializers of the main graph, by name. One tensor under two names is one weight,
            which both names give.
        values: Activations: floating-point values of the main graph, graph inputs included.
        masks: Factors by the value of the main graph that they multiply, wherever that is read or
            leaves the graph. They broadcast against it: `[channels]` is one gate for each channel,
            and `[batch, 1, channels]` one for each channel of each sample, whose gradients are
            those of the single samples.
        segments: Into how many consecutive segments the graph is cut. Of all but the last only
            the inputs are kept for the backward pass, which computes the rest anew (Chen et al.
            2016). None takes as few as keep the activations within `max_memory`.
        max_memory: Bytes that activations kept for the backward pass may take; None for any.
        straight_through: Rounding passes gradients on as if it were not there.
    """

    weights: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    masks: Mapping[str, Array] = field(default_factory=dict)
    segments: int | None = None
    max_memory: int | None = None
    straight_through: bool = True


@dataclass(frozen=True)
class Gradients:
    """A loss and its gradients, each of the shape and type of what it belongs to.

    Attributes:
        loss: The loss.
        weights: By the name of the initializer.
        values: By the name of the value.
        masks: By the name of the value that is multiplied.
    """

    loss: float
    weights: Mapping[str, Array] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict)
    masks: Mapping[str, Array] = field(default_factory=dict)


class GradientRunner(Protocol):
    """A module that can be differentiated by what a `GradientRequest` names.

    Attributes:
        parameters: The weights asked for, by initializer, as torch Parameters: what an optimizer
            takes. The module keeps its own.
        segments: Segments the graph is cut into for the feeds seen so far; 1 before the first.
        kept: Bytes of activations that are held at once for the backward pass, as measured on the
            largest feed seen so far; 0 where no bound and no number of segments was asked for.
    """

    parameters: Mapping[str, Any]
    segments: int
    kept: int

    def loss(self, feed: Feed, loss: Loss) -> float:
        """Return the loss on a feed; nothing is kept for gradients."""

    def backward(self, feed: Feed, loss: Loss, factor: float = 1.0) -> float:
        """Add `factor` times the gradients to `grad` of the parameters; return the loss."""

    def each(self, feeds: Iterable[Feed], loss: Loss) -> Iterator[Gradients]:
        """Yield the gradients of each feed alone: what Fisher information squares."""

    def total(
        self, feeds: Iterable[Feed], loss: Loss, reduction: Literal["sum", "mean"] = "sum"
    ) -> Gradients:
        """Return loss and gradients, summed or averaged over feeds of the same shapes."""
