"""An activation of a gate, times the branch beside it: what stands between the MLP's products."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from lwc.backends.triton.operation import Access, Configuration, Launch, Least, Operation, Work

__all__ = ["ACTIVATIONS", "activate", "activation_kernel", "activation_operation"]

ACTIVATIONS = ("silu", "gelu", "gelu-tanh", "relu")

_TILES = ((2048, 4), (1024, 4), (4096, 8))


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    if FUNCTION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif FUNCTION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu-tanh":
        # tanh(z) is 1 - 2 / (1 + exp(2z)), which ends at 1 and -1 where exp does at inf and 0.
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * z)))
    else:
        y = tl.where(x < 0.0, 0.0, x)  # a maximum would drop NaN
    return y


@triton.jit
def activation_kernel(
    gate, up, out,
    columns, blocks, stride_gate, stride_up,
    FUNCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(tl.float32)
    y = activate(g, FUNCTION) * u
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=mask)


def activation_operation(gate: Any, up: Any, function: str) -> Operation:
    """Describe activation(gate) * up.

    Args:
        gate: [rows, columns], columns side by side; rows may have something between them, as in
            the two halves of one product.
        up: As `gate`.
        function: One of `ACTIVATIONS`.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    elements = prod(gate.shape)
    rows, columns = gate.shape
    if gate.is_contiguous() and up.is_contiguous():
        rows, columns = 1, elements

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        size = elements * gate.element_size()
        blocks = -(-columns // configuration["COLUMNS"])
        launch = Launch(
            kernel=activation_kernel,
            grid=(rows * blocks,),
            arguments={
                "gate": gate, "up": up, "out": out, "columns": columns, "blocks": blocks,
                "stride_gate": gate.stride(0), "stride_up": up.stride(0),
            },
            constants={"FUNCTION": function},
            configuration=configuration,
            work=Work(
                tuple(Access(name, size, size) for name in ("gate", "up", "out")),
                5 * elements,
                "float32",
            ),
        )  # fmt: skip
        return (launch,)

    return Operation(
        name=f"gated {function}",
        candidates=tuple(
            Configuration({"COLUMNS": size}, warps=warps, stages=1) for size, warps in _TILES
        ),
        prepare=prepare,
        results=(out,),
        least=Least(3 * elements * gate.element_size(), 5 * elements),
        key=(gate.dtype, function, min(elements, 2**24)),
    )
