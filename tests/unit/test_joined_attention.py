"""Attention with batch and heads joined in one axis: computed in rank 4, and then fused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import module_of, ops, run_pass_to_the_end, run_plain

from lwc.core.module import Module
from lwc.passes.attention.fuse_attention import FuseAttention

Array = np.ndarray[Any, Any]

RTOL, ATOL = 1e-5, 1e-6
"""float32 sums of at most a dozen terms, in another order."""

CONSTANTS = (
    "int64[3] joined = {-1, 5, 8}, int64[4] parted = {-1, 2, 5, 5}, int64[3] back = {-1, 5, 5}, "
    "int64[4] out = {-1, 2, 5, 8}, int64[4] wrong = {2, -1, 5, 5}, float scale = {0.3}"
)
JOINED = "q3 = Reshape (q, joined) k3 = Reshape (k, joined) v3 = Reshape (v, joined) "
PRODUCT = "kt = Transpose <perm = [0, 2, 1]> (k3) raw = MatMul (q3, kt) "

SPELLED = {
    "masked in rank 4, shares in rank 3": (
        "s = Mul (raw, scale) s4 = Reshape (s, parted) h = Add (s4, mask) s3 = Reshape (h, back) "
        "p = Softmax <axis = -1> (s3) r = MatMul (p, v3)"
    ),
    "shares in rank 4": (
        "s4 = Reshape (raw, parted) h = Add (s4, mask) p4 = Softmax <axis = 3> (h) "
        "p = Reshape (p4, back) r = MatMul (p, v3)"
    ),
    "a bias of rank 3 besides": (
        "s = Mul (raw, scale) b = Add (alibi, s) s4 = Reshape (b, parted) h = Add (s4, mask) "
        "p4 = Softmax <axis = -1> (h) p = Reshape (p4, back) r = MatMul (p, v3)"
    ),
    "a bias that broadcasts along what is joined": (
        "s = Div (raw, scale) b = Add (s, row) s4 = Reshape (b, parted) h = Add (s4, mask) "
        "p4 = Softmax <axis = -1> (h) p = Reshape (p4, back) r = MatMul (p, v3)"
    ),
    "softmax along the last axis by number": (
        "s4 = Reshape (raw, parted) h = Add (s4, mask) s3 = Reshape (h, back) "
        "p = Softmax <axis = 2> (s3) r = MatMul (p, v3)"
    ),
}


def graph(body: str, product: str = PRODUCT) -> Module:
    made: Module = module_of(
        "g (float[N, 2, 5, 8] q, float[N, 2, 5, 8] k, float[N, 2, 5, 8] v, "
        "float[N, 1, 5, 5] mask, float[M, 1, 5] alibi, float[1, 5] row) => (float[N, 2, 5, 8] y) "
        f"<{CONSTANTS}> {{ {JOINED} {product} {body} y = Reshape (r, out) }}",
        opset=18,
    )
    return made


def feed(batch: int) -> dict[str, Array]:
    random = np.random.default_rng(batch)
    shapes = {
        **dict.fromkeys("qkv", (batch, 2, 5, 8)),
        "mask": (batch, 1, 5, 5), "alibi": (2 * batch, 1, 5), "row": (1, 5),
    }  # fmt: skip
    return {name: random.standard_normal(each).astype(np.float32) for name, each in shapes.items()}


def compared(module: Module) -> list[str]:
    wanted = [run_plain(module, feed(batch)) for batch in (1, 3)]
    run_pass_to_the_end(FuseAttention(), module)
    for batch, outputs in zip((1, 3), wanted, strict=True):
        found = run_plain(module, feed(batch))
        np.testing.assert_allclose(found[0], outputs[0], rtol=RTOL, atol=ATOL)
    return [op for op in ops(module) if "Attention" in op]


@pytest.mark.parametrize("spelling", [name for name in SPELLED if "rank 3 besides" not in name])
def test_joined_axes_come_apart(spelling: str) -> None:
    module = graph(SPELLED[spelling])
    assert compared(module) == ["MultiHeadAttention"]
    assert "Softmax" not in ops(module)


def test_a_bias_per_head_comes_apart() -> None:
    """As in Bloom; its rows must be known to be those of the scores."""
    assert not compared(graph(SPELLED["a bias of rank 3 besides"]))
    module = graph(SPELLED["a bias of rank 3 besides"])
    text = JOINED + PRODUCT.replace("raw =", "first =") + "raw = Mul (first, scale) "
    module = module_of(
        "g (float[N, 2, 5, 8] q, float[N, 2, 5, 8] k, float[N, 2, 5, 8] v, "
        "float[N, 1, 5, 5] mask, float[N, 2, 1, 5] slopes) => (float[N, 2, 5, 8] y) "
        f"<{CONSTANTS}, int64[3] flat = {{-1, 1, 5}}> {{ {text} alibi = Reshape (slopes, flat) "
        f"{SPELLED['a bias of rank 3 besides']} y = Reshape (r, out) }}",
        opset=18,
    )

    def given(batch: int) -> dict[str, Array]:
        made = feed(batch)
        made["slopes"] = made.pop("alibi").reshape(batch, 2, 1, 5)
        return {name: made[name] for name in ("q", "k", "v", "mask", "slopes")}

    wanted = [run_plain(module, given(batch))[0] for batch in (1, 3)]
    run_pass_to_the_end(FuseAttention(), module)
    assert "MultiHeadAttention" in ops(module)
    for batch, outputs in zip((1, 3), wanted, strict=True):
        found = run_plain(module, given(batch))[0]
        np.testing.assert_allclose(found, outputs, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "body",
    [
        # Heads before batch: what is joined is not what is parted.
        "s4 = Reshape (raw, wrong) h = Add (s4, row) s3 = Reshape (h, back) "
        "p = Softmax <axis = -1> (s3) r = MatMul (p, v3)",
        # Along the queries.
        "s4 = Reshape (raw, parted) h = Add (s4, mask) s3 = Reshape (h, back) "
        "p = Softmax <axis = 1> (s3) r = MatMul (p, v3)",
        # Scores are read elsewhere.
        "s4 = Reshape (raw, parted) h = Add (s4, mask) s3 = Reshape (h, back) "
        "p = Softmax <axis = -1> (s3) t = MatMul (p, v3) m = ReduceMax <keepdims = 0> (raw) "
        "r = Add (t, m)",
        # Keys of another order of batch and heads.
        "s = Relu (raw) s4 = Reshape (s, parted) h = Add (s4, mask) s3 = Reshape (h, back) "
        "p = Softmax <axis = -1> (s3) r = MatMul (p, v3)",
    ],
)
def test_what_is_something_else(body: str) -> None:
    assert not compared(graph(body))
