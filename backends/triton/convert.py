"""From a module to a torch.fx.GraphModule that calls kernels in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lwc.backends.triton.availability import require_triton
from lwc.frontend.load import as_module

if TYPE_CHECKING:
    import torch

    from lwc.backends.base import Backend

__all__ = ["make_backend", "to_triton"]


def to_triton(module: Any, *, expose: Sequence[str] = ()) -> torch.fx.GraphModule:
    """Return a module as a `torch.fx.GraphModule` whose heavy nodes are kernels in Triton.

    It is what `lwc.to_fx` makes, with calls of kernels in place of the nodes that these compute;
    weights of products are packed for them, and weights that only those nodes read are gone. Where
    each node runs, and why a kernel does not compute it, is told in remarks of the module (applied,
    missed) and by `lwc.backends.triton.lower.placements`.

    Kernels give no gradients: weights ask for none, and an input that does is an error.

    It runs on a GPU after `.to("cuda")`, with `torch.set_default_device("cuda")` as operators make
    tensors too, or on the CPU where TRITON_INTERPRET=1 was set before Python started.

    Args:
        module: A `Module`, or what else `lwc.optimize` takes; it is not changed but for its
            remarks. A PyTorch module needs example inputs, so `lwc.trace` it first.
        expose: Names of values of the main graph to return after the outputs.

    Raises:
        LwcError: An operator has no lowering; the message names the node.
        InputError: It is no model.
        MissingExtraError: PyTorch or Triton is not installed.
    """
    require_triton()
    from lwc.backends.triton.lower import lowered_to_kernels

    return lowered_to_kernels(as_module(module), expose=expose)


def make_backend() -> Backend:
    """Return the `triton` backend.

    Raises:
        MissingExtraError: PyTorch or Triton is not installed.
    """
    require_triton()
    from lwc.backends.triton.session import TritonBackend

    return TritonBackend()
