"""An activation times the branch beside it, wherever the two stand as nodes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lwc.backends.triton import launch
from lwc.backends.triton.lowerings.registry import Refused, Results, Site, kernel


@kernel("Mul", runs="activation_kernel")
def gated(site: Site) -> Results:
    """The product of an activation that nothing else reads, and another tensor."""
    found = [(node, _function(node)) for node in site.node.args if isinstance(node, torch.fx.Node)]
    opened = [(node, function) for node, function in found if function is not None]
    if not opened:
        return None
    gate, function = opened[0]
    site.need(site.node.args != (gate, gate), "the activation is multiplied by itself")
    up = next((other for other in site.node.args if other is not gate), None)
    site.need(isinstance(up, torch.fx.Node), "the activation is multiplied by a number")
    site.need(len(gate.users) == 1, "the activation is read elsewhere too")
    source = gate.args[0]
    _fits(site, source, up)
    return {0: site.call(launch.gated_activation, source, up, function)}


@kernel("SwiGLU", runs="activation_kernel")
def swiglu(site: Site) -> Results:
    """A gate and the branch beside it, given apart."""
    site.need(site.given("alpha") == 1.0, "its sigmoid is not SiLU's")
    x, gate = site.given("x"), site.given("gate")
    site.need(gate is not None, "gate and branch are one tensor")
    _fits(site, x, gate)
    return {0: site.call(launch.gated_activation, x, gate, "silu")}


def _fits(site: Site, gate: Any, up: Any) -> None:
    site.need(isinstance(gate, torch.fx.Node), "the activation is of a number")
    shape = site.shape(gate)
    site.need(
        shape is not None and len(shape) > 0 and shape == site.shape(up),
        "the branches are not known to have one shape",
    )
    dtype = site.dtype(gate)
    if dtype is None or site.dtype(up) is None:
        raise Refused("the type of the branches is not known")
    site.need(dtype == site.dtype(up), "the branches have not one type")
    if dtype.name not in ("FLOAT16", "BFLOAT16", "FLOAT"):
        raise Refused("the branches are not float16, bfloat16 or float32")


def _function(node: torch.fx.Node) -> str | None:
    """Return what the kernel calls the activation that a node is, None where it knows none."""
    origin: Mapping[str, Any] = node.meta.get("onnx", {})
    op, given = origin.get("op"), node.kwargs
    if len(node.args) != 1:
        return None  # a bias is added first
    if op in ("Swish", "com.microsoft::QuickGelu"):
        alpha = given.get("alpha", 1.0 if op == "Swish" else 1.702)
        return "silu" if alpha == 1.0 else None
    if op == "Gelu":
        return "gelu-tanh" if given.get("approximate") == "tanh" else "gelu"
    known = {"Relu": "relu", "com.microsoft::Gelu": "gelu", "com.microsoft::FastGelu": "gelu-tanh"}
    return known.get(op or "")
