"""What PyTorch's exporter makes of a program: with what it lacks, and errors that say where."""

from __future__ import annotations

import copy
import operator
import re
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lwc.core.diagnostics import describe_origin
from lwc.core.errors import InputError, LwcError

if TYPE_CHECKING:
    import torch

__all__ = ["lowered_from", "summary", "translate"]

_UNSUPPORTED = re.compile(r"No ONNX function found for <?(?:OpOverload\(op=')?([\w.:]+)")


def translate(
    module: torch.nn.Module | torch.export.ExportedProgram,
    program: torch.export.ExportedProgram,
    opset: int,
    *,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """Spell an exported program in ONNX operators.

    Args:
        module: What it was captured from, of which errors name the place.
        program: The program.
        opset: Version of the standard operators.
        dynamic_shapes: As `torch.onnx.export` takes it, as are the names.
        input_names: Names of the inputs.
        output_names: Names of the outputs.

    Raises:
        InputError: An operator has no translation, or the exporter fails.
    """
    import torch

    try:
        exported = torch.onnx.export(
            _dividing_downward(program),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table={
                torch.ops.aten.sort.stable: _sorted,
                torch.ops.aten.__rshift__.Scalar: _shifted_right,
                torch.ops.aten.__rshift__.Tensor: _shifted_right,
            },
        )
    except Exception as error:
        raise _translation_error(error, module) from error
    model: ir.Model = exported.model
    if model.opset_imports.get("") != opset:
        raise InputError(
            f"PyTorch's exporter cannot reach opset {opset}, it gave {model.opset_imports.get('')}",
            remedy="leave opset out",
        )
    return model


def _sorted(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Sort by the operator that has equal elements in their order, which the exporter lacks."""
    from onnxscript import opset18

    op: Any = opset18
    if not self.shape:
        return op.Identity(self), op.Constant(value_int=0)
    count = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, count, axis=dim, largest=int(descending))


def _shifted_right(self: Any, other: Any) -> Any:
    """Shift as `>>` does: the exporter lacks tensors of it, and makes unsigned numbers signed."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops import core

    op: Any = opset18
    if isinstance(other, int):
        other = op.Constant(value=ir.tensor(other, dtype=self.dtype))
    if self.dtype.is_signed():
        return core.aten_bitwise_right_shift(self, other)
    return op.BitShift(self, other, direction="RIGHT")


def _translation_error(
    error: BaseException, module: torch.nn.Module | torch.export.ExportedProgram
) -> LwcError:
    """Find the operator in the chain of causes, where it is an operator that failed."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    place = next(filter(None, (_place(each, module) for each in reversed(causes))), None)
    for each in causes:
        match = _UNSUPPORTED.search(str(each))
        if match:
            remedy = "replace the operator, or register a decomposition with torch.export"
            if "grouped_mm" in match.group(1):
                remedy = 'load the model with experts_implementation="batched_mm"'
            message = f"PyTorch's exporter has no ONNX translation of {match.group(1)}"
            return InputError(message, node=place, remedy=remedy)
    message = f"{type(causes[-1]).__name__}: {summary(causes[-1])}"
    return InputError(f"PyTorch's exporter failed: {message}", node=place)


def _place(
    error: BaseException, module: torch.nn.Module | torch.export.ExportedProgram
) -> str | None:
    """Name the ONNX node or the submodule that the exporter was at."""
    import torch

    at: Any = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        at = node if isinstance(node, torch.fx.Node) else at
    if at is None:
        return None
    earlier = at.meta.get("from_node") or ()
    while earlier:
        found = lowered_from(module, earlier[-1].name)
        if found is not None:
            return found
        earlier = earlier[-1].from_node
    paths = [path for path, _ in (at.meta.get("nn_module_stack") or {}).values() if path]
    return f"module '{paths[-1]}'" if paths else None


def lowered_from(module: Any, name: str) -> str | None:
    """Name the ONNX node that a node of a GraphModule of lwc's was lowered from."""
    for node in getattr(getattr(module, "graph", None), "nodes", ()):
        if node.name == name and "onnx" in node.meta:
            return describe_origin(node.meta["onnx"])
    return None


def summary(error: BaseException) -> str:
    """Shorten a PyTorch message to the facts of its first two lines."""
    text = str(error).replace('For more information, run with TORCH_LOGS="+dynamic".', "")
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__


def _dividing_downward(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Have `a // b` of extents rounded down where a may be negative, in a copy without weights.

    The exporter makes it a Div, which cuts toward zero: minus the floor of minus, the usual way to
    round up, would round down.
    """
    inner = _with_floors(program.graph_module)
    if inner is program.graph_module:
        return program
    twin = copy.copy(program)
    twin._graph_module = inner
    return twin


def _with_floors(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    import torch

    parts = {
        name: (part, _with_floors(part))
        for name, part in module.named_children()
        if isinstance(part, torch.fx.GraphModule)
    }
    changed = {name: made for name, (part, made) in parts.items() if made is not part}
    if not changed and not any(map(_is_cut, module.graph.nodes)):
        return module
    twin = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
    twin.meta.update(module.meta)
    for name, part in changed.items():
        setattr(twin, name, part)
    for node in filter(_is_cut, list(twin.graph.nodes)):
        a, b = node.args
        with twin.graph.inserting_before(node):
            rest = twin.graph.call_function(operator.mod, (a, b))
            whole = twin.graph.call_function(operator.sub, (a, rest))
        rest.meta["val"] = _content(a) % _content(b)
        whole.meta["val"] = _content(a) - rest.meta["val"]
        node.args = (whole, b)
    twin.recompile()
    return twin


def _is_cut(node: torch.fx.Node) -> bool:
    return node.target is operator.floordiv and not _is_never_negative(node.args[0])


def _is_never_negative(number: Any) -> bool:
    value = _content(number)
    return bool(value >= 0 if isinstance(value, int) else value.node.expr.is_nonnegative)


def _content(number: Any) -> Any:
    return number.meta["val"] if hasattr(number, "meta") else number
