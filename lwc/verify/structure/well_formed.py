"""Structural verification: is a module well formed?

It walks the module once and renders nothing, so that it can run after every pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from lwc.core.diagnostics import describe, neighbourhood
from lwc.core.errors import VerificationError
from lwc.core.module import Module
from lwc.core.schemas import STANDARD_DOMAINS, newest_opset, signature_problem
from lwc.core.walk import attribute_graphs
from lwc.verify.structure.bodies import BODIES, body_problem, call_problem, recursion

__all__ = ["verify_structure"]


DIALECT = "lwc"
"""The domain of lwc's own operators: each is a function of the model, which is its meaning."""


def verify_structure(module: Module) -> None:
    """Check that a module is well formed.

    Every value is produced once, before it is used, in its graph or one around it; names are
    unique in a graph and hide none of an outer graph; initializers have the type and shape of
    their tensors; standard operators exist at the imported opset, which the onnx package knows,
    with inputs, outputs and attributes in their bounds, and no input absent but optional ones;
    bodies have the inputs and outputs that their operator gives and takes; calls fit the function
    they name, and no function calls itself; graph outputs are produced and typed; functions
    likewise. Unused inputs, nodes of one name and a value that is two graph outputs are all
    allowed.

    Raises:
        VerificationError: The first violation, with the node and its neighbours.
    """
    model = module.model
    main = _Verifier(module, _standard(model.graph.opset_imports))
    main.opsets("the model")
    main.graph(model.graph, "the graph")
    for value in model.graph.outputs:
        if value.type is None:
            main.fail(f"graph output '{value.name}' has no type", value.producer())
    for function in model.functions.values():
        where = f"function '{function.name}'"
        verifier = _Verifier(module, _standard(function.opset_imports), function)
        verifier.opsets(where)
        if function.graph.initializers:
            verifier.fail(f"{where} has initializers, which ONNX has not")
        verifier.graph(function.graph, where)
    if model.functions:
        problem = recursion(model)
        if problem is not None:
            main.fail(problem)


def _standard(imports: Mapping[str, int]) -> dict[str, int]:
    return {"" if domain == "ai.onnx" else domain: version for domain, version in imports.items()}


