"""Weights of a module as Parameters and buffers, under names that follow those of ONNX."""

from __future__ import annotations

import keyword
import re
from typing import Any

import onnx_ir as ir
import torch

from lwc.backends.fx.module import OnnxGraphModule
from lwc.core.module import Module
from lwc.core.torch_types import is_floating, tensor_of_array
from lwc.core.walk import constant_tensor, is_default_domain
from lwc.core.weights import reading

__all__ = ["Weights", "free_attribute", "identifier"]

_TAKEN = frozenset(dir(OnnxGraphModule(torch.nn.Module(), torch.fx.Graph())))
"""What a GraphModule has of its own, such as `graph`, `code` and `meta`."""


class Weights:
    """The Parameters and buffers made so far: one for each tensor, however many values read it.

    Args:
        module: The module whose weights they are.
    """

    def __init__(self, module: Module) -> None:
        self._made: dict[int, Any] = {}
        self._sources: list[object] = []
        self._places: dict[int, list[tuple[int, str]]] = {}
        for index, graph in enumerate(module.graphs()):
            for name, value in graph.initializers.items():
                self._places.setdefault(id(value.const_value), []).append((index, name))
            for node in graph:
                if node.op_type == "Constant" and is_default_domain(node):
                    (output,) = node.outputs
                    key, title = id(_holder(output)), output.name or ""
                    self._places.setdefault(key, []).append((index, title))

    def attach(self, root: torch.nn.Module, value: ir.Value) -> str:
        """Register the weight of a value in `root`; return the name it has there, with dots.

        Raises:
            LwcError: PyTorch has no tensors of its type.
        """
        tensor = value.const_value if value.is_initializer() else constant_tensor(value)
        assert tensor is not None
        holder = _holder(value)
        made = self._made.get(id(holder))
        if made is None:
            made = self._made[id(holder)] = _weight(tensor, id(holder) in self._places)
            self._sources.append(holder)  # so that nothing else gets its identity
        owner, name, path = _owner(root, value.name or "weight")
        if isinstance(made, torch.nn.Parameter):
            owner.register_parameter(name, made)
        elif isinstance(made, torch.Tensor):
            owner.register_buffer(name, made)
        else:
            setattr(owner, name, made)
        return path

    def places(self, made: torch.nn.Module) -> dict[str, list[tuple[int, str]]]:
        """Map each Parameter and buffer of a lowered module to where the module has it.

        A place is the position of a graph among `Module.graphs()` and the name of a value in it.
        """
        origins = {id(self._made[id(source)]): id(source) for source in self._sources}
        found = {}
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            origin = origins.get(id(tensor))
            if origin in self._places:
                found[name] = self._places[origin]
        return found


def _holder(value: ir.Value) -> object:
    """Return what is the same wherever a weight is: its tensor, or the attribute of its numbers.

    A Constant of plain numbers makes a new tensor each time it is asked, and small integers are
    one object for all of them; attributes are shared by copies of a node, and by calls of its
    function.
    """
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    assert producer is not None
    (attribute,) = producer.attributes.values()
    return attribute.value if attribute.type == ir.AttributeType.TENSOR else attribute


def _weight(tensor: ir.TensorProtocol, placed: bool) -> Any:
    with reading(tensor) as array:
        copy = tensor_of_array(array, tensor.dtype)
    # What a call gives its function as an attribute has no place to which it could come back.
    if not (placed and is_floating(tensor.dtype)):
        return copy
    # A scalar is an epsilon or a divisor far more often than something to be trained.
    return torch.nn.Parameter(copy, requires_grad=copy.dim() > 0)


def _owner(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str, str]:
    """Find the submodule that a dotted name leads to, made where it is not there yet.

    Returns:
        The submodule, a free name in it, and the path from `root`.
    """
    parts = [name] if "/" in name else name.split(".")
    *folders, last = map(_attribute, parts)
    owner = root
    for folder in folders:
        inner = getattr(owner, folder, None)
        if inner is None and not (owner is root and folder in _TAKEN):
            inner = torch.nn.Module()
            owner.add_module(folder, inner)
        elif type(inner) is not torch.nn.Module:
            owner, folders, last = root, [], "_".join([*folders, last])
            break
        owner = inner
    last = free_attribute(owner, last)
    return owner, last, ".".join([*folders, last])


def free_attribute(root: torch.nn.Module, name: str) -> str:
    """Return a name that `root` has no attribute of, `name` itself if it is free."""
    found, count = name, 0
    while hasattr(root, found) or found in _TAKEN:
        count += 1
        found = f"{name}_{count}"
    return found


def identifier(name: str) -> str:
    """Return a name with what Python does not allow in it replaced by underscores."""
    plain = _attribute(name)
    if plain == "self":  # generated code is a method
        return "self_"
    return f"_{plain}" if plain[0].isdigit() else plain


def _attribute(name: str) -> str:
    """Return a name for an attribute of a module, which may begin with a digit.

    It begins with no underscore: Python gives names with two another meaning within a class.
    """
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "unnamed"
    return f"{plain}_" if keyword.iskeyword(plain) else plain
