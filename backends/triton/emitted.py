"""What the modules that lwc emits are made of, besides kernels and operators."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lwc.backends.triton.run import running_on

__all__ = ["attach", "loaded", "on_its_device"]

Model = TypeVar("Model", bound="torch.nn.Module")


def attach(root: torch.nn.Module, path: str, made: torch.nn.Module | torch.Tensor) -> None:
    """Register a module, or a tensor as a buffer, at a path of submodules, made where they lack."""
    *folders, name = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, torch.nn.Module())
        root = getattr(root, folder)
    if isinstance(made, torch.nn.Module):
        root.add_module(name, made)
    else:
        root.register_buffer(name, made)


def loaded(model: Callable[[], Model], file: Path, device: str) -> Model:
    """Return a model with the weights of a safetensors file, on a device.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: Its tensors are not those of the model.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        made = model()
    made.load_state_dict(load_file(file, device=device), assign=True)
    made.eval()
    return made


def on_its_device(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method run where its module's weights lie, without gradients."""

    @functools.wraps(forward)
    def run(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A model without weights runs where its inputs lie.
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        device = next(itertools.chain(self.buffers(), tensors), torch.empty(0)).device
        with running_on(device.type):
            return forward(self, *args, **kwargs)

    return run
