"""How far the positions of a rotary embedding reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from lwc.core.dims import Dim, at_least, symbol
from lwc.core.module import Module
from lwc.passes.attention.elements import Index, Read
from lwc.passes.attention.rotary_turns import AXES, Rotation
from lwc.passes.attention.rotary_waves import Lookup, leaves
from lwc.rewrite import Editor, Miss, attribute, producer_of

__all__ = ["Bound", "bound_of", "stated_positions"]

_VIEWS = (
    "Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice",
)  # fmt: skip
_DEEPEST = 16
_STATED = ("max_position_embeddings", "n_positions")
"""Where configurations of Hugging Face say for how many positions a model was made."""


class Bound(NamedTuple):
    """How many positions a table must hold, and whether that is proved."""

    positions: int
    proved: bool


def stated_positions(module: Module) -> int | None:
    """Return for how many positions a model was made, as the `config.json` beside it says."""
    source = module.source
    file = source.companions.get("config.json")
    if file is None and source.path is not None:
        file = str(Path(source.path).with_name("config.json"))
    try:
        config: Any = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parts: list[Any] = [config, config.get("text_config")] if isinstance(config, dict) else []
    found = [part.get(key) for part in parts if isinstance(part, dict) for key in _STATED]
    return next((number for number in found if type(number) is int and number > 0), None)


def bound_of(rotation: Rotation, wished: int, edit: Editor) -> Bound | Miss:
    """Return the extent of the tables.

    Constant tables say it, or a count of positions over a sequence whose length is a number; where
    neither does it is `wished`, from the first position on.
    """
    element = rotation.position.element
    if _may_be_negative(element, edit):
        return Miss("its positions may lie below 0")
    rows = [
        table.shape.numpy()[leaf.axis]
        for wave in (*rotation.cos, *rotation.sin)
        for leaf in leaves(wave)
        if isinstance(leaf, Lookup) and (table := edit.tensor(leaf.table)) is not None
    ]
    if rows:
        return Bound(min(rows), isinstance(element, Index))
    offset, shape = rotation.offset, edit.shape(rotation.source)
    length = None if shape is None else shape[rotation.length_axis]
    if offset is not None and isinstance(length, int):
        return Bound(offset + length, True)
    if offset is not None and offset > wished:
        return Miss(f"its positions begin at {offset}, behind tables of {wished}")
    return Bound(wished + (offset or 0), False)


def _may_be_negative(element: Index | Read, edit: Editor) -> bool:
    """Tell whether there is reason to think so; what inputs say is taken to be positions."""
    if isinstance(element, Read):
        low = _least(element.value, edit)
        return low is not None and low < 0
    if isinstance(element.value, int):
        return element.value < 0
    place: Dim = element.value.subs({axis: symbol(axis.name) for axis in AXES})
    return not at_least(place, 0)


def _least(value: ir.Value | None, edit: Editor, depth: int = 0) -> int | None:
    """Return a number that integers are not below, given that those of inputs are not below 0."""
    if value is None or depth > _DEEPEST:
        return None
    array = edit.array(value)
    if array is not None:
        return int(array.min()) if array.size and array.dtype.kind in "biu" else None
    if value.is_graph_input():
        return 0
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in (*_VIEWS, "CumSum"):
        return _least(node.inputs[0], edit, depth + 1)
    operands = [_least(each, edit, depth + 1) for each in node.inputs]
    if node.op_type == "Where":
        branches = operands[1:]
        counting = _counting_branch(node, edit)
        if counting is not None and branches[counting] == -1:
            branches[counting] = 0
        known = [low for low in branches if low is not None]
        return min(known) if len(known) == 2 else None
    known = [low for low in operands if low is not None]
    if node.op_type in ("Max", "Clip"):
        return max((low for low in operands[:2] if low is not None), default=None)
    if len(known) != 2:
        return None
    if node.op_type == "Add":
        return sum(known)
    number = edit.scalar(node.inputs[1])
    return known[0] - int(number) if node.op_type == "Sub" and number is not None else None


def _counting_branch(node: ir.Node, edit: Editor) -> int | None:
    """Return which branch of a Where counts tokens of a mask from 0 on, only where it shows one.

    The count of tokens up to one that is shown, less one, is never -1.
    """
    mask, hides = _mask_of(node.inputs[0], edit)
    branch = 1 if hides else 0
    less = _without_casts(node.inputs[1 + branch])
    step = producer_of(less, "Sub", "Add")
    if mask is None or step is None:
        return None
    count = producer_of(_without_casts(step.inputs[0]), "CumSum")
    if edit.scalar(step.inputs[1]) != (1 if step.op_type == "Sub" else -1) or count is None:
        return None
    same = _without_casts(count.inputs[0]) is mask
    return branch if same and not attribute(count, "exclusive", 0) else None


def _mask_of(condition: ir.Value | None, edit: Editor) -> tuple[ir.Value | None, bool]:
    """Return the mask a condition asks about, and whether it is true where that is 0."""
    hides = False
    while (node := producer_of(condition, "Not", "Equal")) is not None:
        if node.op_type == "Equal" and edit.scalar(node.inputs[1]) != 0:
            break
        condition, hides = _without_casts(node.inputs[0]), not hides
    return _without_casts(condition), hides


def _without_casts(value: ir.Value | None) -> ir.Value | None:
    while (node := producer_of(value, "Cast", "Identity")) is not None:
        value = node.inputs[0]
    return value
