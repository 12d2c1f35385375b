"""How much work a model does: FLOPs, parameters and traffic, in closed form.

Every figure is an integer or a sympy expression in the model's own dimension names. The graph is
counted as it is written; what a runtime fuses or folds is not guessed here. The counting rules are
in `lwc.analysis.cost_rules.base`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnx_ir as ir
import sympy

from lwc.analysis.cost_rules.base import MS, Operands, UnknownCost, Work, find_rule
from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.shapes import Shapes
from lwc.core.diagnostics import describe
from lwc.core.dims import Dim, simplify_dim, symbol
from lwc.core.module import Module
from lwc.core.walk import attribute_graphs, constant_tensor, op_name

__all__ = ["Cost", "NodeCost", "Region", "Totals", "add_up"]


@dataclass(frozen=True)
class NodeCost:
    """What one node costs each time the graph it is in runs.

    Attributes:
        work: Arithmetic, and the kernel that does it.
        parameters: Elements of the weights it reads; block scales and zero points not counted.
        parameter_bytes: Stored bytes of the weights it reads, scales and zero points included.
        read_bytes: Bytes it reads.
        written_bytes: Bytes it writes.
        activation_bytes: Bytes of outputs it brings into being; a view has none.
    """

    work: Work = field(default_factory=Work)
    parameters: int = 0
    parameter_bytes: int = 0
    read_bytes: Dim = 0
    written_bytes: Dim = 0
    activation_bytes: Dim = 0

    @property
    def macs(self) -> Dim:
        """Multiply-adds."""
        return self.work.macs

    @property
    def flops(self) -> Dim:
        """Floating-point operations: two per multiply-add, and the others."""
        return _combine(self.work.macs, self.work.other_flops)

    @property
    def traffic(self) -> Dim:
        """Bytes read and written."""
        return _sum((self.read_bytes, self.written_bytes))


@dataclass(frozen=True)
class Region:
    """The subgraphs a node runs.

    Attributes:
        graphs: Its bodies.
        trips: How often a body runs: 1, a number, or a symbol where it depends on data.
        exclusive: Whether one of the bodies runs (`If`) rather than each of them.
    """

    graphs: tuple[ir.Graph, ...]
    trips: Dim = 1
    exclusive: bool = False


@dataclass(frozen=True)
class Totals:
    """Sums over a set of nodes; parameters are of distinct weights."""

    macs: Dim
    flops: Dim
    parameters: int
    parameter_bytes: int
    read_bytes: Dim
    written_bytes: Dim
    activation_bytes: Dim

    @property
    def traffic(self) -> Dim:
        """Bytes read and written."""
        return _sum((self.read_bytes, self.written_bytes))


class Cost(Analysis):
    """The cost of every node and of the model.

    A node that runs subgraphs costs what they cost: `If` the dearer of its branches (of each
    figure by itself), `Loop` and `Scan` the body times the trip count, which is a symbol
    `trips_<node>` where the graph does not tell it; a function call its body.

    Attributes:
        nodes: Cost by node, nodes of subgraphs and functions included.
        regions: The subgraphs of control-flow nodes and function calls.
        uncounted: Nodes without a rule, or whose shapes are not known, by operator. They are in
            no total.
        reasons: Why, by operator.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.nodes: dict[ir.Node, NodeCost] = {}
        self.regions: dict[ir.Node, Region] = {}
        self.uncounted: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self._weights: dict[int, tuple[Any, int]] = {}

    @classmethod
    def requires(cls) -> tuple[type[Analysis], ...]:
        """Cost rests on shapes."""
        return (Shapes,)

    @classmethod
    def build(cls, module: Module, analyses: AnalysisManager) -> Cost:
        """Count every node once; equal operands are counted once in all."""
        cost = cls(module)
        _Counting(cost, analyses.get(Shapes)).graph(module.graph)
        return cost

    def differs_from(self, other: Cost) -> str | None:
        """Name a node on which two analyses, built on the same shapes, differ."""
        for node in {**self.nodes, **other.nodes}:
            if self.nodes.get(node) != other.nodes.get(node):
                return f"the cost of {describe(node)} is not what it is when counted anew"
            if self.regions.get(node) != other.regions.get(node):
                return f"the subgraphs of {describe(node)} are not those it has"
        if self.uncounted != other.uncounted or self.reasons != other.reasons:
            return "the operators that are not counted are not those found anew"
        return None

    @cached_property
    def total(self) -> Totals:
        """The whole model: the nodes of the main graph, control flow with its bodies."""
        return self.totals(self.module.graph)

    def totals(self, nodes: Iterable[ir.Node]) -> Totals:
        """Add up nodes; a weight that several of them read counts once."""
        chosen = list(nodes)
        sums = add_up([self.nodes[node] for node in chosen if node in self.nodes])
        tensors: dict[int, tuple[int, int]] = {}
        for node in self._with_bodies(chosen):
            for tensor, elements in _weights_of(node):
                held = tensors.get(id(tensor), (0, 0))
                tensors[id(tensor)] = (max(held[0], elements), tensor.nbytes)
        return Totals(
            **sums,
            parameters=sum(elements for elements, _ in tensors.values()),
            parameter_bytes=sum(nbytes for _, nbytes in tensors.values()),
        )

    def _with_bodies(self, nodes: Iterable[ir.Node]) -> Iterable[ir.Node]:
        for node in nodes:
            yield node
            region = self.regions.get(node)
            if region is not None:
                for graph in region.graphs:
                    yield from self._with_bodies(graph)


