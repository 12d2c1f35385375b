"""What tests of lowered modules share: nodes in the interpreter beside the fx backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from fx_agreement import compare, one_node, run_fx

from lwc.backends.triton.lower import placements
from lwc.backends.triton.session import TritonBackend
from lwc.core.module import Module

MS = "com.microsoft"
RTOL, ATOL = 1e-4, 2e-5
"""float32 with sums of up to 100 terms in another order, of numbers of the size of 1."""


def normal(*shape: int, seed: int = 0) -> Any:
    random = np.random.default_rng(hash((shape, seed)) % 2**32)
    return random.normal(size=shape).astype(np.float32)


def integers(low: int, high: int, *shape: int, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(sum(shape)).integers(low, high, shape).astype(dtype)


def run(module: Module, feed: Mapping[str, Any]) -> list[Any]:
    with TritonBackend().compile(module, threads=1) as executable:
        return list(executable.run(dict(feed)).values())


def reasons(module: Module) -> list[str]:
    """Return what keeps nodes out of kernels."""
    with TritonBackend().compile(module) as executable:
        found = [each.reason for each in placements(executable.graph_module)]
    return [each for each in found if each is not None]


def agree(module: Module, feed: Mapping[str, Any], rtol: float = RTOL, atol: float = ATOL) -> None:
    """Check that the last node runs in a kernel and computes what the fx backend does."""
    with TritonBackend().compile(module) as executable:
        assert placements(executable.graph_module)[-1].kernels, reasons(module)
    for a, b in zip(run(module, feed), run_fx(module, feed), strict=True):
        compare(a, b, rtol, atol)


def check(op: str, inputs: Mapping[str, Any], **rest: Any) -> None:
    agree(*one_node(op, inputs, **rest))
