"""fold-linear: normalization, padding, bias and scale become part of the weights beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lwc.core.collector import without_collections
from lwc.core.module import Module
from lwc.core.walk import constant_tensor
from lwc.core.weights import reading
from lwc.passes.cleanup.linear.affine import AFFINE_OPS, Affine, affine_of
from lwc.passes.cleanup.linear.linear_ops import Linear, LinearFolder, linear_of
from lwc.passes.cleanup.linear.padding import RULES as PADDING_RULES
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult
from lwc.rewrite import (
    Editor,
    Miss,
    Outcome,
    Rule,
    RuleSet,
    attribute,
    first_line,
    producer_of,
    remove_unused,
    rewrite,
)

__all__ = ["FoldLinear", "fold_linear"]

_LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_COARSEST = 2.0**-8
"""No type rounds a number in its normal range by more."""
_CARRIERS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True)
class FoldLinear(Pass):
    """Fold batch norm, padding, bias and scale into Conv, ConvTranspose, Gemm and MatMul."""

    name: ClassVar[str] = "fold-linear"
    contract: ClassVar[Exact] = Exact()
    never_more: ClassVar[frozenset[str]] = frozenset({"nodes", "flops"})

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Rewrite until nothing changes."""
        with without_collections():
            return fold_linear(module, ctx)


def fold_linear(module: Module, ctx: PassContext) -> PassResult:
    """Fold what surrounds linear operators into their constants, computed in float64."""
    edit = ctx.editor()
    total = sum(
        tensor.nbytes
        for _, value in module.initializers()
        if (tensor := constant_tensor(value)) is not None
    )
    done = rewrite(edit, RuleSet(_rules(LinearFolder(edit, total))))
    ctx.report(done)
    if not edit.changed:
        ctx.note("nothing to fold")
        return PassResult(False)
    remove_unused(module)
    return PassResult(True, rewrites=dict(sorted(done.hits.items())))


def _rules(folder: LinearFolder) -> list[Rule]:
    def after_linear(node: ir.Node, edit: Editor) -> Outcome:
        return _fold_after(node, edit, folder)

    def before_linear(node: ir.Node, edit: Editor) -> Outcome:
        return _fold_before(node, edit, folder)

    def scalar_through_views(node: ir.Node, edit: Editor) -> Outcome:
        return _fold_scalar(node, edit, folder)

    return [
        Rule("affine-after-linear", AFFINE_OPS, after_linear, first_line(_fold_after)),
        Rule("affine-before-linear", _LINEAR_OPS, before_linear, first_line(_fold_before)),
        Rule(
            "scalar-through-views", ("Mul", "Div"), scalar_through_views, first_line(_fold_scalar)
        ),
        Rule("affine-after-affine", AFFINE_OPS, _merge_affine),
        *PADDING_RULES,
    ]


def _fold_after(node: ir.Node, edit: Editor, folder: LinearFolder) -> Outcome:
    """affine(linear(x)): scale the output channels of the weight, put the shift into the bias."""
    affine = affine_of(node, edit)
    if affine is None:
        return None
    producer = affine.source.producer()
    linear = linear_of(producer, edit)
    if producer is None or not isinstance(linear, Linear):
        return linear if isinstance(linear, Miss) else None
    if producer.graph is not node.graph:
        return Miss("the linear operator lies outside this body, which may run often", producer)
    if affine.axis is not None and affine.axis != linear.channel_axis:
        return Miss("the constant does not vary along the output channels", linear.node)
    return _apply_after(affine, linear, edit, folder)


def _apply_after(affine: Affine, linear: Linear, edit: Editor, folder: LinearFolder) -> Outcome:
    scaled, shifted = bool(np.any(affine.scale != 1.0)), bool(np.any(affine.shift))
    is_matmul = linear.node.op_type == "MatMul"
    if is_matmul and shifted and linear.rank != 2:
        return None
    if not edit.single_use(linear.node.outputs[0]):
        return Miss("the linear operator's result has other uses", linear.node)
    if scaled:
        objection = folder.objection(linear)
        if objection is not None:
            return objection
    weight = folder.scale_outputs(linear, affine.scale) if scaled else None
    bias = None
    if shifted or (linear.bias is not None and scaled):
        bias = folder.bias(linear) * affine.scale + affine.shift
    source = linear.node.inputs[0]
    assert source is not None
    return folder.rebuild(linear, source, weight, bias)


