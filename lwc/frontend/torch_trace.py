"""PyTorch in: `torch.export` captures the program, PyTorch's exporter spells it in ONNX operators.

Everything stays in memory: no protobuf is made, and the module's initializers are views of the
PyTorch parameters, not copies.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lwc.core.collector import without_collections
from lwc.core.errors import InputError, LwcError, MissingExtraError
from lwc.core.module import Module, Source
from lwc.core.walk import all_graphs

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_OPSET", "trace"]

DEFAULT_OPSET = 21
"""Opset that `trace` aims at: blocked DequantizeLinear exists from 21 on, and at 23 and above the
exporter fuses rotary embeddings into a form whose cosine cache has batch 1."""

_UNSUPPORTED = re.compile(r"No ONNX function found for <?(?:OpOverload\(op=')?([\w.:]+)")
_DATA_DEPENDENT = ("data-dependent", "GuardOnDataDependentSymNode", "unbacked symint")
_SHAPE_CONSTRAINT = ("Constraints violated", "conflicts between user-specified ranges")


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
            For an `ExportedProgram`, only the names are used.
        opset: Version of the standard operators, 18 or above; `DEFAULT_OPSET` when not given.
        input_names: Names of the graph's inputs, in order.
        output_names: Names of the graph's outputs, in order.

    Raises:
        InputError: The program cannot be captured or has an operator without a translation.
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
    if not isinstance(args, list | tuple):
        raise InputError(
            f"args is a tuple of example inputs, not a {type(args).__name__}",
            remedy="give (x,) for one input",
        )
    with _quiet(), without_collections(), torch.no_grad():
        program = (
            module
            if isinstance(module, torch.export.ExportedProgram)
            else _capture(module, tuple(args), dict(kwargs or {}), dynamic_shapes)
        )
        _divide_downward(program)
        model = _translate(program, version, dynamic_shapes, input_names, output_names)
    # The exporter counts its own values as `val_N`, also beside FX nodes that are called so.
    NameFixPass()(model)
    _name_dimensions(model, _dimension_names(program))
    _compact_provenance(model)
    return Module(model, source=Source(format="torch"))


def _capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    import torch

    title = type(module).__name__
    # Without this, an example dimension of extent 1 would be taken for a constant.
    one_is_no_constant = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with _evaluation_mode(module), one_is_no_constant:
        try:
            return torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=_without_names(dynamic_shapes),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise InputError(
                f"torch.export cannot capture {title}: {_summary(error)}",
                remedy=_capture_remedy(text),
            ) from error


def _capture_remedy(text: str) -> str:
    if any(mark in text for mark in _SHAPE_CONSTRAINT):
        return "loosen or drop this dimension in dynamic_shapes"
    if any(mark in text for mark in _DATA_DEPENDENT):
        return "control flow depends on tensor values: use torch.where or torch.cond there"
    return "check the example inputs and dynamic_shapes"


def _divide_downward(program: torch.export.ExportedProgram) -> None:
    """Have `a // b` of extents rounded down where a may be negative.

    The exporter makes it a Div, which cuts toward zero: minus the floor of minus, the usual way to
    round up, would round down.
    """
    import torch

    changed = False
    for inner in program.graph_module.modules():
        if not isinstance(inner, torch.fx.GraphModule):
            continue
        for node in list(inner.graph.nodes):
            if node.target is not operator.floordiv or _is_never_negative(node.args[0]):
                continue
            a, b = node.args
            with inner.graph.inserting_before(node):
                rest = inner.graph.call_function(operator.mod, (a, b))
                whole = inner.graph.call_function(operator.sub, (a, rest))
            rest.meta["val"] = _content(a) % _content(b)
            whole.meta["val"] = _content(a) - rest.meta["val"]
            node.args, changed = (whole, b), True
    if changed:
        program.graph_module.recompile()


def _is_never_negative(number: Any) -> bool:
    value = _content(number)
    return bool(value >= 0 if isinstance(value, int) else value.node.expr.is_nonnegative)


def _content(number: Any) -> Any:
    return number.meta["val"] if hasattr(number, "meta") else number


def _translate(
    program: torch.export.ExportedProgram,
    opset: int,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    import torch

    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        )
    except Exception as error:
        raise _translation_error(error) from error
    model: ir.Model = exported.model
    if model.opset_imports.get("") != opset:
        raise InputError(
            f"PyTorch's exporter cannot reach opset {opset}, it gave {model.opset_imports.get('')}",
            remedy=f"leave opset at {DEFAULT_OPSET}",
        )
    return model


def _translation_error(error: BaseException) -> LwcError:
    """Find the operator in the chain of causes, where it is an operator that failed."""
    cause: BaseException | None = error
    deepest = error
    while cause is not None:
        match = _UNSUPPORTED.search(str(cause))
        if match:
            return InputError(
                f"PyTorch's exporter has no ONNX translation of {match.group(1)}",
                remedy="replace the operator, or register a decomposition with torch.export",
            )
        deepest, cause = cause, cause.__cause__
    return InputError(f"PyTorch's exporter failed: {type(deepest).__name__}: {_summary(deepest)}")


def _summary(error: BaseException) -> str:
    """Shorten a PyTorch message to the facts of its first two lines."""
    text = str(error).replace('For more information, run with TORCH_LOGS="+dynamic".', "")
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__


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
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            shapes = mode.shape_env
            return {
                str(shapes.source_to_var[source]): str(name)
                for source, name in shapes.source_name_to_debug_name.items()
                if source in shapes.source_to_var
            }
    return {}


def _name_dimensions(model: ir.Model, names: dict[str, str]) -> None:
    """Give every symbol of the inputs' shapes a name, everywhere it occurs."""
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and re.fullmatch(r"[su]\d+", dim.value or ""):
                names.setdefault(str(dim.value), f"{value.name}_dim{axis}")
    for graph in all_graphs(model):
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\b[su]\d+\b", lambda match: names.get(match[0], match[0]), dim.value)


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
