"""The sketch: a typed graph that hypothesis draws, node by node."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import onnx_ir as ir
from hypothesis import reject
from hypothesis import strategies as st

from lwc.analysis.shapes import Fact, Shapes
from lwc.core.dims import Dim, DimShape, equal, is_anonymous
from lwc.core.module import Module
from lwc.core.walk import op_name
from lwc.verify.generate.choices import Choices, even_source

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["Motif", "Sketch", "sketches"]

Array = np.ndarray[Any, Any]

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL

OPSETS = (17, 18, 21, 13, 23)
"""Operator sets drawn, the usual ones first: hypothesis prefers what comes first."""

_IR_VERSION = 10
_WORDS = ("x", "scale", "constant", "shape", "bias", "axes", "weight", "indices")
"""Names that passes like to give, so that one that does not ask for a fresh name is caught."""

Step: TypeAlias = "Callable[[Sketch], ir.Value | Sequence[ir.Value] | None]"


class Motif:
    """A piece of graph under a name; calling it adds the piece to a sketch.

    Args:
        name: Its name.
        grow: Adds nodes and returns the values that later pieces may build on.
    """

    def __init__(self, name: str, grow: Step) -> None:
        self.name = name
        self.grow = grow

    def __call__(self, sketch: Sketch) -> list[ir.Value]:
        """Add the piece; its results join the values of the sketch."""
        made = self.grow(sketch)
        results = [] if made is None else [made] if isinstance(made, ir.Value) else list(made)
        for value in results:
            sketch.keep(value)
        return results

    def __repr__(self) -> str:
        return f"Motif({self.name})"


class Sketch(Choices):
    """A graph under construction, every value with its inferred type and symbolic shape.

    Whatever is chosen is drawn from hypothesis, so that the same choices give the same graph and
    fewer, smaller choices a simpler one. Graph inputs have extents `N` and `S` (any number),
    unnamed ones (each its own), or numbers.

    Args:
        draw: What `hypothesis.strategies.composite` hands in.
        opset: Version of the standard operator set; drawn by default.
        source: Where the choices come from; see `Choices`.

    Attributes:
        module: The module so far.
        shapes: What is known of its values.
        values: What later pieces may build on, in the order it came.
    """

    def __init__(
        self, draw: DrawFn, opset: int | None = None, source: random.Random | None = None
    ) -> None:
        super().__init__(draw, source)
        self.opset = opset or self.choose(*OPSETS)
        graph = ir.Graph([], [], nodes=[], opset_imports={"": self.opset}, name="sketch")
        self.module = Module(ir.Model(graph, ir_version=_IR_VERSION))
        self.shapes = Shapes(self.module)
        self.values: list[ir.Value] = []
        self.anonymous = self.rarely()
        self._graph = graph
        self._outer: list[ir.Graph] = []
        self._in_function = False

    def drop(self) -> NoReturn:
        """Drop the example: what was drawn does not fit together."""
        reject()

    # Leaves

    def input(
        self,
        shape: Sequence[int | str | None],
        dtype: ir.DataType = FLOAT,
        name: str | None = None,
    ) -> ir.Value:
        """Add a graph input; an extent may be a number, a name, or None for an unnamed one."""
        graph = self.module.graph
        value = ir.Value(
            name=self._fresh(name or f"input{len(graph.inputs)}"),
            type=ir.TensorType(dtype),
            shape=ir.Shape(shape),
        )
        graph.inputs.append(value)
        self.keep(value)
        return value

    def constant(
        self, content: Any, dtype: ir.DataType | None = None, name: str | None = None
    ) -> ir.Value:
        """Add a constant: an initializer or, drawn, a Constant node.

        Without `dtype`, float64 becomes float32, and other types stay.
        """
        array = np.asarray(content)
        if dtype is not None:
            array = array.astype(dtype.numpy())
        elif array.dtype == np.float64:
            array = array.astype(np.float32)
        array = np.ascontiguousarray(array).reshape(array.shape)
        inner = bool(self._outer)
        if inner or self.rarely():
            node = ir.Node("", "Constant", [], ir.convenience.convert_attributes({
                "value": ir.Tensor(array)
            }), name=self._fresh("constant_node"))  # fmt: skip
            return self._append(node, 1, name)[0]
        return self.module.add_initializer(name or self.choose(*_WORDS), array)

    def weight(self, *shape: int, dtype: ir.DataType = FLOAT, name: str = "weight") -> ir.Value:
        """Add normally distributed weights, scaled so that a product keeps its size."""
        fan = max(1, int(np.prod(shape[:-1]))) if len(shape) > 1 else 1
        array = np.random.default_rng(self.integer(0, 7)).standard_normal(shape) / np.sqrt(fan)
        return self.constant(array, dtype, name=name)

    def ints(self, *numbers: int) -> ir.Value:
        """Add an int64 vector."""
        return self.constant(np.array(numbers, np.int64))

    # Nodes

    def emit(
        self,
        op: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node and return its first output; attributes that are None are left out."""
        return self.emit_all(op, *inputs, domain=domain, outputs=outputs, name=name, **attributes)[
            0
        ]

    def emit_all(
        self,
        op: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node and return its outputs.

        Inference must find the inputs fit for the operator: where they are not, hypothesis
        drops the example.
        """
        kept = {key: value for key, value in attributes.items() if value is not None}
        node = ir.Node(
            domain, op, inputs, ir.convenience.convert_attributes(kept), num_outputs=outputs
        )
        if domain:
            self.module.import_opset(domain, 1)
        return self._append(node, outputs, name)

    def call(
        self, function: ir.Function, *inputs: ir.Value, outputs: int = 1, **attributes: Any
    ) -> list[ir.Value]:
        """Add a call of a function, which is added to the module where it is new."""
        self.module.model.functions.setdefault(function.identifier(), function)
        return self.emit_all(
            function.name, *inputs, domain=function.domain, outputs=outputs, **attributes
        )

    def function(
        self,
        name: str,
        inputs: int,
        grow: Callable[..., Sequence[ir.Value]],
        **attributes: ir.AttributeType | float,
    ) -> ir.Function:
        """Make a function in the domain `local`; see `call`.

        Nothing in it is inferred before it is called.

        Args:
            name: Its name; made unique.
            inputs: The number of its inputs.
            grow: Adds nodes, given the inputs, and returns the outputs.
            attributes: Its parameters: the type of one that every call gives, or a default.
                Give nodes of the body `ir.RefAttr` to refer to them.
        """
        parameters = [
            ir.Attr(key, given, None)
            if isinstance(given, ir.AttributeType)
            else ir.convenience.convert_attribute(key, given)
            for key, given in attributes.items()
        ]
        values = [ir.Value(name=self._fresh(f"argument{index}")) for index in range(inputs)]
        imports = {"": self.opset, "local": 1}
        graph = ir.Graph(values, [], nodes=[], opset_imports=imports, name=name)
        known, self._in_function = self._in_function, True
        try:
            results = self._grow_inside(graph, lambda: grow(*values))
        finally:
            self._in_function = known
        graph.outputs.extend(results)
        return ir.Function("local", self._fresh(name), graph=graph, attributes=parameters)

    def body(self, inputs: Sequence[ir.Value], grow: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """Make a subgraph: `grow` adds its nodes with `emit` and returns its outputs.

        Args:
            inputs: The parameters; may be empty. Give them types and, where known, shapes.
            grow: Adds nodes; it may read every value of the graphs around.
        """
        graph = ir.Graph(list(inputs), [], nodes=[], name=f"body{len(self._outer)}")
        graph.outputs.extend(self._grow_inside(graph, grow))
        return graph

    def parameter(self, name: str, dtype: ir.DataType, shape: DimShape | None = None) -> ir.Value:
        """Make an input for `body`; the node around it may learn less of it than `shape`."""
        value = ir.Value(name=self._fresh(name), type=ir.TensorType(dtype))
        if shape is not None:  # ONNX Runtime must know at least the rank.
            value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in shape])
        self.shapes.set_fact(value, Fact(dtype, shape))
        return value

    def _grow_inside(
        self, graph: ir.Graph, grow: Callable[[], Sequence[ir.Value]]
    ) -> list[ir.Value]:
        self._outer.append(self._graph)
        self._graph, before = graph, list(self.values)
        try:
            results = list(grow())
            for index, value in enumerate(results):
                # An output is produced by a node of the same graph, and only once.
                if value.graph is not graph or value in results[:index] or value in graph.inputs:
                    results[index] = self.emit("Identity", value)
        finally:
            self._graph = self._outer.pop()
            self.values = before
        return results

    def _append(self, node: ir.Node, outputs: int, name: str | None) -> list[ir.Value]:
        node.name = self._fresh(f"{op_name(node).split('::')[-1].lower()}_node")
        for value in node.outputs:
            value.name = self._fresh(name or f"{node.op_type.lower()}_{self._count()}")
        misfits = len(self.shapes.misfits)
        self._graph.append(node)
        if self._in_function:
            return list(node.outputs[:outputs])
        self.shapes.infer(node)
        if len(self.shapes.misfits) > misfits:
            self.drop()
        for value in node.outputs:
            fact = self.shapes.fact(value)
            if fact.dtype is not None:
                value.type = ir.TensorType(fact.dtype)
        return list(node.outputs[:outputs])

    def _count(self) -> int:
        return sum(1 for _ in self._graph)

    def _fresh(self, base: str) -> str:
        return self.module.fresh_name(base)

    # Questions

    def shape(self, value: ir.Value) -> DimShape:
        """Return the inferred shape; where even the rank is not known the example is dropped."""
        shape = self.shapes.shape(value)
        if shape is None:
            self.drop()
        return shape

    def rank(self, value: ir.Value) -> int:
        """Return the number of axes; see `shape`."""
        return len(self.shape(value))

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return the element type where it is known."""
        return self.shapes.dtype(value)

    def broadcasts(self, a: DimShape, b: DimShape) -> bool:
        """Tell whether two shapes broadcast for every extent of their names."""
        return all(
            (isinstance(x, int) and x == 1) or (isinstance(y, int) and y == 1) or equal(x, y)
            for x, y in zip(reversed(a), reversed(b), strict=False)
        )

    # Values

    def keep(self, value: ir.Value) -> None:
        """Let later pieces build on a value."""
        if value not in self.values:
            self.values.append(value)

    def pick(
        self,
        rank: int | None = None,
        *,
        dtype: ir.DataType = FLOAT,
        least: int = 0,
        where: Callable[[DimShape], bool] | None = None,
        otherwise: Sequence[int | str | None] | None = None,
    ) -> ir.Value:
        """Draw a value to build on, or add a graph input where none fits.

        Args:
            rank: Its rank; any rank by default.
            dtype: Its element type.
            least: Its least rank.
            where: What its shape must satisfy.
            otherwise: Shape of the input that is added; drawn by default.
        """
        found = [
            value
            for value in self.values
            if self.dtype(value) == dtype and self._fits(value, rank, least, where)
        ]
        if found and not self.rarely():
            # The newest first: long chains are likelier to meet than by a fair draw.
            return self.choose(*reversed(found[-6:]))
        if otherwise is not None:
            return self.input(otherwise, dtype)
        wanted = rank if rank is not None else max(least, self.choose(3, 2, 4, 1))
        value = self.input(self._some_shape(wanted), dtype)
        if not self._fits(value, rank, least, where):
            value = self.input(self._plain_shape(wanted), dtype)
            if not self._fits(value, rank, least, where):
                self.drop()
        return value

    def partner(self, value: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        """Draw a value that broadcasts with another: a value there is, or a constant."""
        shape, kind = self.shape(value), dtype or self.dtype(value) or FLOAT
        found = [
            other
            for other in self.values
            if self.dtype(other) == kind
            and (known := self.shapes.shape(other)) is not None
            and self.broadcasts(shape, known)
        ]
        if found and not self.flip():
            return self.choose(*reversed(found[-6:]))
        return self.constant_for(value, kind)

    def constant_for(self, value: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a constant that broadcasts to a value: a number, a row, a column or ones around."""
        shape, kind = self.shape(value), dtype or self.dtype(value) or FLOAT
        fixed = [dim if isinstance(dim, int) else 1 for dim in shape]
        form = self.choose("scalar", "row", "one", "axis", "full", "wider")
        if form == "scalar" or not shape:
            extents: list[int] = []
        elif form == "row":
            extents = fixed[-1:]
        elif form == "axis":
            axis = self.integer(0, len(shape) - 1)
            extents = [n if i == axis else 1 for i, n in enumerate(fixed)]
        elif form == "full":
            extents = fixed
        else:
            extents = [1] if form == "one" else [1, *fixed]
        if kind == BOOL:
            seed = np.random.default_rng(self.integer(0, 3))
            return self.constant(seed.random(extents) > 0.5)
        if kind.is_integer():
            return self.constant(np.full(extents, self.choose(1, 0, 2, 3), kind.numpy()))
        if self.flip():
            number = self.choose(1.0, 0.0, 2.0, -0.0, 0.5, -1.0)
            return self.constant(np.full(extents, number), kind)
        seed = np.random.default_rng(self.integer(0, 7))
        return self.constant(seed.random(extents) + 0.5, kind)

    def extents(self, value: ir.Value) -> ir.Value:
        """Add a Shape node."""
        return self.emit("Shape", value)

    def axis(self, value: ir.Value, *, least_rank: int = 1) -> int:
        """Draw an axis of a value, counted from the front or from the back."""
        rank = self.rank(value)
        if rank < least_rank:
            self.drop()
        axis = self.integer(0, rank - 1)
        return axis - rank if self.flip() else axis

    def reduce(self, op: str, value: ir.Value, axes: Sequence[int], keepdims: int = 1) -> ir.Value:
        """Add a reduction, its axes an attribute or an input as the opset has it.

        That it keeps the axes, which is the default, is said or left out.
        """
        said = None if keepdims == 1 and self.flip() else keepdims
        as_input = self.opset >= (13 if op == "ReduceSum" else 18)
        if as_input:
            return self.emit(op, value, self.ints(*axes), keepdims=said)
        return self.emit(op, value, axes=list(axes), keepdims=said)

    def reshape(self, value: ir.Value, *target: int) -> ir.Value:
        """Add a Reshape to constant extents; 0 copies, one -1 is solved for."""
        return self.emit("Reshape", value, self.ints(*target))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Add a Cast."""
        return self.emit("Cast", value, to=int(dtype))

    def _fits(
        self,
        value: ir.Value,
        rank: int | None,
        least: int,
        where: Callable[[DimShape], bool] | None,
    ) -> bool:
        shape = self.shapes.shape(value)
        if shape is None or len(shape) < least or (rank is not None and len(shape) != rank):
            return False
        return where is None or where(shape)

    def _some_shape(self, rank: int) -> list[int | str | None]:
        shape = self._plain_shape(rank)
        if self.anonymous and rank:
            for axis in range(rank - 1):
                if self.flip():
                    shape[axis] = None
        elif self.rarely() and rank:
            shape[self.integer(0, rank - 1)] = self.choose(1, 3)
        return shape

    @staticmethod
    def _plain_shape(rank: int) -> list[int | str | None]:
        full: list[int | str | None] = ["N", "S", 3, 8]
        return full[-1:] if rank == 1 else [*full[: rank - 1], 8] if rank <= 4 else ["N"] * rank

    # The end

    def finish(self) -> Module:
        """Choose the outputs and return the module, its unused values left dead or not."""
        graph = self.module.graph
        made = [
            value
            for value in self.values
            if value.producer() is not None
            and self.dtype(value) is not None
            and self.shapes.rank(value) is not None
        ]
        if not made:
            self.drop()
        ends = [value for value in made if not value.uses()]
        outputs = [made[-1]]
        for value in reversed(ends):
            if value not in outputs and len(outputs) < 4 and not self.rarely():
                outputs.append(value)
        if self.rarely():
            outputs.append(self.choose(*made))
        if self.rarely() and graph.inputs:
            outputs.append(self.choose(*graph.inputs))
        graph.outputs.extend(dict.fromkeys(outputs))
        for value in graph.outputs:
            if value.shape is None:
                value.shape = self._stated(value)
        return self.module

    def _stated(self, value: ir.Value) -> ir.Shape | None:
        shape = self.shapes.shape(value)
        if shape is None:
            return None
        return ir.Shape([dim if isinstance(dim, int) else _spelled(dim) for dim in shape])


def _spelled(dim: Dim) -> str | None:
    """Write an extent where it is a name of the inputs; leave others open."""
    text = str(dim)
    return text if text in ("N", "S", "T") and not is_anonymous(text) else None


def sketches(
    motifs: Iterable[Motif],
    *,
    steps: tuple[int, int] = (1, 8),
    opset: int | None = None,
    evenly: bool = False,
) -> SearchStrategy[Module]:
    """Return a strategy of modules grown from motifs.

    Args:
        motifs: What to choose from at each step; more than once makes one likelier.
        steps: The least and the largest number of steps.
        opset: Version of the standard operator set; drawn by default.
        evenly: Draw all choices of a graph from one seed: several times as fast and without
            hypothesis's bias to the first options, but hypothesis cannot shrink the graph.
    """
    choices = tuple(motifs)

    @st.composite
    def grow(draw: DrawFn) -> Module:
        sketch = Sketch(draw, opset, even_source(draw, evenly))
        for _ in range(sketch.integer(*steps)):
            sketch.choose(*choices)(sketch)
        return sketch.finish()

    return grow()
