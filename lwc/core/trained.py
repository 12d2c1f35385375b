"""Weights trained in PyTorch, back in the module they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.core.errors import LwcError, MissingExtraError
from lwc.core.walk import constant_tensor, is_default_domain
from lwc.core.weights import reading

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["update_weights"]


def update_weights(module: Module, graph_module: Any) -> list[str]:
    """Replace the weights that changed; see `Module.update_weights`."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("writing back what was trained", "torch") from error
    from lwc.core.torch_types import array_of, held_as

    places = getattr(graph_module, "meta", {}).get("lwc", {}).get("weights")
    if places is None:
        raise LwcError(
            "the weights do not come from a module",
            file=module.source.path,
            remedy="give what lwc.to_fx returned, or a copy of it",
        )
    held = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers())}
    graphs = list(module.graphs())
    checked: list[tuple[ir.Value, ir.TensorProtocol, torch.Tensor]] = []
    for key, spots in places.items():
        if key not in held:
            raise LwcError(
                f"the graph module has no weight '{key}' any more",
                file=module.source.path,
                remedy="train what lwc.to_fx returned without taking weights out of it",
            )
        for index, name in spots:
            value, old = _weight(module, graphs[index] if index < len(graphs) else None, name)
            new = held[key]
            if new.dtype != held_as(old.dtype) or tuple(new.shape) != tuple(old.shape.numpy()):
                raise LwcError(
                    f"weight '{name}' is {old.dtype.name.lower()} {list(old.shape.numpy())}, but "
                    f"'{key}' is {str(new.dtype).removeprefix('torch.')} {list(new.shape)}",
                    file=module.source.path,
                    remedy="keep types and shapes while training",
                )
            _check_finite(name, old, array_of(new, old.dtype), module)
            checked.append((value, old, new))
    changed = []
    for value, old, new in checked:
        array = array_of(new, old.dtype)
        with reading(old) as before:
            same = np.array_equal(_bits(before), _bits(array))
        if not same:
            _replace(module, value, ir.Tensor(np.array(array), dtype=old.dtype, name=value.name))
            changed.append(value.name or "")
    return changed


def _weight(
    module: Module, graph: ir.Graph | None, name: str
) -> tuple[ir.Value, ir.TensorProtocol]:
    """Find a value that is an initializer, or the output of a Constant."""
    if graph is not None:
        value = graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            return value, value.const_value
        for node in graph:
            if node.op_type == "Constant" and is_default_domain(node):
                (output,) = node.outputs
                tensor = constant_tensor(output) if output.name == name else None
                if tensor is not None:
                    return output, tensor
    raise LwcError(
        f"the module has no weight '{name}'",
        file=module.source.path,
        remedy="update the module that was lowered, before other passes change it",
    )


def _check_finite(
    name: str, old: ir.TensorProtocol, new: np.ndarray[Any, Any], module: Module
) -> None:
    """Check that training brought no NaN or infinity into a weight; those it had may stay."""
    if not old.dtype.is_floating_point() or (finite := np.isfinite(new)).all():
        return
    with reading(old) as before:
        same = (before == new) | (np.isnan(before) & np.isnan(new))
    places = np.argwhere(~finite & ~same)
    if len(places):
        first = places[0].tolist()
        where = f" at {first}" if first else ""
        raise LwcError(
            f"weight '{name}' has {float(new[tuple(first)])}{where}, which it did not have before",
            file=module.source.path,
            remedy="train with a lower learning rate, or look at the loss",
        )


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bytes of an array: NaN and -0 are told apart as they are."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _replace(module: Module, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    kept = module.spilled(tensor)
    producer = value.producer()
    if producer is None:
        module.replace_initializer(value, kept)
        return
    producer.attributes.clear()  # it may have been spelled as plain numbers
    producer.attributes["value"] = ir.AttrTensor("value", kept)
    if value.const_value is not None:
        value.const_value = kept
