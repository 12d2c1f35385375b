"""What the modules that lwc emits are made of, besides kernels and operators."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lwc.backends.triton.run import running_on
from lwc.core.errors import InputError, LwcError

__all__ = ["attach", "loaded", "on_its_device"]

_ANEW = "emit the folder anew, and keep its files together"

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
        InputError: There is no such file, it is damaged, or its tensors are not those of the model.
        LwcError: There is no such device.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise LwcError(
            "there is no GPU to load the weights to",
            file=file,
            remedy="set TRITON_INTERPRET=1 before Python starts, and device='cpu'",
        )
    with torch.device("meta"):
        made = model()
    try:
        state = load_file(file, device=device)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights cannot be read: {error}", file=file, remedy=_ANEW) from error
    wanted = {name: _kind(tensor) for name, tensor in made.state_dict().items()}
    found = {name: _kind(tensor) for name, tensor in state.items()}
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"'{name}' is {found.get(name, 'not there')}, and {wanted.get(name, 'not there')} "
                "in model.py",
                file=file,
                remedy=_ANEW,
            )
    made.load_state_dict(state, assign=True)
    made.eval()
    return made


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


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
