"""bind-dims: named dimensions become numbers."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.core.dims import as_ir_dim, bind, is_anonymous, parse_dim
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult

__all__ = ["BindDims", "bind_dims"]

_RECORD = "lwc.bind-dims"
_MAX_EXTENT = 2**63 - 1


@dataclass(frozen=True)
class BindDims(Pass):
    """Set named dimensions of the inputs to numbers, as in bind-dims{batch=1 sequence=128}.

    An unnamed dimension goes by the name the printer shows for it, such as `x_dim0`.

    Attributes:
        bindings: Pairs of a dimension's name and its extent.
    """

    bindings: tuple[tuple[str, int], ...] = ()

    name: ClassVar[str] = "bind-dims"
    contract: ClassVar[Exact] = Exact(("The inputs have the bound extents.",))
    free_options: ClassVar[str] = "bindings"
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes", "parameter-bytes"})

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Set the dimensions.

        Raises:
            UsageError: No input has a dimension of that name, or the number is no extent.
            PassError: A dimension is bound to another number already.
        """
        new = _not_yet_bound(module, dict(self.bindings))
        if not new:
            ctx.note("nothing to bind")
            return PassResult(False)
        bound = bind_dims(module, ctx.analyses.get(Shapes), new)
        return PassResult(True, statistics={"bound-extents": bound})


def _not_yet_bound(module: Module, bindings: dict[str, int]) -> dict[str, int]:
    before: dict[str, int] = json.loads(module.graph.metadata_props.get(_RECORD, "{}"))
    for name, extent in bindings.items():
        if not 1 <= extent <= _MAX_EXTENT:
            raise UsageError(
                f"dimension '{name}' cannot be {extent}",
                remedy="give a number above 0" if extent < 1 else "ONNX has extents of 64 bits",
            )
        if before.get(name, extent) != extent:
            raise PassError(f"dimension '{name}' is bound to {before[name]} already")
    return {name: extent for name, extent in bindings.items() if name not in before}


def bind_dims(module: Module, shapes: Shapes, bindings: dict[str, int]) -> int:
    """Replace named dimensions by numbers on every value that states its shape.

    Returns:
        How many extents changed.

    Raises:
        UsageError: No input has a dimension of that name.
    """
    inputs = {value: shapes.shape(value) or () for value in module.graph.inputs}
    names = {
        symbol.name
        for dims in inputs.values()
        for dim in dims
        if not isinstance(dim, int)
        for symbol in dim.free_symbols
    }
    for name in bindings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or sorted(names)
            raise UsageError(
                f"no input has a dimension named '{name}'",
                remedy=f"did you mean {', '.join(near)}?" if near else "every extent is a number",
            )
    changed = 0
    for value, dims in inputs.items():
        new = [bind(dim, bindings) for dim in dims]
        for axis, (old, extent) in enumerate(zip(dims, new, strict=True)):
            if old != extent:
                assert value.shape is not None
                changed += 1
                shape = list(value.shape)
                shape[axis] = as_ir_dim(extent)
                value.shape = ir.Shape(shape)
    for graph in module.graphs():
        for node in graph:
            for value in node.outputs:
                changed += _bind_stated(value, bindings)
    record = {**json.loads(module.graph.metadata_props.get(_RECORD, "{}")), **bindings}
    module.graph.metadata_props[_RECORD] = json.dumps(record, sort_keys=True)
    return changed


def _bind_stated(value: ir.Value, bindings: dict[str, int]) -> int:
    """Bind the extents a value states; unnamed ones stay."""
    if value.shape is None:
        return 0
    changed = 0
    dims: list[int | ir.SymbolicDim] = []
    for dim in value.shape:
        text = None if isinstance(dim, int) else dim.value
        if text is None or is_anonymous(text):
            dims.append(dim)
            continue
        old = parse_dim(text)
        new = bind(old, bindings)
        changed += new != old
        dims.append(dim if new == old else as_ir_dim(new))
    if changed:
        value.shape = ir.Shape(dims)
    return changed
