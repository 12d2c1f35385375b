"""Remarks: what a pass did, what it left alone and why, each at a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Remark",
    "RemarkKind",
    "RemarkLog",
    "answers_to",
    "describe",
    "describe_origin",
    "neighbourhood",
]

RemarkKind = Literal["applied", "missed", "note", "warning"]


@dataclass(frozen=True)
class Remark:
    """One thing worth telling the user.

    Attributes:
        kind: `applied` (a rewrite happened), `missed` (one did not, and why), `note`
            (information), `warning` (the user should look).
        source: The pass, front end or backend that speaks.
        message: One sentence.
        node: The node it is about, as `describe` names it, or None for the whole module.
        rule: The rewrite rule or step within `source`, or None.
    """

    kind: RemarkKind
    source: str
    message: str
    node: str | None = None
    rule: str | None = None

    def __str__(self) -> str:
        where = f" at {self.node}" if self.node else ""
        rule = f"/{self.rule}" if self.rule else ""
        return f"{self.kind}: {self.source}{rule}{where}: {self.message}"


class RemarkLog:
    """Collects remarks in order."""

    def __init__(self) -> None:
        self._remarks: list[Remark] = []

    def emit(self, remark: Remark) -> None:
        """Record `remark`."""
        self._remarks.append(remark)

    def __iter__(self) -> Iterator[Remark]:
        return iter(self._remarks)

    def __len__(self) -> int:
        return len(self._remarks)

    def __bool__(self) -> bool:
        # One that is still empty is no reason to take another.
        return True

    def since(self, start: int) -> list[Remark]:
        """Return the remarks from position `start` on."""
        return self._remarks[start:]


def describe(node: ir.Node) -> str:
    """Name a node for a person: operator, node name and first output."""
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    outputs = [value.name for value in node.outputs if value.name]
    return describe_origin({"op": op, "name": node.name, "outputs": outputs})


def describe_origin(origin: Mapping[str, Any]) -> str:
    """Name the ONNX node that a node of PyTorch was lowered from; see `lwc.to_fx`."""
    if origin["name"]:
        return f"{origin['op']} '{origin['name']}'"
    return f"{origin['op']} -> '{origin['outputs'][0]}'" if origin["outputs"] else origin["op"]


def answers_to(node: ir.Node, text: str) -> bool:
    """Tell whether a node is meant by `text`: a part of its description or of an output's name."""
    return text in describe(node) or any(text in (value.name or "") for value in node.outputs)


def neighbourhood(node: ir.Node) -> str:
    """Show a node with its producers and consumers, one line each, for error messages."""
    lines = []
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            lines.append(f"    {_one_line(producer)}")
    lines.append(f"--> {_one_line(node)}")
    seen = set()
    for output in node.outputs:
        for use in output.uses():
            if use.node not in seen:
                seen.add(use.node)
                lines.append(f"    {_one_line(use.node)}")
    return "\n".join(lines)


def _one_line(node: ir.Node) -> str:
    outputs = ", ".join(f"%{value.name}" for value in node.outputs)
    inputs = ", ".join("_" if value is None else f"%{value.name}" for value in node.inputs)
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{outputs} = {op}({inputs})"
