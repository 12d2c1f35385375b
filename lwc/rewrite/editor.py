"""The editor: the one way rules read facts and change graphs.

It keeps unique names, provenance, types and the names of graph outputs right, and notes which
nodes a change touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lwc.core.diagnostics import answers_to, describe
from lwc.core.dialect import DOMAIN
from lwc.core.dims import Dim, DimShape
from lwc.core.module import Module
from lwc.core.walk import attribute_graphs, constant_tensor, graph_and_subgraphs
from lwc.rewrite.limit import RewriteLimit, Step

if TYPE_CHECKING:
    from lwc.analysis.shapes import Shapes

__all__ = ["MIN_OPSET", "Editor", "attribute", "producer_of", "use_count"]

Array = np.ndarray[Any, Any]

MIN_OPSET = 13
"""Rules are written for operators as they are from this opset on."""

_SHARED_CONSTANT_BYTES = 1024
"""Constants up to this size are made once per content."""


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, `default` where it is absent.

    The driver keeps rules away from nodes whose attributes refer to a function's parameters.
    """
    found = node.attributes.get(name)
    return default if found is None else found.value


def producer_of(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """Return the node that makes `value` if it is one of the standard operators `ops`, else None.

    A node whose attributes refer to a function's parameters is none of them, as in the driver.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ops or node.domain:
        return None
    return None if any(each.is_ref() for each in node.attributes.values()) else node


def use_count(value: ir.Value) -> int:
    """Return how many inputs read a value; `len(value.uses())` copies them all first."""
    return len(value._uses)


class Editor:
    """Reads facts about values and edits the graphs of a module.

    Args:
        module: The module under rewriting.
        shapes: Its shape analysis; new nodes are added to it.
        source: The pass, recorded on the nodes it makes as `lwc.pass`.
        limit: Counts rewrites; the driver applies no rule once it is exhausted.
        explain: See `lwc.pipeline.passes.PassContext`.
    """

    def __init__(
        self,
        module: Module,
        shapes: Shapes,
        source: str,
        *,
        limit: RewriteLimit | None = None,
        explain: str | None = None,
    ) -> None:
        self.module = module
        self.shapes = shapes
        self.source = source
        self.limit = RewriteLimit() if limit is None else limit
        self.explain = explain
        self.applied: list[Step] = []
        self.root: ir.Node | None = None
        self.changed = False
        self.touched: dict[ir.Node, bool] = {}
        self._function_imports = {
            graph: function.opset_imports
            for function in module.model.functions.values()
            for graph in graph_and_subgraphs(function.graph)
        }
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._arrays: dict[ir.Value, Array] = {}

    def roots(self) -> list[ir.Graph]:
        """Return the graphs to rewrite: the main graph, and function bodies of a current opset.

        Those of the lwc dialect say what an operator means, and stay as they are.
        """
        functions = self.module.model.functions.values()
        current = [
            function.graph
            for function in functions
            if function.opset_imports.get("", MIN_OPSET) >= MIN_OPSET and function.domain != DOMAIN
        ]
        return [self.module.graph, *current]

    def asks_about(self, node: ir.Node) -> bool:
        """Tell whether the user asks what rules see at a node; see `explain`."""
        return self.explain is not None and answers_to(node, self.explain)

    def spend(self, rule: str, node: ir.Node | None = None) -> None:
        """Count a rewrite, before the graph changes; the driver does it for rules."""
        self.limit.spend(rule, node)
        if self.explain is not None and node is not None:
            self.note_applied(rule, node)

    def note_applied(self, what: str, node: ir.Node) -> None:
        """Keep in `applied` what happened at a node that the user asks about."""
        if self.explain is not None and answers_to(node, self.explain):
            self.applied.append(Step(what, describe(node)))

    # Facts

    def shape(self, value: ir.Value | None) -> DimShape | None:
        """Return the shape, unknown extents as expressions; None where the rank is not known."""
        return None if value is None else self.shapes.shape(value)

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of dimensions where it is known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type where it is known."""
        return None if value is None else self.shapes.dtype(value)

    def same_dim(self, a: Dim, b: Dim) -> bool:
        """Tell whether two extents are provably equal."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return self.shapes.equal(a, b)

    def same_shape(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        """Tell whether two values provably have the same shape."""
        first, second = self.shape(a), self.shape(b)
        if first is None or second is None or len(first) != len(second):
            return False
        return all(map(self.same_dim, first, second))

    def tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """Return the tensor a value always holds."""
        return constant_tensor(value)

    def array(self, value: ir.Value | None, limit: int = _SHARED_CONSTANT_BYTES) -> Array | None:
        """Return the content of a constant of at most `limit` bytes."""
        tensor = constant_tensor(value)
        if tensor is None or value is None or tensor.nbytes > limit:
            return None
        found = self._arrays.get(value)
        if found is None:
            found = tensor.numpy()
            self._arrays[value] = found
        return found

    def ints(self, value: ir.Value | None) -> list[int] | None:
        """Return the content of an integer vector or scalar, flattened, where all is known."""
        content = self.symbolic(value)
        if content is None or not all(isinstance(each, int) for each in content):
            return None
        return [int(each) for each in content]

    def symbolic(self, value: ir.Value | None) -> list[Dim] | None:
        """Return the content of a small integer tensor as extents, flattened."""
        if value is None:
            return None
        known = self.shapes.known(value)
        return None if known is None else list(known.ravel())

    def scalar(self, value: ir.Value | None) -> float | int | bool | None:
        """Return the number that every element of a small constant equals."""
        array = self.array(value)
        if array is None or array.size == 0 or array.dtype.kind not in "biuf":
            return None
        flat = array.ravel()
        first = flat[0]
        # By bits: 0.0 equals -0.0 and is another number.
        return first.item() if flat.tobytes() == first.tobytes() * flat.size else None

    def in_function(self, node: ir.Node) -> bool:
        """Tell whether the node lies in a function body, which holds no initializers."""
        return node.graph in self._function_imports

    def imports(self, node: ir.Node) -> dict[str, int]:
        """Return the operator sets that are in force at a node."""
        found = self._function_imports.get(node.graph) if node.graph is not None else None
        return dict(self.module.graph.opset_imports if found is None else found)

    def opset(self, node: ir.Node) -> int:
        """Return the version of the standard operators in force at a node."""
        imports = self.imports(node)
        return imports.get("", imports.get("ai.onnx", 1))

    def is_constant(self, value: ir.Value | None) -> bool:
        """Tell whether a value is the same in every run."""
        return constant_tensor(value) is not None

    def single_use(self, value: ir.Value) -> bool:
        """Tell whether exactly one input reads the value and it leaves no graph."""
        return use_count(value) == 1 and not value.is_graph_output()

    def may_become_output(self, value: ir.Value, graph: ir.Graph) -> bool:
        """Tell whether the value could take the place and name of an output of `graph`."""
        producer = value.producer()
        return producer is not None and producer.graph is graph and not value.is_graph_output()

    # Construction

    def at(self, node: ir.Node) -> Editor:
        """Make new nodes before `node` from now on; for rules the driver has done it."""
        self.root = node
        return self

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Make a node with one output before the root and return that output."""
        return self.node(op_type, inputs, attributes, domain=domain).outputs[0]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """Make a node before the root; an operator domain not declared yet is, at version 1."""
        root = self._root()
        if domain and domain not in self.imports(root):
            self.module.import_opset(domain, 1)
        base = root.outputs[0].name or op_type
        made = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes or {}),
            outputs=[ir.Value(name=self.module.fresh_name(base)) for _ in range(outputs)],
            name=self.module.fresh_name(root.name or op_type),
        )
        self.adopt(made)
        return made

    def adopt(self, node: ir.Node) -> None:
        """Insert a node that was made elsewhere before the root; its names must be fresh."""
        root = self._root()
        assert root.graph is not None
        node.metadata_props["lwc.pass"] = self.source
        root.graph.insert_before(root, node)
        self.shapes.infer(node)
        for value in node.outputs:
            dtype = self.shapes.dtype(value)
            if value.type is None and dtype is not None:
                value.type = ir.TensorType(dtype)
        self.changed = True
        self.touch(node)

    def constant(
        self,
        content: Array | ir.TensorProtocol | list[int] | tuple[int, ...],
        name: str = "constant",
    ) -> ir.Value:
        """Return a constant value usable at the root; small ones of equal content are shared.

        Integers become an int64 vector.
        """
        if isinstance(content, list | tuple):
            content = np.array(content, dtype=np.int64)
        key = _content_key(content)
        if self.in_function(self._root()):
            tensor = ir.Tensor(content) if isinstance(content, np.ndarray) else content
            return self.op("Constant", [], {"value": tensor})
        found = self._constants.get(key) if key is not None else None
        if found is not None and found.graph is self.module.graph:
            return found
        value = self.module.add_initializer(name, content)
        self.changed = True
        if key is not None:
            self._constants[key] = value
        return value

    def share_constants(self) -> int:
        """Make small initializers of equal content in the main graph one; return how many went."""
        gone = 0
        # Those that leave the graph stay, so one of them must be the one that others become.
        initializers = self.module.graph.initializers.values()
        for value in sorted(initializers, key=lambda each: not each.is_graph_output()):
            if not use_count(value):
                continue
            tensor = self.tensor(value)
            key = None if tensor is None else _content_key(tensor)
            if key is None:
                continue
            first = self._constants.setdefault(key, value)
            if first is value or value.is_graph_output():
                continue
            if self.limit.exhausted:
                break
            self.spend("shared-constants")
            self.redirect(value, first)
            gone += 1
        return gone

    # Change

    def touch(self, *nodes: ir.Node, inputs_changed: bool = False) -> None:
        """Ask the driver to visit nodes again."""
        for node in nodes:
            self.touched[node] = self.touched.get(node, False) or inputs_changed

    def redirect(self, old: ir.Value, new: ir.Value) -> None:
        """Let every node that reads `old` read `new`; graph outputs stay."""
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
            self.touch(user, inputs_changed=True)
        self.changed = True

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Replace one input of a node."""
        old = node.inputs[index]
        node.replace_input_with(index, value)
        self.changed = True
        self.touch(node, inputs_changed=True)
        if old is not None:
            self._touch_after_loss(old)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Put `new` in the place of `old` everywhere, graph outputs included.

        A graph output keeps its name and declared type: `new` takes them over, or an Identity
        carries them where `new` cannot (it is an input, an initializer, another output, or of an
        outer graph).
        """
        self.redirect(old, new)
        made = new.producer()
        fresh = made is not None and made in self.touched and made.metadata_props.get("lwc.pass")
        if old.is_graph_output():
            graph = old.graph
            assert graph is not None
            if not self.may_become_output(new, graph):
                new = self.op("Identity", [new])
            new.type = old.type or new.type
            new.shape = old.shape if old.shape is not None else new.shape
            for index, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[index] = new
            self._take_name(old, new)
        elif fresh and not new.is_graph_output():
            if new.shape is None and old.shape is not None:
                new.shape = old.shape
            self._take_name(old, new)

    def _take_name(self, old: ir.Value, new: ir.Value) -> None:
        name = old.name
        if name is not None:
            old.name = self.module.fresh_name(name)
            new.name = name

    def erase(self, node: ir.Node) -> int:
        """Remove a node whose outputs nothing reads, and what only it needed.

        Legality often asks for a single use, so nothing dead may keep holding a value.

        Returns:
            How many nodes went, those inside removed bodies not counted.
        """
        count = 0
        dead = [node]
        while dead:
            gone = dead.pop()
            if gone.graph is None:
                continue
            gone.graph.remove(gone)
            self.touched.pop(gone, None)
            count += 1
            for value in _detach(gone):
                producer = value.producer()
                if producer is not None and producer.graph is not None and self.is_dead(producer):
                    dead.append(producer)
                else:
                    self._touch_after_loss(value)
        self.changed = True
        return count

    def _touch_after_loss(self, value: ir.Value) -> None:
        # Only a last or single remaining use can make a rule legal that was not; visiting hubs
        # on every lost use would make the run quadratic.
        if use_count(value) > 1:
            return
        producer = value.producer()
        if producer is not None and producer.graph is not None:
            self.touch(producer)
        self.touch(*(user for user, _ in value.uses()))

    def is_dead(self, node: ir.Node) -> bool:
        """Tell whether nothing reads any output of the node."""
        return not any(use_count(value) or value.is_graph_output() for value in node.outputs)

    def _root(self) -> ir.Node:
        assert self.root is not None, "the editor has no root: edits happen inside a rule"
        return self.root


def _detach(node: ir.Node) -> list[ir.Value]:
    """Take a removed node's bodies apart; let go of everything they read and return that."""
    values: list[ir.Value] = []
    stack = [node]
    while stack:
        current = stack.pop()
        values.extend(value for value in current.inputs if value is not None)
        current.resize_inputs(0)
        for graph in attribute_graphs(current):
            inner = list(graph)
            graph.remove(inner)
            stack.extend(inner)
    return values


def _content_key(content: Array | ir.TensorProtocol) -> tuple[Any, ...] | None:
    if content.nbytes > _SHARED_CONSTANT_BYTES:
        return None
    if isinstance(content, np.ndarray):
        dtype = ir.DataType.from_numpy(content.dtype)
        if dtype == ir.DataType.STRING:
            return None
        return (dtype, content.shape, np.ascontiguousarray(content).tobytes())
    if content.dtype == ir.DataType.STRING:
        return None
    return (content.dtype, tuple(content.shape), content.tobytes())
