"""Sequences, which are lists, and optionals, which are the value or None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor
Graph: TypeAlias = torch.fx.GraphModule


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


@op("SequenceAt", either=(1,))
def sequence_at(values: Sequence[Tensor], position: Tensor | int) -> Tensor:
    """Take one."""
    return values[int(position)]


@op("SequenceInsert", either=(2,))
def sequence_insert(
    values: Sequence[Tensor], value: Tensor, position: Tensor | int | None = None
) -> list[Tensor]:
    """Put one in, at the end by default."""
    made = list(values)
    made.insert(len(made) if position is None else int(position), value)
    return made


@op("SequenceErase", either=(1,))
def sequence_erase(values: Sequence[Tensor], position: Tensor | int | None = None) -> list[Tensor]:
    """Take one out, the last by default."""
    made = list(values)
    made.pop(-1 if position is None else int(position))
    return made


@op("SplitToSequence", values=(1,))
def split_to_sequence(
    x: Tensor, split: Any = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    """Cut along an axis, into single slices by default."""
    if split is None:
        parts = torch.split(x, 1, dim=axis)
        return [part if keepdims else part.squeeze(axis) for part in parts]
    return list(torch.split(x, split, dim=axis))


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
) -> tuple[list[Tensor], ...]:
    """Run a graph on each element."""
    rows = []
    for index, value in enumerate(values):
        beside = [each[index] if isinstance(each, list | tuple) else each for each in others]
        rows.append(body(*captured, value, *beside))
    return tuple(list(each) for each in zip(*rows, strict=True))


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