_FIGURES = ("macs", "flops", "read_bytes", "written_bytes", "activation_bytes")


def add_up(costs: Iterable[NodeCost]) -> dict[str, Dim]:
    """Add the figures of nodes, equal nodes by multiplication: few sympy operations."""
    counts: Counter[NodeCost] = Counter(costs)
    return {
        figure: _weighted((getattr(cost, figure), count) for cost, count in counts.items())
        for figure in _FIGURES
    }


class _Counting:
    """One walk over a module."""

    def __init__(self, cost: Cost, shapes: Shapes) -> None:
        self.cost = cost
        self.shapes = shapes
        self.known: dict[Operands, tuple[Work, Dim, Dim, Dim] | str] = {}
        self.done: dict[int, dict[str, Dim]] = {}

    def graph(self, graph: Iterable[ir.Node]) -> dict[str, Dim]:
        done = self.done.get(id(graph))
        if done is None:
            costs = [found for node in graph if (found := self.node(node)) is not None]
            done = self.done[id(graph)] = add_up(costs)
        return done

    def node(self, node: ir.Node) -> NodeCost | None:
        function = self.cost.module.model.functions.get(node.op_identifier())
        region = self._region(node, function)
        if region is not None:
            self.cost.regions[node] = region
            found = self._compound(region)
        else:
            counted = self._leaf(node)
            if isinstance(counted, str):
                op = op_name(node)
                self.cost.uncounted[op] = self.cost.uncounted.get(op, 0) + 1
                self.cost.reasons.setdefault(op, counted)
                return None
            found = self._with_weights(node, *counted)
        self.cost.nodes[node] = found
        return found

    def _region(self, node: ir.Node, function: ir.Function | None) -> Region | None:
        if function is not None:
            return Region((function.graph,))
        graphs = tuple(attribute_graphs(node)) if node.attributes else ()
        if not graphs:
            return None
        if node.op_type == "If":
            return Region(graphs, exclusive=True)
        return Region(graphs, self._trips(node))

    def _trips(self, node: ir.Node) -> Dim:
        unknown = symbol(f"trips_{node.name or node.outputs[0].name}")
        if node.op_type == "Loop" and node.inputs and node.inputs[0] is not None:
            known = self.shapes.known(node.inputs[0])
            if known is not None:
                trips: Dim = simplify_dim(known.reshape(-1)[0])
                return trips
        if node.op_type == "Scan":
            scanned = self.shapes.shape(node.inputs[-1]) if node.inputs[-1] is not None else None
            axes = node.attributes.get_ints("scan_input_axes") or (0,)
            if scanned is not None:
                return scanned[axes[-1]]
        return unknown

    def _compound(self, region: Region) -> NodeCost:
        bodies = [self.graph(graph) for graph in region.graphs]
        figures: dict[str, Dim] = {}
        for figure in _FIGURES:
            values = [body[figure] for body in bodies]
            whole = _largest(values) if region.exclusive else _sum(values)
            figures[figure] = whole * region.trips if region.trips != 1 else whole
        macs = figures["macs"]
        other = _sum((figures["flops"], -2 * macs))
        return NodeCost(
            Work(macs=macs, other_flops=other),
            read_bytes=figures["read_bytes"],
            written_bytes=figures["written_bytes"],
            activation_bytes=figures["activation_bytes"],
        )

    def _leaf(self, node: ir.Node) -> tuple[Work, Dim, Dim, Dim] | str:
        operands = _operands(node, self.shapes)
        found = self.known.get(operands)
        if found is None:
            found = self.known[operands] = _count(operands)
        return found

    def _with_weights(
        self, node: ir.Node, work: Work, read: Dim, written: Dim, made: Dim
    ) -> NodeCost:
        weights = list(_weights_of(node))
        return NodeCost(
            work,
            parameters=sum(elements for _, elements in weights),
            parameter_bytes=sum(tensor.nbytes for tensor, _ in weights),
            read_bytes=read,
            written_bytes=written,
            activation_bytes=made,
        )


