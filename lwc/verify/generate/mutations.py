"""Small changes to a graph, each one way in which it is nearly what it was.

A mutation changes a module in place and says what it did, or None where it found nothing to
change. What it makes need not be valid: `near_misses` judges that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx.defs
import onnx_ir as ir

from lwc.core.diagnostics import describe
from lwc.core.schemas import find_schema
from lwc.core.walk import constant_tensor, is_default_domain
from lwc.verify.generate.mutant import FLOAT, INT64, Mutant

if TYPE_CHECKING:
    pass

__all__ = ["MUTATIONS", "Mutation"]

DOUBLE = ir.DataType.DOUBLE


_ELEMENTWISE = frozenset({
    "Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod",
    "Mul", "Pow", "Sub", "Where",
})  # fmt: skip
_SWAPPED = _ELEMENTWISE | {"Clip", "Concat", "Gemm", "MatMul", "SequenceConstruct", "Sum"}


Mutation: TypeAlias = Callable[[Mutant], "str | None"]


def extra_consumer(m: Mutant) -> str | None:
    """An inner value gets another consumer, which leaves the graph."""
    value = m.value()
    if value is None:
        return None
    dtype = m.shapes.dtype(value)
    number = dtype is not None and (dtype.is_floating_point() or dtype == INT64)
    m.module.graph.outputs.append(m.append(m.choose("Neg", "Abs") if number else "Identity", value))
    return f"another consumer of '{value.name}'"


def inner_output(m: Mutant) -> str | None:
    """A value in the middle leaves the graph."""
    value = m.value(lambda value: not value.is_graph_output())
    if value is None:
        return None
    m.module.graph.outputs.append(value)
    return f"'{value.name}' is a graph output"


def weight_output(m: Mutant) -> str | None:
    """A constant leaves the graph."""
    found = [
        value
        for value in m.module.graph.initializers.values()
        if value.uses() and not value.is_graph_output() and not value.is_graph_input()
    ]
    if not found:
        return None
    value = m.choose(*found)
    m.module.graph.outputs.append(value)
    return f"'{value.name}' is a graph output"


def moved_attribute(m: Mutant) -> str | None:
    """An axis, a permutation, a flag or a number of an attribute is another one."""

    def movable(node: ir.Node) -> list[ir.Attr]:
        kinds = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT)
        return [
            a
            for a in node.attributes.values()
            if not a.is_ref() and a.type in kinds and a.name not in ("to", "num_scan_inputs")
        ]

    node = m.node(movable, inner=True)
    if node is None:
        return None
    attribute = m.choose(*movable(node))
    before = attribute.value
    if attribute.type == ir.AttributeType.FLOAT:
        after: Any = m.choose(*(x for x in (1.0, 0.0, 2 * before, -before, 1e-3) if x != before))
    elif attribute.type == ir.AttributeType.INT:
        flag = before in (0, 1)
        options = (1 - before, before + 1) if flag else (before + 1, before - 1)
        after = m.choose(*options)
    else:
        after = list(before)
        if not after:
            return None
        at = m.integer(0, len(after) - 1)
        if attribute.name == "perm":
            other = (at + 1) % len(after)
            after[at], after[other] = after[other], after[at]
        else:
            after[at] += m.choose(1, -1)
    node.attributes.add(ir.convenience.convert_attribute(attribute.name, after, attribute.type))
    return f"{attribute.name} of {describe(node)} is {after}, not {before}"


def left_out_attribute(m: Mutant) -> str | None:
    """An attribute with a default is not given, or `keepdims` is given the other way."""

    def optional(node: ir.Node) -> list[str]:
        schema = find_schema("", node.op_type, m.module.opset) if is_default_domain(node) else None
        if schema is None:
            return []
        return [k for k in node.attributes if k in schema.attributes
                and not schema.attributes[k].required and node.op_type != "Constant"]  # fmt: skip

    reduces = m.node(lambda node: node.op_type.startswith("Reduce"))
    if reduces is not None and m.flip():
        flag = 1 - reduces.attributes.get_int("keepdims", 1)
        reduces.attributes.add(ir.AttrInt64("keepdims", flag))
        return f"keepdims of {describe(reduces)} is {flag}"
    node = m.node(optional, inner=True)
    if node is None:
        return None
    name = m.choose(*optional(node))
    del node.attributes[name]
    return f"{describe(node)} has no {name}"


def _array(node: ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    tensor = constant_tensor(node.inputs[index])
    return None if tensor is None or tensor.size > 4096 else tensor.numpy()


def _is_number(node: ir.Node, index: int) -> bool:
    array = _array(node, index)
    return array is not None and array.size > 0 and array.dtype.kind in "fiu"


def moved_constant(m: Mutant) -> str | None:
    """A constant holds another number: one beside it, its negative, a neutral element."""
    place = m.use(_is_number)
    if place is None:
        return None
    node, index = place
    array = _array(node, index)
    assert array is not None
    changed = np.array(array)
    if array.dtype.kind in "iu":
        at = m.integer(0, array.size - 1)
        before, step = int(array.flat[at]), m.choose(1, -1)
        limits = np.iinfo(array.dtype)
        if not limits.min <= before + step <= limits.max:
            step = -step
        changed.flat[at] = before + step
        what = f"element {at} moved by {step}"
    else:
        what = m.choose("zero", "one", "negative", "one element", "slightly more", "minus one")
        if what == "negative":
            changed = -changed
        elif what == "one element":
            changed.flat[m.integer(0, array.size - 1)] += 0.25
        elif what == "slightly more":
            changed = changed * np.array(1.01, array.dtype)
        else:
            changed[...] = {"zero": 0, "one": 1, "minus one": -1}[what]
        if np.array_equal(changed, array):
            changed = changed + np.array(0.5, array.dtype)
    m.put(node, index, changed.astype(array.dtype))
    return f"input {index} of {describe(node)}: {what}"


def widened_constant(m: Mutant) -> str | None:
    """A constant of an elementwise operator is broadcast otherwise: wider, a row, in full."""
    place = m.use(
        lambda node, index: (
            node.op_type in _ELEMENTWISE and len(node.inputs) > 1 and _is_number(node, index)
        )
    )
    if place is None:
        return None
    node, index = place
    array = _array(node, index)
    assert array is not None
    other = next((v for i, v in enumerate(node.inputs) if i != index and v is not None), None)
    shape = m.shapes.shape(other) if other is not None else None
    fixed = [dim if isinstance(dim, int) else 1 for dim in shape or ()]
    forms: list[tuple[int, ...]] = [(1, *array.shape), (1,) * (len(fixed) + 1 - array.ndim)]
    forms += [tuple(fixed), tuple(fixed[-1:]), (*fixed[-1:], 1), (2, *(1 for _ in fixed))]
    form = m.choose(*forms)
    if form == forms[1]:
        form = (*form, *array.shape)
    try:
        wide = np.broadcast_to(array, form)
    except ValueError:
        wide = np.broadcast_to(array.flat[0], form)
    if wide.shape == array.shape:
        return None
    m.put(node, index, np.array(wide))
    return f"input {index} of {describe(node)} is {list(wide.shape)}, not {list(array.shape)}"


def swapped_operands(m: Mutant) -> str | None:
    """The operands of a node change places."""
    node = m.node(
        lambda node: node.op_type in _SWAPPED and len(set(node.inputs) - {None}) > 1, inner=True
    )
    if node is None:
        return None
    first = 1 if node.op_type in ("Where", "Clip") and len(node.inputs) > 2 else 0
    a, b = node.inputs[first], node.inputs[first + 1]
    node.replace_input_with(first, b)
    node.replace_input_with(first + 1, a)
    return f"operands {first} and {first + 1} of {describe(node)} are swapped"


def _optional_from(m: Mutant, node: ir.Node) -> list[int]:
    schema = find_schema("", node.op_type, m.module.opset) if is_default_domain(node) else None
    if schema is None:
        return []
    return [
        i
        for i, formal in enumerate(schema.inputs)
        if formal.option == onnx.defs.OpSchema.FormalParameterOption.Optional
    ]


def dropped_input(m: Mutant) -> str | None:
    """An optional input is left out: a bias, a bound, a zero point."""
    place = m.use(lambda node, index: index in _optional_from(m, node))
    if place is None:
        return None
    node, index = place
    if index == len(node.inputs) - 1 and m.choose(True, False):
        node.resize_inputs(index)
    else:
        node.replace_input_with(index, None)
    return f"{describe(node)} has no input {index}"


def added_input(m: Mutant) -> str | None:
    """An optional input is given: a bias, a bound."""

    def missing(node: ir.Node) -> list[int]:
        if node.op_type not in ("Clip", "Gemm", "Conv", "ConvTranspose", "LayerNormalization"):
            return []
        return [i for i in _optional_from(m, node) if i >= len(node.inputs)
                or node.inputs[i] is None]  # fmt: skip

    node = m.node(missing)
    if node is None:
        return None
    index = m.choose(*missing(node))
    dtype = m.shapes.dtype(node.outputs[0]) or FLOAT
    shape = m.shapes.shape(node.outputs[0])
    channels = None
    if shape and node.op_type != "Clip":
        channels = shape[1 if "Conv" in node.op_type else -1]
    extents = () if not isinstance(channels, int) else (channels,)
    number = m.choose(0.0, 0.5)
    array = np.full(extents, number).astype(dtype.numpy())
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, m.module.add_initializer("bias", array))
    return f"{describe(node)} has an input {index}"


_SIBLINGS = (
    ("Add", "Sub"),
    ("Mul", "Div"),
    ("Mul", "Add"),
    ("Max", "Min"),
    ("Sigmoid", "Tanh"),
    ("Relu", "Abs"),
    ("Erf", "Tanh"),
    ("Neg", "Identity"),
    ("Sin", "Cos"),
    ("Softmax", "LogSoftmax"),
    ("Sqrt", "Reciprocal"),
    ("Floor", "Ceil"),
    ("Greater", "GreaterOrEqual"),
    ("Less", "LessOrEqual"),
    ("Greater", "Less"),
    ("And", "Or"),
    ("ReduceMax", "ReduceMin"),
    ("ReduceMean", "ReduceMax"),
    ("ReduceMean", "ReduceSum"),
    ("ReduceL1", "ReduceL2"),
    ("MaxPool", "AveragePool"),
    ("LeakyRelu", "Elu"),
)


def sibling(m: Mutant) -> str | None:
    """One operator is exchanged for another of the same form."""

    def others(node: ir.Node) -> list[str]:
        op = node.op_type
        return [a if op == b else b for a, b in _SIBLINGS if op in (a, b)] if is_default_domain(
            node) else []  # fmt: skip

    node = m.node(others, inner=True)
    if node is None:
        return None
    before, node.op_type = node.op_type, m.choose(*others(node))
    return f"{describe(node)} was {before}"


def dtype_detour(m: Mutant) -> str | None:
    """A value passes through float64 on its way to one consumer, or through its own type."""
    place = m.use(lambda node, index: m.shapes.dtype(node.inputs[index]) == FLOAT)  # type: ignore[arg-type]
    if place is None:
        return None
    node, index = place
    through = m.choose(DOUBLE, FLOAT)
    wide = m.insert(node, "Cast", node.inputs[index], to=int(through))
    node.replace_input_with(index, m.insert(node, "Cast", wide, to=int(FLOAT)))
    return f"input {index} of {describe(node)} passes through {through.name}"


def other_extent(m: Mutant) -> str | None:
    """An extent of a graph input is 1, another number, or unnamed."""
    axes = [
        (value, axis)
        for value in m.module.graph.inputs
        if value.const_value is None
        for axis in range(len(value.shape or ()))
    ]
    if not axes:
        return None
    value, axis = m.choose(*axes)
    assert value.shape is not None
    dims: list[Any] = list(value.shape)
    before = dims[axis] if isinstance(dims[axis], int) else dims[axis].value
    dims[axis] = m.choose(*(dim for dim in (1, None, "M", 4) if dim != before))
    value.shape = ir.Shape(dims)
    return f"axis {axis} of input '{value.name}' is {dims[axis]}"


def duplicated_node(m: Mutant) -> str | None:
    """A node stands twice; its consumers are divided between the two."""
    node = m.node(lambda node: len(node.outputs) == 1 and node.outputs[0].uses())
    if node is None:
        return None
    attributes = list(node.attributes.values())
    if any(a.type == ir.AttributeType.GRAPH for a in attributes):
        return None
    twin = ir.Node(
        node.domain, node.op_type, node.inputs, attributes, overload=node.overload,
        name=m.module.fresh_name(node.name or "node"),
    )  # fmt: skip
    twin.outputs[0].name = m.module.fresh_name(node.outputs[0].name or "value")
    assert node.graph is not None
    node.graph.insert_after(node, twin)
    user, index = m.choose(*node.outputs[0].uses())
    user.replace_input_with(index, twin.outputs[0])
    return f"{describe(node)} is computed twice"


def split_initializer(m: Mutant) -> str | None:
    """One use of a shared constant gets a copy of its own."""

    def shared(node: ir.Node, index: int) -> bool:
        value = node.inputs[index]
        return constant_tensor(value) is not None and len(value.uses()) > 1  # type: ignore[union-attr]

    place = m.use(shared)
    if place is None:
        return None
    node, index = place
    old = node.inputs[index]
    tensor = constant_tensor(old)
    assert old is not None
    assert tensor is not None
    copy = tensor if m.flip() else ir.Tensor(np.array(tensor.numpy()))
    node.replace_input_with(index, m.module.add_initializer(old.name or "weight", copy))
    return f"input {index} of {describe(node)} is a copy"


def merged_initializers(m: Mutant) -> str | None:
    """Two initializers of one type and shape become one, whatever they held."""
    kinds: dict[Any, list[ir.Value]] = {}
    for value in m.module.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and value.uses():
            kinds.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    groups = [group for group in kinds.values() if len(group) > 1]
    if not groups:
        return None
    first, second, *_ = m.choose(*groups)
    if second.is_graph_output():
        return None
    for user, index in list(second.uses()):
        user.replace_input_with(index, first)
    del m.module.graph.initializers[second.name or ""]
    return f"'{second.name}' is '{first.name}'"


def wrapped_in_if(m: Mutant) -> str | None:
    """A node moves into the branch of an If that a constant decides."""
    node = m.node(
        lambda node: (
            len(node.outputs) == 1
            and node.outputs[0].uses()
            and not node.outputs[0].is_graph_output()
            and m.shapes.dtype(node.outputs[0]) is not None
            and not any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
        )
    )
    if node is None:
        return None
    graph, result = m.module.graph, node.outputs[0]
    chosen = m.module.add_initializer("condition", np.array(taken := m.choose(True, False)))
    branches = []
    for _ in range(2):
        body = ir.Node(
            node.domain, node.op_type, node.inputs, list(node.attributes.values()),
            overload=node.overload, name=m.module.fresh_name(node.name or "node"),
        )  # fmt: skip
        body.outputs[0].name = m.module.fresh_name(result.name or "value")
        branches.append(ir.Graph([], list(body.outputs), nodes=[body], name="branch"))
    if m.flip():
        other = next(iter(branches[taken]))
        if other.op_type in ("Add", "Mul", "Sub"):
            other.op_type = "Sub" if other.op_type != "Sub" else "Add"
    wrapper = ir.Node(
        "", "If", [chosen], ir.convenience.convert_attributes({
            "then_branch": branches[0], "else_branch": branches[1]
        }), name=m.module.fresh_name("if_node"),
    )  # fmt: skip
    wrapper.outputs[0].name = m.module.fresh_name(result.name or "value")
    graph.insert_before(node, wrapper)
    for user, index in list(result.uses()):
        user.replace_input_with(index, wrapper.outputs[0])
    graph.remove(node, safe=True)
    return f"{describe(node)} stands in an If"


MUTATIONS: tuple[Mutation, ...] = (
    extra_consumer,
    inner_output,
    moved_attribute,
    moved_constant,
    widened_constant,
    swapped_operands,
    sibling,
    dropped_input,
    added_input,
    left_out_attribute,
    dtype_detour,
    other_extent,
    duplicated_node,
    split_initializer,
    merged_initializers,
    weight_output,
    wrapped_in_if,
)
"""Every mutation, those that rewrites trip over most often first."""
