"""Carrying out a `HalfPlan`: types, constants, and a Cast wherever float32 and half meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.core.diagnostics import describe
from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.core.walk import attribute_graphs, constant_tensor, graph_and_subgraphs, is_default_domain
from lwc.core.weights import reading
from lwc.passes.quantization.half_plan import HalfPlan

if TYPE_CHECKING:
    from lwc.pipeline.passes import PassContext

__all__ = ["HalfConversion"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_FLOAT = ir.DataType.FLOAT

_INDIFFERENT = frozenset({"Cast", "Shape", "Size"})
"""Operators that read any type as it is: a Cast before them could only lose digits."""


class HalfConversion:
    """Converts the main graph and its subgraphs.

    Args:
        module: What to convert.
        shapes: Its element types, of before the conversion.
        plan: Which operands become half.
        ctx: Where to report.
        keep_io: Whether graph inputs and outputs stay float32.

    Attributes:
        changed: Whether anything was float32 and became half.
    """

    def __init__(
        self, module: Module, shapes: Shapes, plan: HalfPlan, ctx: PassContext, *, keep_io: bool
    ) -> None:
        self._module = module
        self._shapes = shapes
        self._plan = plan
        self._ctx = ctx
        self._keep_io = keep_io
        self._casts: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._made: set[ir.Node] = set()
        self._counts = dict.fromkeys(
            ("constants", "bytes before", "bytes after", "casts", "clips"), 0
        )
        self.changed = False

    def run(self) -> None:
        """Convert everything.

        Raises:
            PassError: The model holds sequences or optionals of float32, or control flow that
                admits no half type.
        """
        graphs = list(graph_and_subgraphs(self._module.graph))
        constants = dict.fromkeys(self._constants(graphs))
        values = [v for graph in graphs for v in self._computed(graph)]
        nodes = [node for graph in graphs for node in graph]
        self._check_control_flow(nodes)
        becomes_half = {value: self._becomes_half(value) for value in values}
        for value in constants:
            self._convert_constant(value)
        for node in nodes:
            self._retarget(node)
        for value, is_half in becomes_half.items():
            if is_half:
                if value.const_value is not None:  # the default of an input
                    value.const_value = self._converted(value, value.const_value)
                value.type = ir.TensorType(self._plan.half)
                self.changed = True
        for value, is_half in becomes_half.items():
            self._mend_uses(value, is_half)
        for graph in graphs:
            for index, output in enumerate(graph.outputs):
                if output in becomes_half or output in constants:
                    self._mend_output(graph, index, becomes_half.get(output, False))

    def statistics(self) -> dict[str, int | float | str]:
        """Return counts for the report."""
        kept = len(self._plan.kept)
        return {**self._counts, "nodes kept in float32": kept}

    # What there is

    def _is_float(self, value: ir.Value) -> bool:
        fact = inner = self._shapes.fact(value)
        while inner.element is not None:
            inner = inner.element
        if inner is not fact and inner.dtype == _FLOAT:
            raise PassError(
                f"'{value.name}' is a sequence or optional of float32, which stays as it is",
                remedy="leave convert-dtype out for this model",
            )
        return fact.dtype == _FLOAT

    def _constants(self, graphs: list[ir.Graph]) -> Iterator[ir.Value]:
        for graph in graphs:
            for value in list(graph.initializers.values()):
                if constant_tensor(value) is not None and self._is_float(value):
                    yield value
            for node in graph:
                if _is_constant(node) and self._is_float(node.outputs[0]):
                    yield node.outputs[0]

    def _computed(self, graph: ir.Graph) -> Iterator[ir.Value]:
        for value in graph.inputs:
            if self._is_float(value):
                yield value
        for node in graph:
            if not _is_constant(node):
                yield from (value for value in node.outputs if self._is_float(value))

    def _becomes_half(self, value: ir.Value) -> bool:
        producer = value.producer()
        if producer is None:
            return value.graph is not self._module.graph or not self._keep_io
        return self._plan.makes(producer, value.index() or 0)

    # Constants

    def _convert_constant(self, value: ir.Value) -> None:
        """Give the readers that want half a converted copy; the rest keep the original."""
        readers = [use for use in value.uses() if self._plan.wants(use.node, use.idx)]
        stays = len(readers) < len(value.uses()) or value.is_graph_output()
        tensor = constant_tensor(value)
        assert tensor is not None
        if not readers:
            return
        converted = self._converted(value, tensor)
        self.changed = True
        self._counts["constants"] += 1
        self._counts["bytes before"] += tensor.nbytes
        self._counts["bytes after"] += converted.nbytes + (tensor.nbytes if stays else 0)
        if not stays and value.is_initializer():
            self._module.replace_initializer(value, converted)
            return
        twin = self._module.add_initializer(
            f"{value.name}_{self._plan.half.name.lower()}", converted
        )
        for use in readers:
            use.node.replace_input_with(use.idx, twin)
        producer = value.producer()
        if not stays and producer is not None and producer.graph is not None:
            producer.graph.remove(producer, safe=True)

    def _converted(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        dtype = self._plan.half.numpy()
        with reading(tensor) as array:
            with np.errstate(over="ignore"):
                result = array.astype(dtype)
            result = self._repaired(value, array, result)
        return self._module.spilled(ir.Tensor(result))

    def _repaired(self, value: ir.Value, array: Array, result: Array) -> Array:
        """Mend what the half type cannot hold."""
        limit = self._plan.limit
        over = np.isinf(result) & np.isfinite(array)
        if over.any():
            self._ctx.warn(
                f"'{value.name}' holds numbers beyond {limit:g}, as masks do: "
                f"{int(over.sum())} of {array.size} were clamped to that size"
            )
            result = np.where(over, np.sign(array) * np.float32(limit), array).astype(result.dtype)
        if array.size == 1 and array.item() != 0 and result.item() == 0:
            tiny = float(np.copysign(_SMALLEST[self._plan.half], array.item()))
            self._ctx.warn(f"'{value.name}' = {array.item():g} became {tiny:g}, not zero")
            result = np.full_like(result, tiny)
        return result

    # Nodes and values

    def _retarget(self, node: ir.Node) -> None:
        """Let a Cast to float32 make half."""
        if node.op_type == "Cast" and is_default_domain(node) and node not in self._plan.kept:
            to = node.attributes.get("to")
            if to is not None and not to.is_ref() and to.as_int() == _FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", int(self._plan.half))

    def _check_control_flow(self, nodes: list[ir.Node]) -> None:
        for node in nodes:
            if any(True for _ in attribute_graphs(node)) and not self._plan.makes(node, 0):
                raise PassError(
                    f"{node.op_type} admits no {self._plan.half} at opset {self._module.opset}",
                    node=describe(node),
                    remedy="export the model at opset 16 or above",
                )

    def _mend_uses(self, value: ir.Value, is_half: bool) -> None:
        for use in list(value.uses()):
            if use.node in self._made or use.node.op_type in _INDIFFERENT:
                continue
            wanted = self._plan.wants(use.node, use.idx)
            if wanted != is_half:
                use.node.replace_input_with(use.idx, self._cast(value, wanted))

    def _mend_output(self, graph: ir.Graph, index: int, is_half: bool) -> None:
        """Cast a graph's output to what is promised outside."""
        output = graph.outputs[index]
        main = graph is self._module.graph
        wanted = not (main and self._keep_io)
        if is_half == wanted:
            return
        nodes = self._make_cast(output, wanted)
        graph.extend(nodes)
        cast = graph.outputs[index] = nodes[-1].outputs[0]
        if main:
            name, output.name = output.name, self._module.fresh_name(f"{output.name}_inner")
            cast.name = name

    def _cast(self, value: ir.Value, to_half: bool) -> ir.Value:
        """Return `value` in the other type, cast once, where it is made."""
        key = value, to_half
        found = self._casts.get(key)
        if found is not None:
            return found
        nodes = self._make_cast(value, to_half)
        producer, graph = value.producer(), value.graph
        assert graph is not None
        if producer is not None:
            graph.insert_after(producer, nodes)
        elif len(graph):
            graph.insert_before(graph[0], nodes)
        else:
            graph.extend(nodes)
        made = self._casts[key] = nodes[-1].outputs[0]
        return made

    def _make_cast(self, value: ir.Value, to_half: bool) -> list[ir.Node]:
        """Make the Cast, after a Clip where the half type could not hold the numbers.

        A mask's -3.4e38 would become -inf, and a row of it NaN after Softmax.
        """
        half = self._plan.half
        name, dtype = half.name.lower() if to_half else "float", half if to_half else _FLOAT
        nodes = []
        if to_half and value.producer() in self._plan.far:
            limit = self._plan.limit
            self._ctx.warn(f"'{value.name}' is clamped to {limit:g} where it becomes {name}")
            bounds = [
                self._module.add_initializer(f"{value.name}_limit", np.array(each, np.float32))
                for each in (-limit, limit)
            ]
            nodes.append(self._node("Clip", [value, *bounds], f"{value.name}_clamped", _FLOAT))
            self._counts["clips"] += 1
        source = nodes[-1].outputs[0] if nodes else value
        nodes.append(
            self._node("Cast", [source], f"{value.name}_{name}", dtype, {"to": int(dtype)})
        )
        self._counts["casts"] += 1
        self.changed = True
        return nodes

    def _node(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType,
        attributes: dict[str, int] | None = None,
    ) -> ir.Node:
        name = self._module.fresh_name(name)
        result = ir.Value(name=name, type=ir.TensorType(dtype), shape=inputs[0].shape)
        node = ir.node(
            op,
            inputs,
            attributes=attributes,
            outputs=[result],
            name=self._module.fresh_name(f"{op}_{name}"),
        )
        node.metadata_props["lwc.pass"] = self._ctx.source
        self._made.add(node)
        return node


_SMALLEST = {ir.DataType.FLOAT16: 2.0**-24, ir.DataType.BFLOAT16: 2.0**-133}


def _is_constant(node: ir.Node) -> bool:
    return node.op_type == "Constant" and is_default_domain(node)
