"""PyTorch in: `torch.export` captures the program, PyTorch's exporter spells it in ONNX operators.

Everything stays in memory: no protobuf is made, and the module's initializers are views of the
PyTorch parameters, not copies.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lwc.core import dims
from lwc.core.collector import without_collections
from lwc.core.diagnostics import Remark
from lwc.core.errors import InputError, MissingExtraError
from lwc.core.module import Module, Source
from lwc.core.walk import all_graphs
from lwc.frontend.torch_extents import (
    Origin,
    axes_of,
    check_extents,
    fixing_place,
    names_of,
    noting_origins,
    requests,
    shape_environment,
)
from lwc.frontend.torch_translate import lowered_from, summary, translate

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_OPSET", "trace"]

DEFAULT_OPSET = 21
"""Opset that `trace` aims at: blocked DequantizeLinear exists from 21 on, and at 23 and above the
exporter fuses rotary embeddings into a form whose cosine cache has batch 1."""

_DATA_DEPENDENT = ("data-dependent", "GuardOnDataDependentSymNode", "unbacked symint")
_SHAPE_CONSTRAINT = (
    "Constraints violated",
    "conflicts between user-specified ranges",
    "Specializations unexpectedly required",
)


def trace(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Module:
    """Turn a PyTorch module into a `Module`.

    The module is traced in evaluation mode. Its parameters are shared with the result: changing
    them in place afterwards changes the result too.

    Args:
        module: An `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        args: Example positional inputs; not used for an `ExportedProgram`.
        kwargs: Example inputs by name.
        dynamic_shapes: As `torch.export.export` takes it, with strings for dynamic dimensions
            that only need a name. Names, of strings and of `torch.export.Dim`, are kept in the
            graph; dimensions of `Dim.AUTO` and `Dim.DYNAMIC` are called `<input>_dim<axis>`.
            For an `ExportedProgram`, only the names are used. A dimension that the module allows
            but one extent is an error, and fixed with a note where it was `Dim.AUTO`; conditions
            that the example took for granted, such as `n > 3`, are warnings among the module's
            remarks, and those that the module checks itself notes.
        opset: Version of the standard operators, 18 or above; `DEFAULT_OPSET` when not given.
        input_names: Names of the graph's inputs, in order.
        output_names: Names of the graph's outputs, in order.

    Raises:
        InputError: The program cannot be captured, has an operator without a translation, or is
            right only at one extent of a dimension that was to be dynamic.
        MissingExtraError: PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading a PyTorch module", "torch") from error

    from onnx_ir.passes.common import NameFixPass

    version = DEFAULT_OPSET if opset is None else opset
    if not isinstance(module, torch.nn.Module | torch.export.ExportedProgram):
        raise InputError(
            f"cannot trace a {type(module).__name__}",
            remedy="give an nn.Module, a GraphModule or an ExportedProgram",
        )
    if version < 18:
        raise InputError(f"opset {version} is below 18", remedy=f"leave it at {DEFAULT_OPSET}")
    if not isinstance(args, list | tuple):
        raise InputError(
            f"args is a tuple of example inputs, not a {type(args).__name__}",
            remedy="give (x,) for one input",
        )
    with _quiet(), without_collections(), torch.no_grad():
        origins: dict[Any, Origin] = {}
        if isinstance(module, torch.export.ExportedProgram):
            program, axes = module, axes_of(module, (), input_names)
        else:
            args, kwargs = _apart((tuple(args), dict(kwargs or {})))
            program, origins = _capture(module, args, kwargs, dynamic_shapes)
            axes = axes_of(program, requests(module, args, kwargs, dynamic_shapes), input_names)
            dynamic_shapes = None  # the exporter goes by the order of names, not by the names
        _check_outputs(program)
        remarks, fixed = check_extents(program, axes, origins)
        model = translate(
            module,
            program,
            version,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        )
    # The exporter counts its own values as `val_N`, also beside FX nodes that are called so.
    NameFixPass()(model)
    _name_dimensions(model, _dimension_names(program) | names_of(axes), fixed)
    _compact_provenance(model)
    traced = Module(model, source=Source(format="torch"))
    for remark in (*remarks, *_kept_buffers(program)):
        traced.remarks.emit(remark)
    return traced


def _check_outputs(program: torch.export.ExportedProgram) -> None:
    for index, spec in enumerate(program.graph_signature.output_specs):
        constant = getattr(spec.arg, "value", None)
        if constant is not None:
            raise InputError(
                f"output {index} of the module is {constant!r}, and a graph gives tensors",
                remedy="leave it out, or return a tensor",
            )


def _kept_buffers(program: torch.export.ExportedProgram) -> Iterator[Remark]:
    """Tell of buffers that a call changes, which a graph without a state cannot."""
    import torch

    signature = program.graph_signature
    changed = set(signature.buffers_to_mutate.values())  # of programs that were decomposed
    views: dict[torch.fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in signature.inputs_to_buffers:
            views[node] = signature.inputs_to_buffers[node.name]
        schema = getattr(node.target, "_schema", None)
        for parameter, given in zip(schema.arguments if schema else (), node.args, strict=False):
            if parameter.alias_info and isinstance(given, torch.fx.Node) and given in views:
                views[node] = views[given]
                if parameter.alias_info.is_write:
                    changed.add(views[given])
    for name in sorted(changed):
        yield Remark(
            "warning",
            "trace",
            f"each call changes buffer '{name}', and each run begins with what it was at the trace",
        )


def _apart(
    given: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make copies of a tensor that is given twice: torch.export takes it for one input."""
    import torch
    from torch.utils import _pytree

    leaves = _pytree.tree_leaves(given)
    tensors = [id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(tensors) == len(set(tensors)):
        return given
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        again = isinstance(leaf, torch.Tensor) and id(leaf) in seen
        seen.add(id(leaf))
        return leaf.detach().clone() if again else leaf

    made: tuple[tuple[Any, ...], dict[str, Any]] = _pytree.tree_map(once, given)
    return made


def _capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, dict[Any, Origin]]:
    import torch

    title = type(module).__name__
    # Without this, an example dimension of extent 1 would be taken for a constant.
    one_is_no_constant = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with _evaluation_mode(module), one_is_no_constant, noting_origins() as origins:
        try:
            program = torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=_without_names(dynamic_shapes),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            at = re.search(r"While executing %(\w+)", text)
            raise InputError(
                f"torch.export cannot capture {title}: {summary(error)}",
                node=lowered_from(module, at.group(1)) if at else None,
                remedy=_capture_remedy(text, fixing_place(origins)),
            ) from error
    return program, origins


def _capture_remedy(text: str, place: str | None) -> str:
    if any(mark in text for mark in _SHAPE_CONSTRAINT):
        change = f", or change {place}, which fixes it" if place else ""
        return f"loosen or drop this dimension in dynamic_shapes{change}"
    if any(mark in text for mark in _DATA_DEPENDENT):
        return "control flow depends on tensor values: use torch.where or torch.cond there"
    return "check the example inputs and dynamic_shapes"


# Dimensions


def _without_names(spec: Any) -> Any:
    """Replace strings in a `dynamic_shapes` specification by `Dim.DYNAMIC`."""
    import torch

    if isinstance(spec, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(spec, Mapping):
        return {key: _without_names(value) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return type(spec)(_without_names(value) for value in spec)
    return spec


def _dimension_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Map PyTorch's symbols (`s77`) to the names the user gave in `torch.export.Dim`."""
    shapes = shape_environment(program)
    if shapes is None:
        return {}
    return {
        str(shapes.source_to_var[source]): str(name)
        for source, name in shapes.source_name_to_debug_name.items()
        if source in shapes.source_to_var
    }


def _name_dimensions(model: ir.Model, names: dict[str, str], fixed: Mapping[str, int]) -> None:
    """Give every symbol of the inputs' shapes a name, or its number, everywhere it occurs."""
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and re.fullmatch(r"[su]\d+", dim.value or ""):
                names.setdefault(str(dim.value), f"{value.name}_dim{axis}")
    for graph in all_graphs(model):
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([_renamed(dim, names, fixed) for dim in value.shape])


def _renamed(
    dim: int | ir.SymbolicDim, names: Mapping[str, str], fixed: Mapping[str, int]
) -> int | ir.SymbolicDim | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    if fixed:
        dim = dims.as_ir_dim(dims.bind(dims.parse_dim(dim.value), fixed))
        if isinstance(dim, int):
            return dim
    return re.sub(r"\b[su]\d+\b", lambda match: names.get(match[0], match[0]), str(dim.value))


# Provenance


def _compact_provenance(model: ir.Model) -> None:
    """Keep `torch.module` and `torch.op` of each node, and let go of all other metadata.

    The exporter writes stack traces and printed FX nodes on every node, several times the size
    of the graph itself, and holds on to the FX graph through `meta`.
    """
    model.metadata_props.clear()
    for graph in all_graphs(model):
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            _strip(value)
        for node in graph:
            origin = node.meta.get("node")
            _strip(node)
            for value in node.outputs:
                _strip(value)
            if origin is not None:
                node.metadata_props.update(_origin(origin))


def _origin(origin: Any) -> dict[str, str]:
    operator = str(getattr(origin.target, "__name__", origin.target))
    stack = origin.meta.get("nn_module_stack") or {}
    modules = [path for path, _ in stack.values() if path and not path.startswith("_empty_")]
    found = {"torch.op": operator}
    if modules:
        found["torch.module"] = str(modules[-1])
    return found


def _strip(item: ir.Node | ir.Value) -> None:
    item.metadata_props.clear()
    item.meta.clear()


# Surroundings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's warnings and log lines; failures come as exceptions."""
    disabled = logging.root.manager.disable
    # PyTorch prints the half-made graph of a failed capture straight to standard error.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
