"""Near misses of the whole graph: other element types; and constants that are not all alike."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lwc.core.walk import constant_tensor, is_default_domain
from lwc.verify.generate.mutant import Mutant

__all__ = ["mixed_constant", "retyped"]

_FLOAT = ir.DataType.FLOAT
_TYPES = (ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.INT32)


def retyped(m: Mutant) -> str | None:
    """Every float32 of the graph is of another type: a rule may hold for one and not for all."""
    target = m.choose(*_TYPES)
    changed = 0
    for graph in m.module.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            tensor = value.const_value
            if value.dtype != _FLOAT:
                continue
            value.type = ir.TensorType(target)
            changed += 1
            if tensor is not None:
                value.const_value = _cast(tensor, target)
        for node in graph:
            if not is_default_domain(node):
                continue
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    held = attribute.as_tensor()
                    if held.dtype == _FLOAT:
                        node.attributes[name] = ir.AttrTensor(name, _cast(held, target))
                elif node.op_type == "Cast" and name == "to" and attribute.value == int(_FLOAT):
                    node.attributes[name] = ir.AttrInt64(name, int(target))
    return f"float32 is {target.name.lower()}" if changed else None


def _cast(tensor: ir.TensorProtocol, target: ir.DataType) -> ir.TensorProtocol:
    array = tensor.numpy()
    # Twice as large, so that not every weight becomes a zero or a one.
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.rint(array * 2) if target.is_integer() else array
        return ir.Tensor(whole.astype(target.numpy()), name=tensor.name)


def mixed_constant(m: Mutant) -> str | None:
    """A constant is a row whose elements differ, the first of them what all were."""

    def fits(node: ir.Node, index: int) -> bool:
        tensor = constant_tensor(node.inputs[index])
        return tensor is not None and 0 < tensor.size <= 4096 and tensor.dtype == _FLOAT

    place = m.use(fits)
    if place is None:
        return None
    node, index = place
    tensor = constant_tensor(node.inputs[index])
    assert tensor is not None
    array = np.array(tensor.numpy())
    if array.size == 1:
        other = next((v for i, v in enumerate(node.inputs) if i != index and v is not None), None)
        shape = m.shapes.shape(other) if other is not None else None
        last = shape[-1] if shape else None
        if not isinstance(last, int) or last < 2:
            return None
        array = np.full((*array.shape[:-1], last), array.flat[0])
    array.flat[-1] = array.flat[0] + m.choose(1.0, -2.0, 0.25)
    m.put(node, index, array)
    return f"input {index} of {node.op_type} is not one number"
