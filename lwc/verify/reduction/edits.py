"""Small edits that make a module simpler; the reducer tries each and keeps what still fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lwc.core.module import Module
from lwc.core.schemas import find_schema
from lwc.core.walk import attribute_graphs, graph_and_subgraphs, is_default_domain
from lwc.verify.reduction.extract import ExtractError, detach
from lwc.verify.reduction.observe import Observed

__all__ = [
    "Edit",
    "absent_inputs",
    "fixed_inputs",
    "inlined_bodies",
    "inlined_functions",
    "nested_bypasses",
    "shorter_weights",
    "smaller_extents",
    "unused_inputs",
]


@dataclass(frozen=True)
class Edit:
    """One simplification of the module it was made for.

    Attributes:
        key: What it is about; the same on what other edits made of the module.
        change: Applies it to a copy of the module; what it leaves unused stays.
    """

    key: tuple[object, ...]
    change: Callable[[Module], None]


_MOST_CONTENT = 64
"""Elements up to which an input becomes an initializer; more content is no simplification."""


def inlined_functions(module: Module) -> Iterator[Edit]:
    """Yield the edit that replaces every call of a function by its body."""
    if not module.model.functions:
        return

    def edit(twin: Module) -> None:
        from onnx_ir.passes.common import InlinePass

        twin.model = InlinePass()(twin.model).model

    yield Edit(("functions",), edit)


def inlined_bodies(module: Module) -> Iterator[Edit]:
    """Yield edits that put an If's branch, or one turn of a Loop, in its place."""
    for position, node in enumerate(module.nodes()):
        if not is_default_domain(node) or node.graph is None:
            continue
        if node.op_type == "If":
            for branch in ("then_branch", "else_branch"):
                yield _at(position, node, _inline_branch, branch)
        elif node.op_type == "Loop" and not _scans(node):
            yield _at(position, node, _inline_turn, "body")


def nested_bypasses(module: Module, observed: Observed) -> Iterator[Edit]:
    """Yield edits that replace a node of a body by one of its inputs of the same type and shape."""
    for position, node in reversed(list(enumerate(module.nodes()))):
        if node.graph is None or node.graph is module.graph or len(node.outputs) != 1:
            continue
        for index in range(len(node.inputs)):
            if may_replace(node.outputs[0], node.inputs[index], observed):
                yield _at(position, node, _bypass, index)


def may_replace(value: ir.Value, other: ir.Value | None, observed: Observed) -> bool:
    """Tell whether two values are known to have one type and shape."""
    if other is None:
        return False
    a, b = observed.of(value), observed.of(other)
    return a.type is not None and a.type == b.type and a.shape is not None and a.shape == b.shape


def absent_inputs(module: Module) -> Iterator[Edit]:
    """Yield edits that leave out one optional input of a node."""
    for position, node in enumerate(module.nodes()):
        for index, value in enumerate(node.inputs):
            if value is not None and _is_optional(module, node, index):
                yield _at(position, node, _leave_out, index)


def unused_inputs(module: Module) -> Iterator[Edit]:
    """Yield the edit that removes the inputs and initializers that nothing uses."""

    def edit(twin: Module) -> None:
        graph = twin.graph
        graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.is_graph_output()]
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                del graph.initializers[name]

    yield Edit(("unused",), edit)


