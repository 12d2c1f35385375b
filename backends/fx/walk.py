"""The walk over a module's nodes that builds the graph of a torch.fx.GraphModule.

Most values are tensors. Integer scalars and vectors that come from the extents of tensors stay
Python integers as long as the operators on the way are those of `ops/integers.py`; where another
operator reads one it becomes a tensor. Constants that an operator wants as numbers are written into
the call.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from lwc.analysis.shapes import Shapes
from lwc.backends.fx import ops
from lwc.backends.fx.inputs import declared
from lwc.backends.fx.module import OnnxGraphModule
from lwc.backends.fx.ops.control_flow import given
from lwc.backends.fx.ops.integers import as_tensor, numbers
from lwc.backends.fx.registry import HOST, Host, Lowering, Use, find
from lwc.backends.fx.scope import Scope
from lwc.backends.fx.weights import Weights, free_attribute, identifier
from lwc.core.diagnostics import describe
from lwc.core.errors import LwcError, UsageError
from lwc.core.module import Module
from lwc.core.torch_types import WIDENED, held_as, type_literal
from lwc.core.walk import attribute_graphs, constant_tensor, is_default_domain, op_name
from lwc.core.weights import reading
from lwc.pipeline.plugins import import_installed

__all__ = ["lowered"]

_ = ops  # registers the operators

_LITERAL = 64
"""Constants of up to this many numbers are written into the calls that want numbers."""

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})

_HOSTED = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def lowered(
    module: Module, *, straight_through: bool = False, expose: Sequence[str] = ()
) -> OnnxGraphModule:
    """Lower a module; see `lwc.backends.fx.convert.to_fx`."""
    import_installed("lwc.operators")
    plain = _without_functions(module)
    walk = _Walk(plain, Weights(module), straight_through)
    return walk.main(expose)


def _without_functions(module: Module) -> Module:
    """Return a clone with the functions inlined that no lowering stands for.

    Raises:
        LwcError: A function cannot be inlined.
    """
    twin = module.clone()
    if not twin.model.functions:
        return twin
    from onnx_ir.passes.common import InlinePass

    def wanted(function: ir.Function) -> bool:
        # A function of the lwc domain is the meaning of an operator that has a lowering.
        return function.domain != "lwc" or find(f"lwc::{function.name}", 1) is None

    try:
        twin.model = InlinePass(wanted)(twin.model).model
    except (ir.passes.PassError, ValueError) as error:
        cause = error.__cause__ or error
        raise LwcError(
            f"a function cannot be inlined: {cause}",
            file=module.source.path,
            remedy="declare the same opsets in the model and its functions",
        ) from error
    return twin


class _Walk:
    def __init__(self, module: Module, weights: Weights, straight_through: bool) -> None:
        self.module = module
        self.weights = weights
        self.straight_through = straight_through
        self.shapes = Shapes.build(module)
        self.exposed: list[ir.Value] = []
        self.versions = {
            "" if domain == "ai.onnx" else domain: version
            for domain, version in module.graph.opset_imports.items()
        }

    def main(self, expose: Sequence[str]) -> OnnxGraphModule:
        """Lower the main graph."""
        graph, root = self.module.graph, torch.nn.Module()
        scope = Scope(root)
        self.exposed = self._named(graph, expose)
        fed = [value for value in graph.inputs if value.const_value is None]
        optional = [value for value in graph.inputs if value.const_value is not None]
        for value in fed:
            scope.tensors[value] = scope.graph.placeholder(identifier(value.name or "input"))
        for value in optional:
            found = scope.graph.placeholder(identifier(value.name or "input"), default_value=None)
            scope.tensors[value] = found
        scope.name_parameters()
        for value in (*fed, *optional):
            scope.tensors[value].meta["declared"] = declared(value)
        for value in optional:
            default = self._weight(scope, value)
            scope.tensors[value] = scope.call(
                given, (scope.tensors[value], default), f"{value.name}_or_default"
            )
        self._nodes(scope, graph)
        results = [self._declared(scope, value) for value in graph.outputs]
        results += [self._tensor(scope, value) for value in self.exposed]
        scope.graph.output(results[0] if len(results) == 1 else tuple(results))
        made = OnnxGraphModule(root, scope.graph, identifier(graph.name or "GraphModule"))
        made.meta["lwc"] = {
            "inputs": [value.name for value in (*fed, *optional)],
            "outputs": [value.name for value in (*graph.outputs, *self.exposed)],
            "weights": self.weights.places(made),
            "file": self.module.source.path,
        }
        return made

    def _named(self, graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
        if isinstance(names, str):
            raise UsageError(f"expose takes a list of names, not '{names}'")
        if not names:
            return []
        values = {value.name: value for node in graph for value in node.outputs}
        values.update({value.name: value for value in graph.inputs})
        values.update(graph.initializers)
        for name in names:
            if name not in values:
                raise LwcError(
                    f"the main graph has no value '{name}'", file=self.module.source.path
                )
        return [values[name] for name in names]

    def _declared(self, scope: Scope, value: ir.Value) -> torch.fx.Node:
        """Return an output, in the integer type it has where gradients made it a float."""
        result, dtype = self._tensor(scope, value), self.shapes.dtype(value)
        if not self.straight_through or dtype is None or not dtype.is_integer():
            return result
        return scope.graph.call_method("to", (result, held_as(dtype)))

    def _captured(self, scope: Scope, values: Sequence[ir.Value]) -> list[torch.fx.Node]:
        """Return what stands for values that nested graphs read from outside."""
        return [
            scope.integers[value] if value in scope.integers else self._tensor(scope, value)
            for value in values
        ]

    def _subgraph(
        self, scope: Scope, graph: ir.Graph, outer: Sequence[ir.Value], name: str
    ) -> torch.fx.Node:
        """Lower a nested graph into a GraphModule of its own, and return what gives it.

        It takes the values that are read from outside, then the graph's inputs, and returns a
        tuple.
        """
        inner = Scope(torch.nn.Module())
        inner.origin = scope.origin
        for value in outer:
            place = inner.graph.placeholder(identifier(value.name or "outer"))
            held = inner.integers if value in scope.integers else inner.tensors
            held[value] = place
        for value in graph.inputs:
            inner.tensors[value] = inner.graph.placeholder(identifier(value.name or "input"))
        inner.name_parameters()
        self._nodes(inner, graph)
        inner.graph.output(tuple(self._tensor(inner, value) for value in graph.outputs))
        made = OnnxGraphModule(inner.root, inner.graph, identifier(name))
        made.meta["lwc"] = {"file": self.module.source.path}
        target = free_attribute(scope.root, identifier(name))
        scope.root.add_module(target, made)
        return scope.graph.get_attr(target)

    def _outer_values(self, node: ir.Node) -> list[ir.Value]:
        """Return the values that graphs of a node read from outside, in order.

        Constants are left out, which nested graphs have themselves, unless they are exposed.
        """
        inner: set[ir.Value] = set()
        read: dict[ir.Value, None] = {}

        def visit(each: ir.Graph) -> None:
            inner.update(each.inputs, each.initializers.values())
            for item in each:
                inner.update(item.outputs)
                read.update((value, None) for value in item.inputs if value is not None)
                for nested in attribute_graphs(item):
                    visit(nested)
            read.update((value, None) for value in each.outputs)

        for graph in attribute_graphs(node):
            visit(graph)
        return [
            value
            for value in read
            if value not in inner and (value in self.exposed or constant_tensor(value) is None)
        ]

    # Nodes

    def _nodes(self, scope: Scope, graph: ir.Graph) -> None:
        before = scope.origin
        for node in graph:
            if node.op_type == "Constant" and is_default_domain(node) and _is_tensor(node):
                continue
            scope.origin = {
                "name": node.name or "",
                "op": op_name(node),
                "outputs": [value.name for value in node.outputs if value.name],
                **node.metadata_props,
            }
            try:
                self._node(scope, node)
            except LwcError as error:
                error.node = error.node or describe(node)
                error.file = error.file or self.module.source.path
                raise
        scope.origin = before
        for value, made in scope.tensors.items():
            made.meta["fact"] = self.shapes.fact(value)

    def _node(self, scope: Scope, node: ir.Node) -> None:
        hosted = HOST.get(node.op_type) if is_default_domain(node) else None
        if hosted is not None and self._is_integral(scope, node, hosted):
            self._on_integers(scope, node, hosted)
            return
        domain = "" if is_default_domain(node) else node.domain
        version = self.versions.get(domain, 1)
        lowering = find(op_name(node), version)
        if lowering is None:
            raise self._error(
                node,
                f"the fx backend has no lowering of {op_name(node)}",
                "register one as lwc.backends.fx.registry tells, or run it on ONNX Runtime",
            )
        outputs = max((i + 1 for i, v in enumerate(node.outputs) if v.name), default=0)
        dtypes = tuple(None if v is None else self.shapes.dtype(v) for v in node.inputs)
        use = Use(node, dtypes, outputs, version)
        inputs = _present(node.inputs)
        if lowering.most is not None and len(inputs) > lowering.most:
            raise self._error(
                node,
                f"the fx backend has no lowering of {op_name(node)} with an input "
                f"{len(inputs) - 1}, counted from 0",
                "leave it out, or run the module on ONNX Runtime",
            )
        args = [
            None
            if value is None
            else self._numbers(scope, value)
            if index in lowering.values
            or (index in lowering.either and self._is_at_hand(scope, value))
            else self._tensor(scope, value)
            for index, value in enumerate(inputs)
        ]
        kwargs = self._keywords(scope, node, lowering, use)
        name = node.name or node.outputs[0].name or node.op_type
        if lowering.exact and self.straight_through:
            args = self._whole(scope, args, use, name)
        if lowering.wide:
            args = self._widened(scope, args, use, name)
        result = scope.call(lowering.function, args, name, **kwargs)
        result.meta["computes"] = op_name(node)
        if outputs > 1 or lowering.many:
            for index, value in enumerate(node.outputs):
                if value.name:
                    scope.tensors[value] = scope.call(
                        operator.getitem, (result, index), value.name or name
                    )
        else:
            scope.tensors[node.outputs[0]] = result
        if lowering.wide:
            for value in node.outputs:
                dtype = self.shapes.dtype(value)
                if value.name and dtype in WIDENED:
                    scope.tensors[value] = scope.call(
                        torch.Tensor.to, (scope.tensors[value], held_as(dtype)), f"{name}_narrow"
                    )

    def _whole(self, scope: Scope, args: Sequence[Any], use: Use, name: str) -> list[Any]:
        """Turn integers that gradients made floats back."""
        return [
            scope.call(torch.Tensor.to, (arg, held_as(dtype)), f"{name}_whole")
            if dtype is not None and dtype.is_integer() and isinstance(arg, torch.fx.Node)
            else arg
            for arg, dtype in zip(args, use.dtypes, strict=False)
        ]

    def _widened(self, scope: Scope, args: Sequence[Any], use: Use, name: str) -> list[Any]:
        return [
            scope.call(torch.Tensor.to, (arg, torch.int64), f"{name}_wide")
            if use.dtypes[index] in WIDENED
            else arg
            for index, arg in enumerate(args)
        ]

    def _keywords(
        self, scope: Scope, node: ir.Node, lowering: Lowering, use: Use
    ) -> dict[str, Any]:
        kwargs: dict[str, Any] = {}
        for attribute in node.attributes.values():
            name = attribute.name
            if name in lowering.ignored or (name in lowering.zero and not attribute.value):
                continue
            if name not in lowering.accepts:
                raise self._error(
                    node,
                    f"the fx backend has no lowering of {op_name(node)} with the attribute "
                    f"'{name}'",
                    "leave it out, or run the module on ONNX Runtime",
                )
            value = self._literal(scope, node, attribute, lowering)
            choices = lowering.choices.get(name)
            if choices is not None and value not in choices:
                raise self._error(
                    node,
                    f"{op_name(node)} has no {name} '{value}'",
                    f"it may be {', '.join(map(repr, filter(None, choices)))}",
                )
            if not _is_same(value, lowering.accepts[name]):
                kwargs[name] = value
        if lowering.extra is not None:
            kwargs.update(lowering.extra(use))
        if "captured" in lowering.accepts:
            kwargs["captured"] = self._captured(scope, self._outer_values(node))
        if "outputs" in lowering.accepts and use.outputs > 1:
            kwargs["outputs"] = use.outputs
        if "straight_through" in lowering.accepts and self.straight_through:
            kwargs["straight_through"] = True
        return kwargs

    def _literal(self, scope: Scope, node: ir.Node, attribute: ir.Attr, lowering: Lowering) -> Any:
        kind, value = attribute.type, attribute.value
        if kind == ir.AttributeType.GRAPH:
            title = f"{node.name or node.outputs[0].name or node.op_type}_{attribute.name}"
            return self._subgraph(scope, value, self._outer_values(node), title)
        if kind == ir.AttributeType.TENSOR:
            with reading(value) as array:
                return array.ravel().tolist()[0] if array.size == 1 else array.tolist()
        if attribute.name in lowering.types:
            return type_literal(ir.DataType(value))
        if kind in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            return [_text(item) for item in value]
        if kind in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            return _text(value)
        raise self._error(
            node,
            f"the fx backend does not take attributes of type {kind.name}",
            "run the module on ONNX Runtime",
        )

    # Integers

    def _is_integral(self, scope: Scope, node: ir.Node, hosted: Host) -> bool:
        """Tell whether a node can stay on Python integers."""
        names = {attribute.name for attribute in node.attributes.values()}
        if not names <= hosted.accepts.keys():
            return False
        (result,) = node.outputs
        fact = self.shapes.fact(result)
        if fact.dtype not in _HOSTED or fact.shape is None or len(fact.shape) > 1:
            return False
        if fact.shape and not isinstance(fact.shape[0], int):
            return False
        if fact.shape and fact.shape[0] > _LITERAL:
            return False
        return all(
            value is not None
            and (
                index in hosted.tensors
                or (self._is_at_hand(scope, value) and self.shapes.dtype(value) not in _FLOATS)
            )
            for index, value in enumerate(_present(node.inputs))
        )

    def _on_integers(self, scope: Scope, node: ir.Node, hosted: Host) -> None:
        args = [
            self._tensor(scope, value)
            if index in hosted.tensors and value not in scope.integers
            else self._numbers(scope, value)
            for index, value in enumerate(_present(node.inputs))
            if value is not None
        ]
        kwargs = {}
        for attribute in node.attributes.values():
            value = attribute.value
            if attribute.type == ir.AttributeType.TENSOR:
                value = attribute.value.numpy().item()
            if not _is_same(value, hosted.accepts[attribute.name]):
                kwargs[attribute.name] = value
        if "bits" in hosted.accepts and self.shapes.dtype(node.outputs[0]) == ir.DataType.INT32:
            kwargs["bits"] = 32
        name = node.name or node.outputs[0].name or node.op_type
        scope.integers[node.outputs[0]] = scope.call(hosted.function, args, name, **kwargs)

    def _is_at_hand(self, scope: Scope, value: ir.Value) -> bool:
        return value in scope.integers or self._constant(value) is not None

    def _constant(self, value: ir.Value) -> Any:
        """Return the content of a small constant as a number or a list, else None.

        One that is exposed has a node of its own, behind which something may be put.
        """
        if value in self.exposed:
            return None
        tensor = constant_tensor(value)
        if tensor is None:
            return self._inferred(value)
        if tensor.size > _LITERAL or len(tensor.shape) > 1:
            return None
        if not (tensor.dtype in _HOSTED or tensor.dtype in _FLOATS):
            return None
        with reading(tensor) as array:
            return array.tolist()

    def _inferred(self, value: ir.Value) -> Any:
        """Return the integers that a value has whatever the model is fed, else None."""
        fact = self.shapes.fact(value)
        if fact.known is None or fact.known.ndim > 1 or fact.dtype not in _HOSTED:
            return None
        found = fact.known.tolist()
        plain = found if isinstance(found, list) else [found]
        return found if all(type(each) in (int, bool) for each in plain) else None

    def _numbers(self, scope: Scope, value: ir.Value) -> Any:
        """Return what stands for a value as Python numbers."""
        found = self._constant(value)
        if found is not None:
            return found
        if value in scope.integers:
            return scope.integers[value]
        tensor = self._tensor(scope, value)
        made = scope.call(numbers, (tensor,), f"{value.name}_numbers")
        if self.shapes.dtype(value) in _HOSTED:
            scope.integers[value] = made
        return made

    def _tensor(self, scope: Scope, value: ir.Value) -> torch.fx.Node:
        """Return what stands for a value as a tensor."""
        found = scope.tensors.get(value)
        if found is not None:
            return found
        if value in scope.integers:
            dtype = held_as(self.shapes.dtype(value) or ir.DataType.INT64)
            made = scope.call(as_tensor, (scope.integers[value], dtype), f"{value.name}_tensor")
            scope.tensors[value] = made
            return made
        if constant_tensor(value) is None:
            raise LwcError(
                f"value '{value.name}' is read before it is made",
                file=self.module.source.path,
                remedy="sort the nodes of the model",
            )
        scope.tensors[value] = self._weight(scope, value)
        return scope.tensors[value]

    def _weight(self, scope: Scope, value: ir.Value) -> torch.fx.Node:
        target = self.weights.attach(scope.root, value)
        return scope.graph.create_node("get_attr", target, name=identifier(value.name or "weight"))

    def _error(self, node: ir.Node, message: str, remedy: str) -> LwcError:
        return LwcError(message, file=self.module.source.path, node=describe(node), remedy=remedy)


def _present(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Leave out absent inputs at the end."""
    count = max((i + 1 for i, value in enumerate(inputs) if value is not None), default=0)
    return list(inputs[:count])


def _is_tensor(node: ir.Node) -> bool:
    return constant_tensor(node.outputs[0]) is not None


def _is_same(value: Any, default: Any) -> bool:
    """Tell whether an attribute says what a function does anyway."""
    return type(value) is type(default) and bool(value == default)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
