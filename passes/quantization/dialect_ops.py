"""Nodes of the lwc dialect: making them, and reading them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import onnx_ir as ir

from lwc.core.dialect import DOMAIN, DynamicQuantMatMul
from lwc.core.walk import op_name
from lwc.rewrite.editor import Editor, attribute

__all__ = ["MATMUL", "dynamic_quant_matmul", "variant_of"]

MATMUL = f"{DOMAIN}::{DynamicQuantMatMul.name}"


def dynamic_quant_matmul(
    editor: Editor, variant: DynamicQuantMatMul, inputs: Sequence[ir.Value | None]
) -> ir.Value:
    """Make a node of a variant; inputs that are None are left out."""
    overload = variant.declare(editor.module)
    given = [value for value in inputs if value is not None]
    result = editor.op(variant.name, given, variant.attributes(), domain=DOMAIN)
    node = result.producer()
    assert node is not None
    node.overload = overload
    return result


def variant_of(node: ir.Node | None) -> DynamicQuantMatMul | None:
    """Read the attributes of a node; None where it is another operator."""
    if node is None or op_name(node) != MATMUL:
        return None
    given = {each.name: attribute(node, each.name) for each in fields(DynamicQuantMatMul)}
    return DynamicQuantMatMul(**{k: v for k, v in given.items() if v is not None})
