"""Extraction: a valid module made of some of the nodes of another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from lwc.core.dims import Dim, as_ir_dim, bind, is_anonymous, parse_dim
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.walk import attribute_graphs, constant_tensor, graph_and_subgraphs
from lwc.verify.reduction.observe import Observation, Observed

__all__ = [
    "ExtractError",
    "Usage",
    "bind_extents",
    "detach",
    "extract",
    "nodes_within",
    "owners",
    "sweep",
]


class ExtractError(LwcError):
    """No module can be made so: the type of a value at the border is not known, for example."""


def extract(
    module: Module,
    keep: Collection[ir.Node],
    observed: Observed,
    *,
    outputs: Sequence[str] | None = None,
    substitutes: Mapping[str, str] = MappingProxyType({}),
) -> Module:
    """Make a module of some nodes of the main graph of another, with the values' names.

    A value that loses its producer becomes an initializer with its observed content where it is
    a short integer or boolean tensor (a shape, axes, indices, a condition) or is computed from
    weights alone, and a graph input of its inferred type and shape otherwise. Content that
    depends on dimensions is right at their observed extents only, so these dimensions get them,
    everywhere. Inputs, initializers and functions that nothing uses any more go.

    Args:
        module: Where the nodes are; it is not changed, weights are shared.
        keep: The nodes. What their bodies capture counts as what they use.
        observed: What is known of the module's values.
        outputs: Names of the graph outputs. By default those outputs of the module that are
            left, then every value that is used outside `keep`, constants aside.
        substitutes: Values of dropped nodes that another value takes the place of, by name.

    Raises:
        ExtractError: A value at the border has no known type, or content whose dimensions were
            not observed; or nothing is left to return.
    """
    twin = module.clone()
    graph = twin.graph
    usage = Usage(twin)
    kept: list[ir.Node] = []
    dropped: list[ir.Node] = []
    for node, copy in zip(module.graph, list(graph), strict=True):
        (kept if node in keep else dropped).append(copy)
    owner = owners(graph)
    gone = set(dropped)
    by_name = {value.name: value for value in _main_values(graph) if value.name}
    for old, new in substitutes.items():
        _redirect(graph, by_name[old], by_name[new])
    if outputs is None:
        border = [v for node in kept for v in node.outputs if _escapes(v, owner, gone)]
        border = [value for value in border if constant_tensor(value) is None]
        left = [v for v in graph.outputs if v.producer() not in gone]
        results = list(dict.fromkeys([*left, *border]))
    else:
        results = list(dict.fromkeys(by_name[substitutes.get(name, name)] for name in outputs))
    if not results:
        raise ExtractError("nothing is left to return")
    graph.outputs[:] = []
    bound: set[str] = set()
    for value in [v for node in dropped for v in node.outputs]:
        readers = [(user, index) for user, index in value.uses() if owner[user] not in gone]
        if not readers:
            continue
        replacement, depends = _leaf(graph, value, observed)
        bound |= depends
        for user, index in readers:
            user.replace_input_with(index, replacement)
    for node in dropped:
        detach(node)
    graph.remove(dropped)
    graph.outputs[:] = [_typed(value, observed) for value in results]
    sweep(twin, usage)
    bind_extents(twin, observed, bound)
    twin.forget_names()
    return twin


class Usage:
    """Which inputs, initializers and functions of a module are used."""

    def __init__(self, module: Module) -> None:
        graph = module.graph
        self.values = {
            value.name for value in (*graph.inputs, *graph.initializers.values()) if _is_used(value)
        }
        self.functions = _called(module)


def sweep(module: Module, before: Usage) -> None:
    """Remove inputs, initializers and functions that `before` was using and nothing uses now."""
    graph = module.graph
    idle = {
        value.name
        for value in (*graph.inputs, *graph.initializers.values())
        if value.name in before.values and not _is_used(value)
    }
    graph.inputs[:] = [value for value in graph.inputs if value.name not in idle]
    for name in [name for name in graph.initializers if name in idle]:
        del graph.initializers[name]
    for key in before.functions - _called(module):
        module.model.functions.pop(key, None)  # inlining may have removed it


def nodes_within(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes of the bodies of a node, nested ones included."""
    for body in attribute_graphs(node):
        for graph in graph_and_subgraphs(body):
            yield from graph


def detach(node: ir.Node) -> None:
    """Let a node that leaves its graph, and its bodies, use nothing any more."""
    for each in [node, *nodes_within(node)]:
        each.resize_inputs(0)


