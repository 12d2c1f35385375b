"""Norms and rotary embeddings at the edges of what kernels take, in the interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fx_agreement import one_node, parsed
from interpreted_lowering import MS, check, normal, reasons, run
from odd_rotary import REFUSED, odd_rotary

import lwc
from lwc.backends.fx.ops import rotary
from lwc.backends.triton import launch
from lwc.backends.triton.architectures import nearest
from lwc.backends.triton.dry_run import dry_run
from lwc.backends.triton.operation import Launch
from lwc.backends.triton.products import quantize_rows, sparse_matmul, w4a16_matmul, w8a8_matmul
from lwc.backends.triton.weights import SparseWeights, W4Weights, W8Weights
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.tiled_bitmap import pack

# Norms


@pytest.mark.parametrize(
    ("op", "domain", "other"),
    [
        ("RMSNormalization", "", "scale"),
        ("SimplifiedLayerNormalization", MS, "scale"),
        ("LayerNormalization", "", "scale"),
        ("LayerNormalization", "", "bias"),
        ("SkipSimplifiedLayerNormalization", MS, "gamma"),
        ("SkipSimplifiedLayerNormalization", MS, "bias"),
        ("SkipLayerNormalization", MS, "gamma"),
        ("SkipLayerNormalization", MS, "beta"),
        ("SkipLayerNormalization", MS, "bias"),
        ("SkipLayerNormalization", MS, "skip"),
    ],
)
def test_norms_of_two_types_stay(op: str, domain: str, other: str) -> None:
    names = {
        "RMSNormalization": ["x", "scale"],
        "SimplifiedLayerNormalization": ["x", "scale"],
        "LayerNormalization": ["x", "scale", "bias"],
        "SkipSimplifiedLayerNormalization": ["x", "skip", "gamma", "bias"],
        "SkipLayerNormalization": ["x", "skip", "gamma", "beta", "bias"],
    }[op]
    wide = ("x", "skip")
    given = {name: normal(*((2, 8) if name in wide else (8,))) for name in names}
    given = {name: array.astype(np.float16) for name, array in given.items()}
    given[other] = given[other].astype(np.float32)
    module, _ = one_node(op, given, domain=domain, opset=23)
    assert reasons(module) == [f"{other} has another type than x"]


UNFIT = {
    "(float[n, 8] x, float[1, 8] w) => (float[n, 8] y) { y = RMSNormalization (x, w) }": (
        "scale is no vector"
    ),
    "(float[n, 8] x, float[1] w) => (float[n, 8] y) { y = RMSNormalization (x, w) }": (
        "scale is not as long as a row"
    ),
    """(double[n, 8] x, double[n, 8] up) => (double[n, 8] y)
       { gate = Relu (x)  y = Mul (gate, up) }""": (
        "the branches are not float16, bfloat16 or float32"
    ),
    """(float[b, t, 16] x, float[9, 4] cos, float[9, 4] sin, int64[b, t] at) => (float[b, t, 16] y)
       { y = RotaryEmbedding (x, cos, sin, at) }""": "the number of heads is not known",
    """(float[b, t, w] q, float[b, t, w] k, float[b, t, w] v) => (float[b, t, w] y)
       { y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }""": (
        "the size of heads is not known"
    ),
    """(float[b, t, w] q, float[b, t, w] k, float[b, t, w] v) => (float[b, t, w] y)
       { y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v) }""": (
        "the size of heads is not known"
    ),
}


@pytest.mark.parametrize("graph", UNFIT)
def test_what_kernels_do_not_compute_for_every_feed_stays(graph: str) -> None:
    opsets = 'opset_import: ["" : 23, "com.microsoft" : 1]'
    assert reasons(parsed(f"<ir_version: 10, {opsets}> g {graph}")) == [UNFIT[graph]]


# Rotary embeddings


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(("domain", "odd", "told"), REFUSED)
def test_rotary_embeddings_that_do_not_fit(domain: str, odd: Any, told: str, rank: int) -> None:
    module, feed = odd_rotary(domain, odd, rank)
    assert reasons(module) == []
    op = f"{domain}::RotaryEmbedding" if domain else "RotaryEmbedding"
    with pytest.raises(LwcError, match=rf"^{op} 'n': {re.escape(told)}$"):
        run(module, feed)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_of_the_tables_are_seen_where_the_host_does_not_look(
    monkeypatch: pytest.MonkeyPatch, *, interleaved: bool
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(rotary, "check_places", lambda places, rows: None)
    x = torch.from_numpy(normal(1, 4, 3, 8))
    angles = torch.from_numpy(normal(4, 4))
    cos, sin = angles.cos(), angles.sin()
    places = torch.tensor([[2, -1, 4, 0]])
    found = launch.rotary(x, cos, sin, places, interleaved=interleaved)
    inside = torch.tensor([[2, 0, 0, 0]])
    wanted = launch.rotary(x, cos, sin, inside, interleaved=interleaved)
    wanted[:, 1:3] = torch.nan
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


# Strides


def apart(tensor: Any) -> Any:
    """Return a tensor that is no view without gaps, beside what must not be read."""
    beside = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 1)
    return torch.stack([tensor, beside], -1)[..., 0]


def random(*shape: int) -> Any:
    return torch.from_numpy(normal(*shape))


def functions() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    heads, cache = random(2, 2, 3, 16), random(2, 1, 40, 16)
    places, lengths = torch.tensor([[1, 4, 0], [2, 2, 3]]), torch.tensor([40, 7])
    starts = torch.tensor([0, 1, 3])
    rows, vector, table = random(5, 64), random(64), random(5, 8)
    codes = np.arange(7 * 64).reshape(7, 64)
    four = W4Weights.pack((codes % 16).astype(np.uint8), np.ones((7, 2)), None, 32)
    eight = W8Weights.pack((codes % 100).astype(np.int8), np.ones(7))
    some = SparseWeights.of(pack((codes % 3).astype(np.float16)))
    return {
        "rms_norm": (lambda x, w, r: launch.rms_norm(x, w, residual=r)[0], [rows, vector, rows]),
        "layer_norm": (launch.layer_norm, [rows, vector, vector]),
        "gated_activation": (launch.gated_activation, [rows, rows]),
        "rotary": (launch.rotary, [heads.transpose(1, 2), table, table, places]),
        "attention": (
            lambda q, k, v, mask, lengths: launch.attention(
                q, k, v, mask=mask, key_lengths=lengths
            ),
            [heads, cache, cache, random(3, 40), lengths],
        ),
        "decode_attention": (
            lambda q, k, v, mask, lengths: launch.decode_attention(
                q, k, v, mask=mask, key_lengths=lengths
            ),
            [heads, cache, cache, random(3, 40) > 0, lengths],
        ),
        "attention_packed": (
            lambda q, k, v, *starts: launch.attention_packed(q, k, v, *starts, longest=(2, 2)),
            [heads[0].transpose(0, 1)] * 3 + [starts] * 2,
        ),
        "quantize_rows": (
            lambda x: torch.cat([each.flatten() for each in quantize_rows(x)]),
            [rows],
        ),
        "w8a8_matmul": (lambda x, bias: w8a8_matmul(x, eight, bias), [rows, random(7)]),
        "w4a16_matmul": (lambda x, bias: w4a16_matmul(x, four, bias), [rows, random(7)]),
        "sparse_matmul": (lambda x, bias: sparse_matmul(x, some, bias), [rows, random(7)]),
    }


@pytest.mark.parametrize("name", functions())
def test_any_strides_give_what_copies_give(name: str) -> None:
    function, given = functions()[name]
    wanted = function(*(each.contiguous() for each in given))
    assert not wanted.isnan().any()
    torch.testing.assert_close(function(*map(apart, given)), wanted, rtol=0, atol=0)


# Nothing


EMPTY = [(0, 3, 8), (2, 0, 8)]
LAUNCHES: dict[str, Callable[[Any], Any]] = {
    "rms_norm": lambda x: launch.rms_norm(x, x.new_ones(x.shape[-1])),
    "layer_norm": lambda x: launch.layer_norm(x, x.new_ones(x.shape[-1]), residual=x)[1],
    "gated_activation": lambda x: launch.gated_activation(x, x),
    "rotary": lambda x: launch.rotary(x.unsqueeze(2), x[..., :4], x[..., :4]).squeeze(2),
    "attention": lambda x: launch.attention(*[x.unsqueeze(1)] * 3).squeeze(1),
    "decode_attention": lambda x: launch.decode_attention(*[x.unsqueeze(1)] * 3).squeeze(1),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in LAUNCHES
        for shape in [*EMPTY, (2, 3, 0)]
        if shape in EMPTY or "attention" not in name  # heads have elements
    ],
)
def test_nothing_is_launched_for_nothing(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Launch, "run")
    x = torch.ones(shape)
    found = LAUNCHES[name](x)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("shape", EMPTY)
def test_nodes_of_no_rows(shape: tuple[int, ...]) -> None:
    check("RMSNormalization", {"x": normal(*shape), "w": normal(8)}, opset=23)
    norm = {"x": normal(*shape), "skip": normal(*shape), "gamma": normal(8), "beta": normal(8)}
    check("SkipLayerNormalization", norm, domain=MS)
    angles, places = normal(5, 4), np.zeros(shape[:2], np.int64)
    turned = {"x": normal(*shape), "cos": np.cos(angles), "sin": np.sin(angles), "places": places}
    check("RotaryEmbedding", turned, opset=23, num_heads=1)


# Errors


def grouped(columns: int, **more: Any) -> tuple[Module, dict[str, Any]]:
    """GroupQueryAttention of 3 tokens and heads of 16, which it turns by tables of 5 rows."""
    table = normal(5, columns)
    given = {
        **{"q": normal(1, 3, 32), "k": normal(1, 3, 16), "v": normal(1, 3, 16)},
        **{"past_k": None, "past_v": None},
        **{"lengths": np.array([2], np.int32), "total": np.array(3, np.int32)},
        **{"cos": np.cos(table), "sin": np.sin(table), **more},
    }
    sizes: dict[str, Any] = {"num_heads": 2, "kv_num_heads": 1, "do_rotary": 1}
    return one_node("GroupQueryAttention", given, domain=MS, **sizes)


@pytest.mark.parametrize("first", [3, -1])
def test_positions_of_grouped_attention_that_no_table_has(first: int) -> None:
    module, feed = grouped(8, places=np.array([[first, 0, 0]]))
    told = (
        r"^com.microsoft::GroupQueryAttention 'n': positions are from -?\d to \d, and tables of 5"
    )
    with pytest.raises(LwcError, match=told):
        run(module, feed)


def test_an_error_of_a_launch_names_its_node() -> None:
    """The launch's own check knows nothing of nodes."""
    module, feed = grouped(16)
    told = r"^com.microsoft::GroupQueryAttention 'n': cos has shape \[5, 16\], which does not fit"
    with pytest.raises(LwcError, match=told):
        run(module, feed)
    inputs = [torch.from_numpy(array) for array in feed.values()]
    with pytest.raises(LwcError, match=told):
        dry_run(lwc.to_triton(module), inputs, nearest(0))


# Gradients


def test_no_gradient_is_lost() -> None:
    """Kernels give none: weights ask for none, and an input that does is told."""
    given = {"x": normal(2, 8), "scale": normal(8)}
    module, _ = one_node("RMSNormalization", given, opset=23, constant=["scale"])
    net = lwc.to_triton(module)
    x = torch.from_numpy(given["x"])
    assert not net(x).requires_grad
    asks = x.clone().requires_grad_()
    with pytest.raises(LwcError, match="norm_kernel gives no gradient, and is given what asks"):
        net(asks)
    with torch.no_grad():
        torch.testing.assert_close(net(asks), net(x))