class _Verifier:
    """Checks one graph or function with everything nested in it.

    `visible` maps each name that can be used at the current place to its value: one dictionary
    for all scopes, since no name may hide another; leaving a graph takes its names out.
    """

    def __init__(
        self, module: Module, imports: dict[str, int], function: ir.Function | None = None
    ) -> None:
        self.module = module
        self.imports = imports
        self.function = function
        self.functions = {(domain, name) for domain, name, _ in module.model.functions}
        self.visible: dict[str, ir.Value] = {}

    def fail(self, problem: str, node: ir.Node | None = None) -> None:
        """Raise the error, with the neighbourhood of `node`."""
        file = self.module.source.path
        if node is None:
            raise VerificationError(problem, file=file)
        raise VerificationError(f"{problem}\n{neighbourhood(node)}", file=file, node=describe(node))

    def opsets(self, where: str) -> None:
        """Check that the onnx package knows the standard opsets that are imported."""
        for domain, version in self.imports.items():
            if domain in STANDARD_DOMAINS and version > newest_opset(domain):
                self.fail(
                    f"{where} imports opset {version} of {domain or 'ai.onnx'}, newer than "
                    f"{newest_opset(domain)}, the newest that the onnx package knows"
                )

    def graph(self, graph: ir.Graph, where: str) -> None:
        """Check a graph; `visible` holds the names of those around it."""
        own: list[str] = []
        for value in graph.inputs:
            self._declare(value, own, f"input of {where}")
        for name, value in graph.initializers.items():
            if value.name != name:
                self.fail(f"initializer '{name}' of {where} calls itself '{value.name}'")
            if not value.is_graph_input():
                self._declare(value, own, f"initializer of {where}")
            self._initializer(value, where)
        visible = self.visible
        for node in graph:
            if node.graph is not graph:
                self.fail("is listed in a graph that it does not belong to", node)
            for index, used in enumerate(node.inputs):
                if used is None:
                    continue
                if visible.get(used.name or "") is not used:
                    self._explain_use(used, node)
                # uses() copies the whole table each time, which is quadratic for a shared weight.
                if (node, index) not in used._uses:
                    self.fail(f"input '{used.name}' does not know of this use", node)
            self._operator(node)
            if node.attributes:
                self._attributes(node)
                for nested in attribute_graphs(node):
                    self.graph(nested, f"a subgraph of {describe(node)}")
            for index, value in enumerate(node.outputs):
                if value.producer() is not node or value.index() != index:
                    self.fail(f"output '{value.name}' belongs to another node", node)
                if value.name:
                    self._declare(value, own, "output", node)
                elif value.uses():
                    self.fail(f"output {index} is used but has no name", node)
        names = set(own)
        for value in graph.outputs:
            if value.name not in names or visible[value.name] is not value:
                self.fail(f"output '{value.name}' of {where} is not produced", value.producer())
        for name in own:
            del visible[name]

    def _declare(
        self, value: ir.Value, own: list[str], what: str, node: ir.Node | None = None
    ) -> None:
        name = value.name
        if not name:
            self.fail(f"an {what} has no name", node)
            return
        if name in self.visible:
            self.fail(f"{what} '{name}' has a name that is taken", node)
        self.visible[name] = value
        own.append(name)

    def _explain_use(self, value: ir.Value, node: ir.Node) -> None:
        producer = value.producer()
        if producer is None:
            reason = "is neither produced by a node nor an input or initializer in sight"
        elif producer.graph is None:
            reason = f"is produced by {describe(producer)}, which is in no graph"
        elif producer.graph is node.graph:
            reason = f"is produced by {describe(producer)}, which comes later"
        else:
            reason = f"is produced by {describe(producer)}, out of sight in another graph"
        self.fail(f"input '{value.name}' {reason}", node)

    def _operator(self, node: ir.Node) -> None:
        domain = node.domain
        if (domain, node.op_type) in self.functions:
            function = self.module.model.functions.get(node.op_identifier())
            problem = (
                f"no function of that name has the overload '{node.overload}'"
                if function is None
                else call_problem(node, function)
            )
        elif domain in STANDARD_DOMAINS:
            problem = self._standard_problem(node)
        elif domain == DIALECT:
            problem = "the model has no function for it, so it has no meaning"
        else:
            problem = None if domain in self.imports else f"domain '{domain}' is not imported"
        if problem is not None:
            self.fail(problem, node)

    def _standard_problem(self, node: ir.Node) -> str | None:
        version = self.imports.get(node.domain)
        if version is None:
            return f"domain '{node.domain or 'ai.onnx'}' is not imported"
        problem = signature_problem(
            node.domain,
            node.op_type,
            version,
            inputs=len(node.inputs),
            outputs=_present(node.outputs),
            attributes={name: a.type.value for name, a in node.attributes.items()},
            absent=[index for index, value in enumerate(node.inputs) if value is None],
        )
        if problem is None and not node.domain and node.op_type in BODIES:
            problem = body_problem(node)
        return problem

    def _attributes(self, node: ir.Node) -> None:
        """Check the names of attributes, and those that the caller of a function gives."""
        for name, attribute in node.attributes.items():
            if attribute.name != name:
                self.fail(f"attribute '{name}' calls itself '{attribute.name}'", node)
            if not attribute.is_ref():
                continue
            if self.function is None:
                self.fail(f"attribute '{name}' refers to one of a function, but is in none", node)
            elif attribute.ref_attr_name not in self.function.attributes:
                self.fail(
                    f"attribute '{name}' refers to '{attribute.ref_attr_name}', which "
                    f"function '{self.function.name}' has not",
                    node,
                )

    def _initializer(self, value: ir.Value, where: str) -> None:
        tensor = value.const_value
        if tensor is None:
            self.fail(f"initializer '{value.name}' of {where} has no tensor")
            return
        if value.dtype is not None and value.dtype != tensor.dtype:
            self.fail(
                f"initializer '{value.name}' of {where} is declared {value.dtype.name} "
                f"but its tensor is {tensor.dtype.name}"
            )
        if value.shape is None:
            return
        have, declared = tuple(tensor.shape), tuple(value.shape)
        if len(have) != len(declared) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(declared, have, strict=True)
        ):
            self.fail(
                f"initializer '{value.name}' of {where} is declared with shape {value.shape} "
                f"but its tensor has {list(have)}"
            )


def _present(outputs: Iterable[ir.Value]) -> int:
    """Return the number of outputs up to the last that has a name."""
    last = 0
    for position, value in enumerate(outputs, 1):
        if value.name:
            last = position
    return last