def _count(operands: Operands) -> tuple[Work, Dim, Dim, Dim] | str:
    rule = find_rule(operands.op)
    if rule is None:
        return "no cost rule"
    try:
        work = rule(operands)
        if work.kernel == "view":
            return work, 0, 0, 0
        present = [i for i, dtype in enumerate(operands.output_types) if dtype is not None]
        made = _sum([operands.out_nbytes(index) for index in present])
        read = work.read
        if read is None:
            read = _sum([operands.nbytes(index) for index in range(len(operands.inputs))])
        return work, read, made if work.written is None else work.written, made
    except UnknownCost as unknown:
        return str(unknown)


def _operands(node: ir.Node, shapes: Shapes) -> Operands:
    attributes: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if not attribute.is_ref() and attribute.type in _PLAIN:
            attributes[name] = attribute.value
    return Operands(
        op=op_name(node),
        inputs=tuple(None if v is None else _extents(shapes.shape(v)) for v in node.inputs),
        outputs=tuple(_extents(shapes.shape(v)) for v in node.outputs),
        input_types=tuple(None if v is None else shapes.dtype(v) for v in node.inputs),
        output_types=tuple(shapes.dtype(v) if v.name else None for v in node.outputs),
        constant=tuple(constant_tensor(v) is not None for v in node.inputs),
        attributes=attributes,
        attribute_key=tuple(
            (name, tuple(value) if isinstance(value, list | tuple) else value)
            for name, value in attributes.items()
        ),
    )


_PLAIN = frozenset(
    (
        ir.AttributeType.INT,
        ir.AttributeType.FLOAT,
        ir.AttributeType.STRING,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRINGS,
    )
)

_SCALES: Mapping[str, tuple[int, ...]] = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "MatMulInteger": (2, 3),
    "ConvInteger": (2, 3),
    f"{MS}MatMulNBits": (2, 3, 4),
    f"{MS}MatMulBnb4": (2,),
    f"{MS}GatherBlockQuantized": (2, 3),
    "lwc::DynamicQuantMatMul": (2,),
    f"{MS}DynamicQuantizeMatMul": (2, 3),
    f"{MS}MatMulIntegerToFloat": (2, 3, 4, 5),
    f"{MS}QGemm": (1, 2, 4, 5, 7, 8),
}
"""Inputs that say how others are quantized: bytes, but no parameters of the model."""


def _weights_of(node: ir.Node) -> Iterable[tuple[ir.TensorProtocol, int]]:
    """Yield the weights a node reads, each with the number of parameters it holds.

    Integer tensors of 16 bits and more, booleans and strings are indices, shapes and masks.
    """
    scales = _scales_of(node)
    for index, value in enumerate(node.inputs):
        tensor = constant_tensor(value)
        if tensor is None or not _is_parameter(tensor.dtype):
            continue
        yield tensor, 0 if index in scales else _elements(node, index, tensor)


def _scales_of(node: ir.Node) -> tuple[int, ...]:
    name = op_name(node)
    if name == "lwc::DynamicQuantMatMul" and node.attributes["zero_points"].as_int():
        return (2, 3)
    return _SCALES.get(name, ())


def _is_parameter(dtype: ir.DataType) -> bool:
    if dtype.is_floating_point():
        return True
    return dtype.is_integer() and dtype.bitwidth <= 8


def _elements(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> int:
    """Return how many weights a tensor stands for; packed ones are in bytes."""
    op = op_name(node)
    packed = (f"{MS}MatMulNBits", f"{MS}MatMulBnb4", "lwc::DynamicQuantMatMul")
    if op in packed and index == 1:
        return int(node.attributes["K"].as_int()) * int(node.attributes["N"].as_int())
    if op == f"{MS}GatherBlockQuantized" and index == 0 and tensor.dtype.bitwidth == 8:
        return int(tensor.size) * 8 // int(node.attributes.get_int("bits", 4))
    return int(tensor.size)


def _extents(shape: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    return None if shape is None else tuple(shape)


def _combine(macs: Dim, other: Dim) -> Dim:
    return _sum((2 * macs, other))


def _sum(terms: Iterable[Dim]) -> Dim:
    return _weighted((term, 1) for term in terms)


def _weighted(terms: Iterable[tuple[Dim, int]]) -> Dim:
    number: Any = 0
    rest = []
    for term, count in terms:
        if isinstance(term, int):
            number += term * count
        else:
            rest.append(term * count if count != 1 else term)
    return number if not rest else simplify_dim(sympy.Add(number, *rest))


def _largest(values: list[Dim]) -> Dim:
    if all(isinstance(value, int) for value in values):
        return max(values, default=0)
    return simplify_dim(sympy.Max(*values))
