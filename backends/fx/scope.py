"""A graph of torch.fx under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from lwc.backends.fx.module import LoweredTracer
from lwc.backends.fx.weights import identifier

__all__ = ["Scope"]

_READ = frozenset({"torch", "inf", "nan", "getattr", "slice"})
"""What FX may write into code besides names that it makes."""


class Scope:
    """One graph under construction: what stands for each of its values."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.graph = torch.fx.Graph(tracer_cls=LoweredTracer)
        self.root = root
        self.tensors: dict[ir.Value, torch.fx.Node] = {}
        self.integers: dict[ir.Value, torch.fx.Node] = {}
        self.origin: dict[str, Any] | None = None

    def call(self, target: Any, args: Sequence[Any], name: str, **kwargs: Any) -> torch.fx.Node:
        """Add a call, which comes from the node at hand."""
        node = self.graph.create_node(
            "call_function", target, tuple(args), kwargs, name=identifier(name)
        )
        if self.origin is not None:
            node.meta["onnx"] = self.origin
        return node

    def name_parameters(self) -> None:
        """Make the parameters of the generated function differ from all else that it reads.

        FX makes the names of nodes differ, but takes those of parameters as they are given, and
        assigns each parameter to its node in turn: one that is called as an earlier node is lost.
        """
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        names = {node.target for node in places}
        other = {node.name for node in places if node.name != node.target}
        if len(names) < len(places) or names & (other | _READ):
            for node in places:
                node.target = node.name
