"""Products with quantized weights, which are packed for the kernels when a module is lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lwc.backends.triton.lowerings.registry import Refused, Results, Site, kernel
from lwc.backends.triton.packed_linear import PackedLinear
from lwc.backends.triton.weights import GROUP_SIZES, W4Weights, W8Weights, column_order
from lwc.core.dialect import DynamicQuantMatMul
from lwc.core.errors import LwcError

_RUNS = {4: ("w4a16_kernel",), 8: ("quantize_rows_kernel", "w8a8_kernel")}
_ALL = "w4a16_kernel quantize_rows_kernel w8a8_kernel activation_kernel"


@kernel("com.microsoft::MatMulNBits", runs="w4a16_kernel")
def matmul_nbits(site: Site) -> Results:
    """4-bit weights in blocks."""
    bits, block = site.given("bits"), site.given("block_size")
    site.need(bits == 4, f"weights have {bits} bits, the kernel takes 4")
    site.need(block in GROUP_SIZES, f"blocks of {block} inputs are not among {GROUP_SIZES}")
    site.need_absent("group_of_input")
    site.need_floats("x", "bias")
    codes, scales, columns = site.weight("codes"), site.weight("scales"), site.given("N")
    zeros = None if site.given("zero_points") is None else site.weight("zero_points")
    site.need(zeros is None or not zeros.is_floating_point(), "its zero points are no integers")
    weights = _packed(
        lambda: W4Weights.from_matmul_nbits(
            codes.reshape(columns, -1, block // 2).numpy(),
            _numbers(scales),
            None if zeros is None else zeros.flatten().numpy(),
            depth=site.given("K"),
            block_size=block,
        )
    )
    return _linear(site, PackedLinear(weights, bias=_bias(site, site.given("bias"))))


@kernel("lwc::DynamicQuantMatMul", runs=_ALL)
def dynamic_quant_matmul(site: Site) -> Results:
    """4-bit weights, of which activations are then not rounded, or 8-bit ones of whole columns."""
    names = ("K", "N", "bits", "block_size", "x_block", "zero_points", "bias", "gated")
    use = DynamicQuantMatMul(
        **{name: site.given(name) for name in names}, activation=site.given("activation")
    )
    site.need(use.bits in (4, 8), f"weights have {use.bits} bits, kernels take 4 or 8")
    rest = site.given("rest")
    zeros = site.constant(rest[0], "zero_points") if use.zero_points else None
    shift = rest[use.zero_points] if use.bias else None
    site.need_floats("x")
    if use.bits == 8:
        site.need(not use.block_size, "8-bit weights have a scale for each block, not each column")
        site.need(zeros is None, "8-bit weights have zero points")
    codes, scales = site.weight("codes").numpy(), _numbers(site.weight("scales"))
    weights = _packed(
        lambda: (
            W8Weights.from_dialect(use, codes, scales)
            if use.bits == 8
            else W4Weights.from_dialect(
                use, codes, scales, None if zeros is None else zeros.numpy()
            )
        )
    )
    bias = _bias(site, shift)
    if bias is not None:
        bias = bias[torch.from_numpy(column_order(use))]
    activation = use.activation.replace("_", "-")
    site.runs = _RUNS[use.bits] + ("activation_kernel",) * bool(use.gated)
    site.note = "activations are not rounded" if use.bits == 4 else ""
    return _linear(
        site, PackedLinear(weights, bias=bias, activation=activation, gated=bool(use.gated))
    )


def _packed(pack: Callable[[], Any]) -> Any:
    try:
        return pack()
    except LwcError as error:
        raise Refused(error.message) from error


def _linear(site: Site, module: PackedLinear) -> Results:
    path = str(site.given("codes").target)
    return {0: site.call_module(f"{path}_packed", module, site.given("x"))}


def _bias(site: Site, given: Any) -> torch.Tensor | None:
    return None if given is None else site.constant(given, "bias").clone()


def _numbers(scales: torch.Tensor) -> Any:
    """Return scales as numpy has them."""
    return scales.to(torch.float32 if scales.dtype == torch.bfloat16 else scales.dtype).numpy()
