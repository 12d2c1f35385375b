"""From a module to a torch.fx.GraphModule, and trained weights back into the module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lwc.core.errors import MissingExtraError
from lwc.frontend.load import as_module

if TYPE_CHECKING:
    import torch

    from lwc.backends.base import Backend
    from lwc.backends.fx.gradients import FxGradientRunner
    from lwc.core.module import Module
    from lwc.pipeline.gradients import GradientRequest

__all__ = ["make_backend", "make_gradient_runner", "to_fx"]


def to_fx(
    module: Any, *, straight_through: bool = False, expose: Sequence[str] = ()
) -> torch.fx.GraphModule:
    """Return a module as a differentiable `torch.fx.GraphModule` of plain PyTorch operators.

    It takes the graph's inputs in order, as tensors, and returns its output, or a tuple of them.
    Integers for floats, or the other way round, another rank, and another extent than one that the
    graph declares in numbers are an LwcError; floats of another type and extents that disagree with
    a name are let through. One call stands for each ONNX node and keeps its name, as far as that is
    an identifier;
    `node.meta["onnx"]` tells where it comes from: `name`, `op`, `outputs`, and what passes wrote
    (`lwc.pass`). Floating-point weights are Parameters and all others buffers, under the names of
    their initializers; scalars are Parameters that ask for no gradient. Weights are copied, one at
    a time.

    Args:
        module: A `Module`, or what else `lwc.optimize` takes; it is not changed. A PyTorch module
            needs example inputs, so `lwc.trace` it first.
        straight_through: Rounding and quantization pass gradients on as if they were not there.
            Quantized values are floating-point tensors of whole numbers then.
        expose: Names of values of the main graph to return after the outputs.

    Raises:
        LwcError: An operator has no lowering; the message names the node.
        InputError: It is no model.
        MissingExtraError: PyTorch is not installed.
    """
    _need_torch()
    from lwc.backends.fx.walk import lowered

    return lowered(as_module(module), straight_through=straight_through, expose=expose)


def make_backend() -> Backend:
    """Return the `fx` backend.

    Raises:
        MissingExtraError: PyTorch is not installed.
    """
    _need_torch()
    from lwc.backends.fx.session import FxBackend

    return FxBackend()


def make_gradient_runner(
    module: Module, request: GradientRequest, *, threads: int | None = None
) -> FxGradientRunner:
    """Return a module that can be differentiated; see `lwc.backends.fx.gradients`.

    Raises:
        LwcError: An operator has no lowering, or what is asked for is not there.
        MissingExtraError: PyTorch is not installed.
    """
    _need_torch("a gradient")
    from lwc.backends.fx.gradients import FxGradientRunner

    return FxGradientRunner(module, request, threads=threads)


def _need_torch(what: str = "a torch.fx.GraphModule") -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(what, "torch") from error