def bind_extents(module: Module, observed: Observed, names: Iterable[str]) -> None:
    """Give dimensions their observed extents wherever the module mentions them.

    Raises:
        ExtractError: A dimension was not observed.
    """
    wanted = set(names)
    if not wanted:
        return
    missing = sorted(wanted - observed.extents.keys())
    if missing:
        raise ExtractError(f"dimension '{missing[0]}' was not observed")
    extents = {name: observed.extents[name] for name in wanted}
    for value in module.graph.inputs:
        shape = observed.of(value).shape
        if value.shape is not None and shape is not None and len(shape) == len(value.shape):
            for axis, dim in enumerate(shape):
                number = bind(dim, extents)
                if isinstance(number, int):
                    value.shape[axis] = number
    for graph in graph_and_subgraphs(module.graph):
        for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([_bound(dim, extents) for dim in value.shape])


def _bound(dim: int | ir.SymbolicDim, extents: Mapping[str, int]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or is_anonymous(dim.value):
        return dim
    parsed = parse_dim(dim.value or "")
    number = bind(parsed, extents)
    return dim if number == parsed else as_ir_dim(number)


def _leaf(graph: ir.Graph, value: ir.Value, observed: Observed) -> tuple[ir.Value, set[str]]:
    """Make the initializer or input that takes the place of a value without a producer.

    Returns:
        It, and the dimensions that must be bound for its content to be right.
    """
    seen = observed.of(value)
    if seen.content is not None and _bakeable(seen):
        leaf = ir.Value(
            name=value.name,
            type=ir.TensorType(seen.content.dtype),
            shape=ir.Shape(seen.content.shape.numpy()),
            const_value=seen.content,
        )
        graph.register_initializer(leaf)
        depends = observed.extents.keys() if seen.depends is None else seen.depends
        return leaf, set(depends)
    if seen.type is None or (isinstance(seen.type, ir.TensorType) and seen.shape is None):
        raise ExtractError(f"the type of '{value.name}' is not known")
    leaf = ir.Value(name=value.name, type=seen.type, shape=_ir_shape(seen.shape))
    graph.inputs.append(leaf)
    _name_anonymous(graph, observed, leaf)
    return leaf, set()


def _bakeable(seen: Observation) -> bool:
    """Tell whether content is better than a feed: it steers shapes, or no feed can change it."""
    if seen.depends is not None and not seen.depends:
        return True
    assert seen.content is not None
    dtype = seen.content.dtype
    steers = dtype.is_integer() or dtype == ir.DataType.BOOL
    return steers and len(seen.content.shape) <= 1


def _ir_shape(shape: Sequence[Dim] | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([as_ir_dim(dim) for dim in shape])


def _name_anonymous(graph: ir.Graph, observed: Observed, leaf: ir.Value) -> None:
    """Name the anonymous dimensions of inputs that a new input shares."""
    shape = observed.of(leaf).shape or ()
    shared = {s.name for dim in shape if not isinstance(dim, int) for s in dim.free_symbols}
    for value in graph.inputs:
        known = observed.of(value).shape
        if value.shape is None or known is None or len(known) != len(value.shape):
            continue
        for axis, (dim, said) in enumerate(zip(known, value.shape, strict=True)):
            if (
                not isinstance(said, int)
                and is_anonymous(said.value)
                and not isinstance(dim, int)
                and {s.name for s in dim.free_symbols} <= shared
            ):
                value.shape[axis] = as_ir_dim(dim)


def _typed(value: ir.Value, observed: Observed) -> ir.Value:
    """Give an output the type it must have."""
    seen = observed.of(value)
    if value.type is None:
        value.type = seen.type
    if value.type is None:
        raise ExtractError(f"the type of '{value.name}' is not known")
    if value.shape is None and isinstance(value.type, ir.TensorType):
        value.shape = _ir_shape(seen.shape)
    return value


def _redirect(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)


def owners(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """Map every node to the node of the main graph that holds it."""
    owner = {}
    for node in graph:
        owner[node] = node
        if node.attributes:
            owner.update(dict.fromkeys(nodes_within(node), node))
    return owner


def _escapes(value: ir.Value, owner: Mapping[ir.Node, ir.Node], gone: set[ir.Node]) -> bool:
    return any(owner[user] in gone for user, _ in value.uses())


def _main_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _called(module: Module) -> set[tuple[str, str, str]]:
    """Return the functions that the graph calls, directly or not."""
    functions = module.model.functions
    found: set[tuple[str, str, str]] = set()
    graphs = [module.graph]
    while graphs and functions:
        for graph in graph_and_subgraphs(graphs.pop()):
            for node in graph:
                key = node.op_identifier()
                if key in functions and key not in found:
                    found.add(key)
                    graphs.append(functions[key].graph)
    return found
