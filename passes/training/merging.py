"""Folding adapters into weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.weights import reading
from lwc.passes.training.low_rank import Adapter, Factor, adapter_at, factor_of
from lwc.rewrite import (
    Editor,
    Miss,
    Outcome,
    Rule,
    RuleSet,
    attribute,
    first_line,
    remove_unused,
    rewrite,
    use_count,
)

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import PassContext

__all__ = ["merge"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_ROWS = 1024
"""Rows of a weight that are in float64 at once."""


def merge(module: Module, ctx: PassContext) -> Mapping[str, int]:
    """Fold all adapters of a module into the weights; return the rewrites by rule."""
    edit = ctx.editor()

    def rule(node: ir.Node, edit: Editor) -> Outcome:
        return _merge(node, edit, ctx)

    done = rewrite(edit, RuleSet([Rule("merge-lora", ("Add",), rule, first_line(_merge))]))
    ctx.report(done)
    if edit.changed:
        remove_unused(module)
    return dict(sorted(done.hits.items()))


def _merge(node: ir.Node, edit: Editor, ctx: PassContext) -> Outcome:
    """x·W + s·(x·A)·B is x·(W + s·A·B)."""
    found = adapter_at(node, edit)
    if found is None:
        return None
    weight = factor_of(found.base)
    if weight is None:
        kind = found.base.op_type
        return Miss(f"the weight of {kind} is no plain constant: its base is quantized", found.base)
    if edit.in_function(node):
        return Miss("it belongs to a function body, which holds no initializers", node)
    alpha = attribute(found.base, "alpha", 1.0)
    if alpha == 0:
        return Miss("its base multiplies the product by 0", found.base)
    merged = _merged(weight, found, found.scale / alpha)
    if merged is None:
        kind = weight.tensor.dtype.name.lower()
        return Miss(f"the merged weight leaves the range of {kind}", found.base)
    _put(weight, merged, found.base, edit, ctx)
    return found.sum.inputs[1 - found.side]


def _put(weight: Factor, merged: Array, base: ir.Node, edit: Editor, ctx: PassContext) -> None:
    """Give the base its new weight, in the place of the old one where nothing else reads that."""
    value, module = weight.value, edit.module
    tensor = module.spilled(ir.Tensor(merged, dtype=weight.tensor.dtype))
    alone = use_count(value) == 1 and not value.is_graph_output() and not value.is_graph_input()
    direct = base.inputs[1] is value
    if alone and direct and value.is_initializer() and value.graph is module.graph:
        module.replace_initializer(value, tensor)
        edit.changed = True
        return
    if not alone:
        ctx.note(f"'{value.name}' is read elsewhere too and now stored twice: "
                 f"{tensor.nbytes} B more", base)  # fmt: skip
    before = base.inputs[1]
    edit.set_input(base, 1, module.add_initializer(value.name or "weight", tensor))
    producer = None if before is None else before.producer()
    if producer is not None and edit.is_dead(producer):
        edit.erase(producer)


def _merged(weight: Factor, found: Adapter, scale: float) -> Array | None:
    """Return W + scale·A·B as the base's input has it, None where that is not finite."""
    turned = bool(attribute(found.base, "transB", 0))
    down, up = _matrix(found.down), _matrix(found.up)
    left, right = (up.T, down.T) if turned else (down, up)
    with reading(weight.tensor) as array, np.errstate(over="ignore", invalid="ignore"):
        plain = array.T if weight.transposed != turned else array
        merged = np.empty(plain.shape, array.dtype)
        for start in range(0, len(plain), _ROWS):
            rows = slice(start, start + _ROWS)
            wide = plain[rows].astype(np.float64)
            merged[rows] = (wide + scale * (left[rows] @ right)).astype(array.dtype)
            if np.isfinite(wide).all() and not np.isfinite(merged[rows].astype(np.float64)).all():
                return None
    return merged


def _matrix(factor: Factor) -> Array:
    """Return a factor as its product sees it, in float64."""
    with reading(factor.tensor) as array:
        return np.array(array.T if factor.transposed else array, np.float64)
