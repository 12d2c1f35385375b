"""If, Loop and Scan: their graphs are GraphModules, which return tuples.

A nested graph takes the values that it reads from outside first (`captured`), then its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.registry import Use, op
from lwc.core.torch_types import held_as

__all__ = ["given"]

Tensor: TypeAlias = torch.Tensor
Graph: TypeAlias = torch.fx.GraphModule


def given(x: Tensor | None, default: Tensor) -> Tensor:
    """Return the value of an input that may be left out."""
    return default if x is None else x


class _Fresh(torch.nn.Module):  # type: ignore[misc]
    """A branch whose results are no views of what it is given, which torch.cond asks for."""

    def __init__(self, branch: Graph) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Run the branch."""
        return tuple(value.clone() for value in self.branch(*values))


@op("If", many=True, either=(0,))
def if_(
    condition: Tensor | bool,
    *,
    then_branch: Graph,
    else_branch: Graph,
    captured: Sequence[Any] = (),
) -> tuple[Any, ...]:
    """Run one of two graphs."""
    if isinstance(condition, torch.Tensor) and torch.compiler.is_exporting():
        branches = (_Fresh(then_branch), _Fresh(else_branch))
        return tuple(torch.cond(condition.reshape(()), *branches, tuple(captured)))
    return tuple((then_branch if condition else else_branch)(*captured))


def _scanned(use: Use) -> dict[str, Any]:
    """Tell of what type and rank the stacked outputs of a loop are, for one that never runs."""
    graph = use.attribute("body")
    # The carried values come before: Loop's graph has a condition more, and takes a number more.
    before = len(graph.inputs) - use.attribute("num_scan_inputs", 1)
    empty = []
    for place, value in enumerate(graph.outputs[before:]):
        dims = [dim if isinstance(dim, int) else 0 for dim in value.shape or ()]
        axis = use.attribute("scan_output_axes", (0,) * (place + 1))[place] % (len(dims) + 1)
        dtype = held_as(value.dtype) if value.dtype else torch.float32
        empty.append((dtype, [*dims[:axis], 0, *dims[axis:]]))
    return {"empty": empty}


@op("Loop", many=True, either=(0, 1), extra=_scanned)
def loop(
    limit: Tensor | int | None,
    condition: Tensor | bool | None,
    *carried: Any,
    body: Graph,
    captured: Sequence[Any] = (),
    empty: Sequence[tuple[torch.dtype, list[int]]] = (),
) -> tuple[Any, ...]:
    """Run a graph as long as its condition holds, up to `limit` times."""
    rows: list[list[Tensor]] = [[] for _ in empty]
    state = list(carried)
    count = 0
    most = None if limit is None else int(limit)
    while (most is None or count < most) and (condition is None or bool(condition)):
        index = torch.tensor(count, dtype=torch.int64)
        before = torch.as_tensor(True if condition is None else condition)
        condition, *results = body(*captured, index, before, *state)
        state = results[: len(state)]
        for row, result in zip(rows, results[len(state) :], strict=True):
            row.append(result)
        count += 1
    stacks = [
        torch.stack(row) if row else torch.empty(shape, dtype=dtype)
        for row, (dtype, shape) in zip(rows, empty, strict=True)
    ]
    return (*state, *stacks)


@op("Scan", many=True, since=9, extra=_scanned)
def scan(
    *values: Tensor,
    num_scan_inputs: int,
    body: Graph,
    captured: Sequence[Any] = (),
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    empty: Sequence[tuple[torch.dtype, list[int]]] = (),
) -> tuple[Tensor, ...]:
    """Run a graph for each slice of the scanned inputs and stack what it gives."""
    split = len(values) - num_scan_inputs
    state, scanned = list(values[:split]), values[split:]
    axes = scan_input_axes or [0] * num_scan_inputs
    turned = scan_input_directions or [0] * num_scan_inputs
    length = scanned[0].shape[axes[0]]
    rows: list[list[Tensor]] = []
    for step in range(length):
        slices = [
            x.select(axis, length - 1 - step if back else step)
            for x, axis, back in zip(scanned, axes, turned, strict=True)
        ]
        results = list(body(*captured, *state, *slices))
        state = results[:split]
        rows.append(results[split:])
    if not rows:
        return (*state, *(torch.empty(shape, dtype=dtype) for dtype, shape in empty))
    stacks = []
    for index in range(len(rows[0])):
        back = bool(scan_output_directions and scan_output_directions[index])
        row = [each[index] for each in (rows[::-1] if back else rows)]
        axis = scan_output_axes[index] if scan_output_axes else 0
        stacks.append(torch.stack(row, dim=axis))
    return (*state, *stacks)
