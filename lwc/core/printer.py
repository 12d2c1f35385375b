"""Print modules for people: one line per node, weights elided, a type on every value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lwc.core.text import printable
from lwc.core.walk import op_name

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["print_module", "print_node"]

_INDENT = "  "
_SHOWN_ELEMENTS = 8
_SHOWN_TEXT = 60


def print_module(module: Module) -> str:
    """Return a module as text."""
    model = module.model
    opsets = ", ".join(
        f"{domain or 'ai.onnx'} {v}" for domain, v in sorted(model.opset_imports.items())
    )
    lines = [f"opset {opsets}"]
    lines += _graph(f"graph {model.graph.name or ''}".rstrip(), model.graph)
    for function in model.functions.values():
        name = f"{function.domain}::{function.name}"
        if function.overload:
            name += f":{function.overload}"
        attributes = ", ".join(
            key if attribute.value is None else f"{key}={_attribute_text(attribute)}"
            for key, attribute in function.attributes.items()
        )
        title = f"function {name}<{attributes}>" if attributes else f"function {name}"
        lines += ["", *_graph(title, function.graph)]
    # Names may hold line breaks too.
    return "".join(printable(line).replace("\n", "\\n") + "\n" for line in lines)


def print_node(node: ir.Node) -> str:
    """Return a node as text: one line, and more for its subgraphs."""
    return "\n".join(_node(node))


def _graph(title: str, graph: ir.Graph) -> list[str]:
    inputs = ", ".join(_typed(value) for value in graph.inputs)
    lines = [f"{title}({inputs}) {{"]
    for value in graph.initializers.values():
        lines.append(f"{_INDENT}{_typed(value)} = {_tensor_text(value.const_value)}")
    for node in graph:
        lines += [_INDENT + line for line in _node(node)]
    outputs = ", ".join(_typed(value) for value in graph.outputs)
    lines += [f"{_INDENT}return {outputs}".rstrip(), "}"]
    return lines


def _node(node: ir.Node) -> list[str]:
    outputs = ", ".join(_typed(value) if value.name else "_" for value in node.outputs)
    inputs = ", ".join("_" if value is None else f"%{value.name}" for value in node.inputs)
    plain = [
        f"{name}={_attribute_text(attribute)}"
        for name, attribute in sorted(node.attributes.items())
        if attribute.is_ref() or attribute.type not in _GRAPH_TYPES
    ]
    overload = f":{node.overload}" if node.overload else ""
    line = f"{op_name(node)}{overload}({inputs})"
    if outputs:
        line = f"{outputs} = {line}"
    if plain:
        line += f" {{{', '.join(plain)}}}"
    if node.name:
        line += f"  # {node.name}"
    lines = [line]
    for name, graph in _named_subgraphs(node):
        lines += [_INDENT + inner for inner in _graph(name, graph)]
    return lines


_GRAPH_TYPES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _named_subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for position, graph in enumerate(attribute.as_graphs()):
                yield f"{name}[{position}]", graph


def _typed(value: ir.Value) -> str:
    return f"%{value.name}: {_type_text(value.type, value.shape)}"


def _type_text(kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> str:
    if kind is None:
        return "?" if shape is None else f"?{_shape_text(shape)}"
    if isinstance(kind, ir.SequenceType):
        return f"seq({_type_text(kind.elem_type, shape)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_type_text(kind.elem_type, shape)})"
    dims = "[...]" if shape is None else _shape_text(shape)
    text = f"{kind.dtype.short_name()}{dims}"
    return f"sparse({text})" if isinstance(kind, ir.SparseTensorType) else text


def _shape_text(shape: ir.Shape) -> str:
    dims = (str(dim) if isinstance(dim, int) else dim.value or "?" for dim in shape)
    return f"[{', '.join(dims)}]"


def _tensor_text(tensor: ir.TensorProtocol | None) -> str:
    if tensor is None:
        return "?"
    if tensor.size > _SHOWN_ELEMENTS:
        return "..."
    return _elements(tensor.numpy())


def _elements(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
    if array.ndim == 0:
        return _scalar_text(array[()])
    return f"[{', '.join(_elements(row) for row in array)}]"


def _scalar_text(element: object) -> str:
    if isinstance(element, bytes):
        return _string_text(element)
    return str(element)


def _string_text(content: str | bytes) -> str:
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    return repr(text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 3] + "...")


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    kind, value = attribute.type, attribute.value
    if kind == ir.AttributeType.TENSOR:
        return _constant_text(value)
    if kind == ir.AttributeType.TENSORS:
        return f"[{', '.join(_constant_text(tensor) for tensor in value)}]"
    if kind == ir.AttributeType.FLOAT:
        return str(np.float32(value))
    if kind == ir.AttributeType.STRING:
        return _string_text(value)
    if kind in _LISTS:
        items = [
            str(np.float32(item))
            if kind == ir.AttributeType.FLOATS
            else _string_text(item)
            if kind == ir.AttributeType.STRINGS
            else str(item)
            for item in value[:_SHOWN_ELEMENTS]
        ]
        if len(value) > _SHOWN_ELEMENTS:
            items.append(f"... {len(value)} in all")
        return f"[{', '.join(items)}]"
    if kind == ir.AttributeType.TYPE_PROTO:
        return _type_text(value.type, value.shape)
    return str(value)


_LISTS = (ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS)


def _constant_text(tensor: ir.TensorProtocol) -> str:
    kind = _type_text(ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy()))
    return f"{kind} {_tensor_text(tensor)}"