def fixed_inputs(module: Module, observed: Observed) -> Iterator[Edit]:
    """Yield edits that turn a small graph input into an initializer with its observed content.

    The last input stays: a module without any is a constant, which other passes would fold.
    """
    if len(module.graph.inputs) < 2:
        return
    for value in module.graph.inputs:
        content = observed.of(value).content
        if content is None or value.name is None or content.size > _MOST_CONTENT:
            continue

        def edit(twin: Module, name: str = value.name, tensor: Any = content) -> None:
            graph = twin.graph
            (old,) = (each for each in graph.inputs if each.name == name)
            if not old.uses() or old.is_graph_output():
                return
            graph.inputs.remove(old)
            graph.initializers.pop(name, None)
            new = ir.Value(
                name=name, type=old.type, shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
            graph.register_initializer(new)
            for user, index in list(old.uses()):
                user.replace_input_with(index, new)

        yield Edit((value.name,), edit)


def smaller_extents(module: Module) -> Iterator[Edit]:
    """Yield edits that replace an extent by a small one: in all shapes, weights and targets.

    Weights are cut to the new length along every axis that has the old one.
    """
    sizes = {
        dim
        for value in (*module.graph.inputs, *module.graph.initializers.values())
        for dim in (value.shape or ())
        if isinstance(dim, int) and dim > 2
    }
    for old in sorted(sizes, reverse=True):
        for new in (2, 4, 8, 16, 32):
            if 2 * new <= old:
                yield Edit((old, new), _resizing(old, new))


def shorter_weights(module: Module) -> Iterator[Edit]:
    """Yield edits that round all floating-point weights to few digits, the fewest first."""
    for digits in (2, 4):

        def edit(twin: Module, digits: int = digits) -> None:
            for _, value in twin.initializers():
                tensor = value.const_value
                if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                    continue
                array = tensor.numpy()
                rounded = _rounded(array, digits)
                if not np.array_equal(array, rounded, equal_nan=True):
                    twin.replace_initializer(value, ir.Tensor(rounded))

        yield Edit((digits,), edit)


def _rounded(array: np.ndarray[Any, Any], digits: int) -> np.ndarray[Any, Any]:
    """Round to significant decimal digits."""
    exact = array.astype(np.float64)
    plain = np.isfinite(exact) & (exact != 0)
    magnitude = np.floor(np.log10(np.abs(np.where(plain, exact, 1.0))))
    scale = 10.0 ** (digits - 1 - magnitude)
    rounded = np.where(plain, np.round(exact * scale) / scale, exact)
    return rounded.astype(array.dtype)


def _at(position: int, node: ir.Node, change: Callable[..., None], argument: int | str) -> Edit:
    """Return an edit of a node, which the copy has at the same position among all nodes."""

    def edit(twin: Module) -> None:
        change(twin, next(itertools.islice(twin.nodes(), position, None)), argument)

    names = tuple(value.name for value in node.outputs)
    return Edit((change.__name__, node.op_type, names, argument), edit)


def _is_optional(module: Module, node: ir.Node, index: int) -> bool:
    domain = "" if is_default_domain(node) else node.domain
    version = module.model.graph.opset_imports.get(domain, 1)
    schema = find_schema(domain, node.op_type, version)
    if schema is None:
        return index >= 2
    if index >= len(schema.inputs):
        return False
    return bool(schema.inputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional)


def _leave_out(module: Module, node: ir.Node, index: int) -> None:
    node.replace_input_with(index, None)
    count = len(node.inputs)
    while count and node.inputs[count - 1] is None:
        count -= 1
    node.resize_inputs(count)


def _bypass(module: Module, node: ir.Node, index: int) -> None:
    value = node.inputs[index]
    assert value is not None
    _replace(node, [value])


def _replace(node: ir.Node, values: Sequence[ir.Value]) -> None:
    """Let other values take the place of a node's outputs, and remove it."""
    graph = node.graph
    assert graph is not None
    for old, new in zip(node.outputs, values, strict=False):
        if old.is_graph_output() and new.graph is not graph:
            raise ExtractError(f"'{new.name}' of an outer graph cannot be an output")
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        graph.outputs[:] = [new if each is old else each for each in graph.outputs]
        if new.type is None:
            new.type, new.shape = old.type, old.shape
    graph.remove(node)
    detach(node)


def _scans(node: ir.Node) -> bool:
    return len(node.outputs) > max(0, len(node.inputs) - 2)


def _inline_branch(module: Module, node: ir.Node, name: str) -> None:
    branch = node.attributes[name].as_graph()
    _inline(module, node, branch, list(branch.outputs))


def _inline_turn(module: Module, node: ir.Node, name: str) -> None:
    body = node.attributes[name].as_graph()
    start = [
        module.add_initializer("turn", np.array(0, np.int64)),
        module.add_initializer("go_on", np.array(True)),
    ]
    for inner, outer in zip(body.inputs, [*start, *node.inputs[2:]], strict=True):
        assert outer is not None
        for user, index in list(inner.uses()):
            user.replace_input_with(index, outer)
    given = dict(zip(body.inputs, [*start, *node.inputs[2:]], strict=True))
    _inline(module, node, body, [given.get(v) or v for v in list(body.outputs)[1:]])


def _inline(module: Module, node: ir.Node, body: ir.Graph, results: Sequence[ir.Value]) -> None:
    graph = node.graph
    assert graph is not None
    nodes, weights = list(body), list(body.initializers.values())
    body.outputs[:] = []
    body.remove(nodes)
    body.initializers.clear()
    others = [g for g in attribute_graphs(node) if g is not body]
    leaving = {
        value.name for other in others for deep in graph_and_subgraphs(other) for n in deep
        for value in n.outputs
    }  # fmt: skip
    for value in (*weights, *(v for n in nodes for v in n.outputs)):
        if value.name and value.name in leaving:
            value.name = module.fresh_name(value.name)
    for weight in weights:
        graph.register_initializer(weight)
    graph.insert_before(node, nodes)
    _replace(node, results)


def _resizing(old: int, new: int) -> Callable[[Module], None]:
    def edit(twin: Module) -> None:
        cut: dict[int, ir.TensorProtocol] = {}

        def resized(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
            if id(tensor) not in cut:
                cut[id(tensor)] = _resized(tensor, old, new)
            return cut[id(tensor)]

        for graph in twin.graphs():
            for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
                if value.shape is not None and old in value.shape:
                    value.shape = ir.Shape([new if dim == old else dim for dim in value.shape])
            for value in graph.initializers.values():
                if value.const_value is not None:
                    smaller = resized(value.const_value)
                    if smaller is not value.const_value:
                        twin.replace_initializer(value, smaller)
            for node in graph:
                if node.op_type == "Constant" and "value" in node.attributes:
                    tensor = node.attributes["value"].as_tensor()
                    smaller = resized(tensor)
                    if smaller is not tensor:
                        node.attributes["value"] = ir.AttrTensor("value", smaller)

    return edit


def _resized(tensor: ir.TensorProtocol, old: int, new: int) -> ir.TensorProtocol:
    """Cut a tensor along axes of length `old`, and put `new` for `old` in a target of Reshape."""
    shape = tensor.shape.numpy()
    steers = tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and len(shape) <= 1
    steers = steers and tensor.size <= _MOST_CONTENT and old in tensor.numpy()
    if old not in shape and not steers:
        return tensor
    array = tensor.numpy()[tuple(slice(new) if size == old else slice(None) for size in shape)]
    if steers:
        array = np.where(array == old, array.dtype.type(new), array)
    return ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=tensor.name)
