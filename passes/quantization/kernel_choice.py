"""Which operator computes a quantized weight fastest, by the kernel tables of a measured target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from lwc.passes.attention.packing_gain import DECODE, PREFILL

if TYPE_CHECKING:
    from lwc.analysis.target import Target

__all__ = ["Operator", "choose_operator"]

Operator: TypeAlias = Literal["matmulnbits", "lwc"]


def choose_operator(
    target: Target, bits: int, inputs: int, outputs: int
) -> tuple[Operator | None, str]:
    """Return the operator of a weight; None, and a sentence that says why, where none pays.

    It must not be slower than float32 for one token, nor for a prompt of 512; of several the one
    with the least product of both times is taken.

    Args:
        target: The measured machine.
        bits: Bits of the weight.
        inputs: Inputs of the layer.
        outputs: Its outputs.
    """
    tables: dict[Operator, str] = {"lwc": f"lwc_matmul{bits}"}
    if bits != 3:
        tables["matmulnbits"] = f"matmul_nbits{8 if bits > 4 else 4}"

    def seconds(kernel: str, tokens: int) -> float:
        return target.tables[kernel].time((tokens, inputs, outputs))

    best: tuple[float, Operator] | None = None
    objection = "the target has no table of a quantized product"
    for operator, kernel in tables.items():
        if kernel not in target.tables:
            continue
        product, slower = 1.0, None
        for tokens in (DECODE, PREFILL):
            plain, quantized = seconds("matmul", tokens), seconds(kernel, tokens)
            product *= quantized / plain
            if quantized > plain:
                slower = (
                    f"for {tokens} token{'s' * (tokens > 1)} its {bits}-bit product takes "
                    f"{1e6 * quantized:.1f} microseconds as predicted, and {1e6 * plain:.1f} in "
                    "floating point"
                )
        if slower is not None:
            objection = slower
        elif best is None or product < best[0]:
            best = product, operator
    return (None, objection) if best is None else (best[1], "")
