"""Sequences, which are lists, and optionals, which are the value or None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.registry import op
from lwc.core.errors import LwcError

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor
Graph: TypeAlias = torch.fx.GraphModule
Position: TypeAlias = Tensor | list[int] | int


@op("SequenceConstruct")
def sequence_construct(*values: Tensor) -> list[Tensor]:
    """Make a sequence."""
    return list(values)


@op("SequenceEmpty", ignored="dtype")
def sequence_empty() -> list[Tensor]:
    """Make a sequence of nothing."""
    return []


@op("SequenceLength")
def sequence_length(values: Sequence[Tensor]) -> Tensor:
    """Count."""
    return torch.tensor(len(values), dtype=torch.int64)


def _place(position: Position, count: int, *, end: bool = False) -> int:
    """Return a place of a sequence; of several numbers the first, as ONNX Runtime reads them.

    Args:
        position: The place, counted from the end if negative.
        count: Length of the sequence.
        end: Whether the place behind the last is one.

    Raises:
        LwcError: It is none.
    """
    if isinstance(position, torch.Tensor):
        position = position.reshape(-1)[0]
    place = int(position[0] if isinstance(position, list) else position)
    if not -count <= place < count + end:
        raise LwcError(f"a sequence of {count} has no place {place}")
    return place


@op("SequenceAt", either=(1,))
def sequence_at(values: Sequence[Tensor], position: Position) -> Tensor:
    """Take one."""
    return values[_place(position, len(values))]


@op("SequenceInsert", either=(2,))
def sequence_insert(
    values: Sequence[Tensor], value: Tensor, position: Position | None = None
) -> list[Tensor]:
    """Put one in, at the end by default."""
    made = list(values)
    made.insert(len(made) if position is None else _place(position, len(made), end=True), value)
    return made


@op("SequenceErase", either=(1,))
def sequence_erase(values: Sequence[Tensor], position: Position | None = None) -> list[Tensor]:
    """Take one out, the last by default."""
    made = list(values)
    made.pop(-1 if position is None else _place(position, len(made)))
    return made


@op("SplitToSequence", values=(1,))
def split_to_sequence(
    x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    """Cut along an axis, into single slices by default.

    Slices lose the axis without `keepdims`, as in ONNX Runtime also where 1 is asked for.
    """
    if not isinstance(split, list) and x.shape[axis] == 0:
        return []
    parts = torch.split(x, 1 if split is None else split, dim=axis)
    drops = not keepdims and split in (None, 1)
    return [part.squeeze(axis) if drops else part for part in parts]


@op("ConcatFromSequence")
def concat_from_sequence(values: Sequence[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """Join, along a new axis if asked."""
    return torch.stack(list(values), axis) if new_axis else torch.cat(list(values), axis)


@op("SequenceMap", many=True)
def sequence_map(
    values: Sequence[Tensor],
    *others: Sequence[Tensor] | Tensor,
    body: Graph,
    captured: Sequence[Any] = (),
    outputs: int = 1,
) -> tuple[list[Tensor], ...]:
    """Run a graph on each element."""
    rows = []
    for index, value in enumerate(values):
        beside = [each[index] if isinstance(each, list | tuple) else each for each in others]
        rows.append(body(*captured, value, *beside))
    return tuple([row[index] for row in rows] for index in range(outputs))


@op("Optional", ignored="type")
def optional(value: Any = None) -> Any:
    """Return what is given, or nothing."""
    return value


@op("OptionalHasElement")
def optional_has_element(value: Any = None) -> Tensor:
    """Tell whether there is something."""
    return torch.tensor(value is not None)


@op("OptionalGetElement")
def optional_get_element(value: Any) -> Any:
    """Return what is there."""
    return value
