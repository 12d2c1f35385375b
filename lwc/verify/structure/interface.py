"""The interface of a module: what its callers name, feed and fetch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import onnx_ir as ir

from lwc.core.dims import is_anonymous, parse_dim
from lwc.core.module import Module

__all__ = ["Interface"]


@dataclass(frozen=True)
class _Port:
    """One graph input or output, copied: a pass changes values in place."""

    name: str | None
    kind: str
    dims: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Interface:
    """Graph inputs and outputs at one moment, in order."""

    inputs: tuple[_Port, ...]
    outputs: tuple[_Port, ...]

    @classmethod
    def of(cls, module: Module) -> Interface:
        """Read the interface of a module."""
        graph = module.graph
        return cls(tuple(map(_port, graph.inputs)), tuple(map(_port, graph.outputs)))

    def change_to(self, later: Interface) -> str | None:
        """Say what a caller would notice of a change to `later`, or return None.

        Names, order and element types are the same. Declared shapes may become more or less
        definite (a dimension bound to a number, a number left open), but of no other rank, and a
        number of no other value. Dimensions of the inputs may be renamed everywhere: where only
        some places of one name are, or two names become one, other extents are said to be equal.
        """
        for what, mine, theirs in (
            ("inputs", self.inputs, later.inputs),
            ("outputs", self.outputs, later.outputs),
        ):
            old, new = [port.name for port in mine], [port.name for port in theirs]
            if old != new:
                return f"the names or the order of the graph's {what} changed: {old} to {new}"
            for before, after in zip(mine, theirs, strict=True):
                place = f"graph {what[:-1]} '{before.name}'"
                if before.kind != after.kind:
                    return f"the type of {place} changed: {before.kind} to {after.kind}"
                if _contradict(before.dims, after.dims):
                    return (
                        f"the declared shape of {place} changed: "
                        f"{_listed(before.dims)} to {_listed(after.dims)}"
                    )
        return _renaming_problem(self.inputs, later.inputs)


def _port(value: ir.Value) -> _Port:
    kind = "none" if value.type is None else str(value.type)
    shape = value.shape
    dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
    return _Port(value.name, kind, dims)


def _renaming_problem(before: tuple[_Port, ...], after: tuple[_Port, ...]) -> str | None:
    """Say which dimensions were not renamed one to one, or return None."""
    renamed: dict[str, str] = {}
    origin: dict[str, str] = {}
    for mine, theirs in zip(before, after, strict=True):
        for old, new in zip(mine.dims or (), theirs.dims or (), strict=False):
            if not (_is_name(old) and _is_name(new)):
                continue
            other = renamed.setdefault(old, new)
            if other != new:
                return f"dimension '{old}' of the graph's inputs became '{other}' and '{new}'"
            other = origin.setdefault(new, old)
            if other != old:
                return f"dimensions '{other}' and '{old}' of the graph's inputs became one, '{new}'"
    return None


def _is_name(dim: int | str | None) -> TypeGuard[str]:
    """Tell whether a dimension is one name, and no expression."""
    return isinstance(dim, str) and not is_anonymous(dim) and parse_dim(dim).is_Symbol


def _contradict(
    before: tuple[int | str | None, ...] | None, after: tuple[int | str | None, ...] | None
) -> bool:
    if before is None or after is None:
        return False
    return len(before) != len(after) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(before, after, strict=True)
    )


def _listed(dims: tuple[int | str | None, ...] | None) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in dims or ())}]"
