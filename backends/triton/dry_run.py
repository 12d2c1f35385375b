"""What a lowered module would launch on a GPU, found out without one.

Floating-point tensors need no content for that and lie on torch's `meta` device, the weights too.
Integers do, as masks and positions end in extents: what follows from integers alone is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lwc.backends.fx.module import described
from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.operation import Launch
from lwc.backends.triton.recording import recording
from lwc.core.errors import LwcError

__all__ = ["dry_run"]


def dry_run(
    graph_module: torch.fx.GraphModule, inputs: Sequence[Any], architecture: Architecture
) -> dict[str, list[Launch]]:
    """Return what each call of a lowered module launches, by the call's name.

    The first candidate of each operation is taken, as no other is known to be faster.

    Args:
        graph_module: What `lwc.to_triton` made.
        inputs: Its inputs: floating-point tensors for their shapes, integers for their content.
        architecture: The GPU.

    Raises:
        LwcError: Inputs do not fit, or a number is read from what is not computed here.
    """
    run = _DryRun(graph_module, architecture)
    with torch.no_grad():
        run.run(*inputs)
    return run.launches


class _DryRun(torch.fx.Interpreter):  # type: ignore[misc]
    """Computes integers and records launches."""

    def __init__(self, graph_module: torch.fx.GraphModule, architecture: Architecture) -> None:
        super().__init__(graph_module)
        self.architecture = architecture
        self.file = graph_module.meta["lwc"]["file"]
        self.launches: dict[str, list[Launch]] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        where = described(node) if "onnx" in node.meta else node.name
        with recording(self.architecture) as recorder:
            try:
                result = super().run_node(node)
            except LwcError as error:
                error.file, error.node = error.file or self.file, error.node or where
                raise
            except (NotImplementedError, RuntimeError, ValueError, IndexError) as error:
                said = str(error).splitlines()[0]
                large = "allocate memory" in said  # of PyTorch, which has no error for it
                raise LwcError(
                    "the integers that it computes do not fit into memory"
                    if large
                    else f"what it would launch is not known: {said}",
                    file=self.file,
                    node=where,
                    remedy=f"give {'smaller' if large else 'other'} numbers for the dimensions",
                ) from error
        self.launches[node.name] = recorder.launches
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _contentless(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _contentless(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _is_abstract((args, kwargs)):
            return super().call_function(target, args, kwargs)
        with torch.device("meta"):
            return super().call_function(target, _on_meta(args), _on_meta(kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if _is_abstract((args, kwargs)):
            args, kwargs = _on_meta(args), _on_meta(kwargs)
        return super().call_method(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        weights = {name: tensor.to("meta") for name, tensor in module.named_buffers()}
        return torch.func.functional_call(module, weights, _on_meta(args), _on_meta(kwargs))


def _contentless(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to("meta") if floating else value


def _on_meta(values: Any) -> Any:
    return torch.fx.node.map_aggregate(
        values, lambda each: each.to("meta") if isinstance(each, torch.Tensor) else each
    )


def _is_abstract(values: Any) -> bool:
    found = []
    torch.fx.node.map_aggregate(values, lambda each: found.append(getattr(each, "is_meta", False)))
    return any(found)
