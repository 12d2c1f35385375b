"""A linear layer with packed weights: what products with quantized weights are lowered to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from lwc.backends.triton.launch import gated_activation
from lwc.backends.triton.products import w4a16_matmul, w8a8_matmul
from lwc.backends.triton.weights import W4Weights, W8Weights

__all__ = ["PackedLinear"]


class PackedLinear(torch.nn.Module):  # type: ignore[misc]
    """activation(x wᵀ + bias), by the kernel for the weights.

    Its buffers are the tensors of the weights and `bias`.

    Args:
        weights: 4-bit weights; or 8-bit ones, for which each row of `x` is rounded to 8 bits.
        bias: [columns], or None.
        activation: "none", "relu", "silu", "gelu" or "gelu-tanh".
        gated: The first half of the columns is a gate: the result is activation(gate) times the
            other half, which a second kernel computes.
    """

    def __init__(
        self,
        weights: W4Weights | W8Weights,
        *,
        bias: torch.Tensor | None = None,
        activation: str = "none",
        gated: bool = False,
    ) -> None:
        super().__init__()
        self._tensors = [
            each.name
            for each in fields(weights)
            if isinstance(getattr(weights, each.name), torch.Tensor)
        ]
        for name in self._tensors:
            self.register_buffer(name, getattr(weights, name))
        self.register_buffer("bias", bias)
        emptied: Any = dict.fromkeys(self._tensors)
        self._weights = replace(weights, **emptied)
        self._product = w4a16_matmul if isinstance(weights, W4Weights) else w8a8_matmul
        self.activation = activation
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of [..., depth], [..., columns] or half as many where gated."""
        weights: Any = replace(self._weights, **{n: getattr(self, n) for n in self._tensors})
        ends = "none" if self.gated else self.activation
        y: torch.Tensor = self._product(x, weights, self.bias, activation=ends)
        if not self.gated:
            return y
        gate, up = y.chunk(2, dim=-1)
        opened: torch.Tensor = (
            gate * up if self.activation == "none" else gated_activation(gate, up, self.activation)
        )
        return opened

    def constructor(self) -> str:
        """Return Python that makes the module anew, with weights that are yet to be loaded."""
        w = self._weights
        parts = [f"columns={w.columns}", f"depth={w.depth}"]
        if isinstance(w, W4Weights):
            parts += [f"group_size={w.group_size}", f"zeros={'zeros' in self._tensors}"]
        ends = []
        if self.bias is not None:
            ends.append(f"bias=torch.empty({w.columns}, dtype={self.bias.dtype})")
        if self.activation != "none":
            ends.append(f"activation={self.activation!r}")
        if self.gated:
            ends.append("gated=True")
        weights = f"{type(w).__name__}.empty({', '.join(parts)})"
        return f"{type(self).__name__}({', '.join([weights, *ends])})"