def _fold_before(node: ir.Node, edit: Editor, folder: LinearFolder) -> Outcome:
    """linear(affine(x)): scale the input channels of the weight, put its response into the bias."""
    value = node.inputs[0]
    producer = producer_of(value, *AFFINE_OPS)
    if producer is None or value is None:
        return None
    linear = linear_of(node, edit)
    affine = affine_of(producer, edit) if isinstance(linear, Linear) else None
    if not isinstance(linear, Linear) or affine is None:
        return None
    if producer.graph is not node.graph:
        return None
    if affine.axis is not None and affine.axis != linear.channel_axis:
        return Miss("the constant does not vary along the input channels", producer)
    shifted = bool(np.any(affine.shift))
    if shifted and (node.op_type == "ConvTranspose" or _pads(node)):
        return Miss("the operator pads: a shift before it is not the same at the border", producer)
    if shifted and node.op_type == "MatMul" and linear.rank != 2:
        return None
    if not edit.single_use(value):
        return Miss("the value before the linear operator has other uses", producer)
    if _closes_gelu(affine.source):
        return Miss("the factor is part of a GELU, which runtimes compute at once", producer)
    objection = folder.objection(linear)
    if objection is not None:
        return objection
    weight = folder.scale_inputs(linear, affine.scale)
    bias = folder.bias(linear) + folder.response(linear, affine.shift) if shifted else None
    return folder.rebuild(linear, affine.source, weight, bias)


def _closes_gelu(value: ir.Value) -> bool:
    """Tell whether a value is x * (1 + erf(...)) or x * (1 + tanh(...))."""
    gate = producer_of(value, "Mul")
    sums = [producer_of(factor, "Add") for factor in gate.inputs] if gate is not None else []
    return any(
        producer_of(term, "Erf", "Tanh") is not None
        for node in sums
        if node is not None
        for term in node.inputs
    )


def _pads(node: ir.Node) -> bool:
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return True
    return any(attribute(node, "pads", ()))


def _fold_scalar(node: ir.Node, edit: Editor, folder: LinearFolder) -> Outcome:
    """Mul or Div by one number, moved up through views, a bias and a product into a weight."""
    affine = affine_of(node, edit)
    if affine is None or affine.axis is not None:
        return None
    chain: list[ir.Node] = []
    value: ir.Value | None = affine.source
    linear: Linear | Miss | None = None
    while value is not None and edit.single_use(value):
        producer = value.producer()
        if producer is None or producer.domain or producer.graph is not node.graph:
            return None
        linear = linear_of(producer, edit)
        if isinstance(linear, Linear):
            break
        inner = affine_of(producer, edit) if producer.op_type == "Add" else None
        if inner is not None:
            value = inner.source
        elif producer.op_type in _CARRIERS or producer.op_type == "MatMul":
            value = producer.inputs[0]
        else:
            return None
        chain.append(producer)
    if not isinstance(linear, Linear) or not chain:
        return None
    objection = folder.objection(linear)
    if objection is not None:
        return objection
    source = linear.node.inputs[0]
    assert source is not None
    bias = None if linear.bias is None else folder.bias(linear) * affine.scale
    made = folder.rebuild(linear, source, folder.scale_outputs(linear, affine.scale), bias)
    if isinstance(made, Miss):
        return made
    for carrier in reversed(chain):
        made = _carry(carrier, made, affine, edit)
    return made


def _carry(carrier: ir.Node, moved: ir.Value, affine: Affine, edit: Editor) -> ir.Value:
    """Make a node of the chain again on the scaled value; a bias on the way is scaled too."""
    if carrier.op_type != "Add":
        return edit.op(
            carrier.op_type, [moved, *carrier.inputs[1:]], dict(carrier.attributes.items())
        )
    constant = carrier.inputs[1 if edit.tensor(carrier.inputs[1]) is not None else 0]
    tensor = edit.tensor(constant)
    assert constant is not None
    assert tensor is not None
    with reading(tensor) as array:
        scaled = (array.astype(np.float64) * affine.scale.item()).astype(array.dtype)
    return edit.op("Add", [moved, edit.constant(scaled, constant.name or "bias")])


def _merge_affine(node: ir.Node, edit: Editor) -> Outcome:
    """Two constants in a row: Mul of Mul, Add of Add."""
    if node.op_type not in ("Add", "Mul"):
        return None
    outer = affine_of(node, edit)
    if outer is None or not edit.single_use(outer.source):
        return None
    producer = producer_of(outer.source, node.op_type)
    if producer is None:
        return None
    inner = affine_of(producer, edit)
    if inner is None or producer.graph is not node.graph:
        return None
    if inner.axis is not None and outer.axis is not None and inner.axis != outer.axis:
        return None
    axis = inner.axis if outer.axis is None else outer.axis
    both = inner.scale * outer.scale if node.op_type == "Mul" else inner.shift + outer.shift
    rank, dtype = edit.rank(inner.source), edit.dtype(inner.source)
    assert rank is not None
    assert dtype is not None
    shape = (-1, *([1] * (rank - 1 - axis))) if axis is not None else ()
    with np.errstate(over="ignore"):
        rounded = both.astype(dtype.numpy())
    near = np.allclose(rounded.astype(np.float64), both, rtol=_COARSEST, atol=0.0)
    if not (near and np.all(np.isfinite(both))):
        return Miss(f"the two constants together leave the range of {dtype.name.lower()}", producer)
    constant = edit.constant(rounded.reshape(shape), "constant")
    return edit.op(node.op_type, [inner.source, constant])
