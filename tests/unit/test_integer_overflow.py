"""Integers that extents become when they do not fit: in PyTorch and after canonicalize."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch._dynamo.testing
from fx_agreement import assert_agrees
from support import module_of, ops, run_pass_to_the_end, run_plain

from lwc.backends.fx.convert import to_fx
from lwc.passes.cleanup.canonicalize import Canonicalize

FEED = {"x": np.arange(15, dtype=np.float32).reshape(5, 3)}

TYPES = "int64 most = {9223372036854775807}, int64 c = {8589934592}, int32 top = {2147483647}"


@pytest.mark.parametrize(
    ("dtype", "nodes"),
    [
        ("int64", "y = Mul(n, most)"),
        ("int64", "y = Add(n, most)"),
        ("int64", "m = Neg(n) y = Sub(m, most)"),
        ("int64", "m = Sub(n, n) k = Sub(m, most) j = Div(n, n) l = Sub(k, j) y = Neg(l)"),
        ("int64", "m = Mul(n, c) k = Mul(m, c) l = Add(k, n) y = Identity(l)"),
        ("int64", "m = Mul(n, c) k = Cast<to=6>(m) y = Cast<to=7>(k)"),
        ("int64", "m = Add(n, c) k = Cast<to=6>(m) y = Cast<to=7>(k)"),
        ("int32", "m = Cast<to=6>(n) y = Add(m, top)"),
        ("int32", "m = Cast<to=6>(n) y = Mul(m, top)"),
        ("int32", "m = Sub(n, c) y = Cast<to=6>(m)"),
        ("int64", "m = Sub(n, most) y = Mod <fmod = 1> (m, n)"),
        ("bool", "m = Mul(n, c) y = Cast<to=9>(m)"),
    ],
)
def test_arithmetic_of_extents_wraps(dtype: str, nodes: str) -> None:
    module = module_of(f"g (float[a, b] x) => ({dtype}[k] y) <{TYPES}> {{ n = Shape(x) {nodes} }}")
    assert_agrees(module, FEED)


def test_a_constant_that_a_cast_makes_negative() -> None:
    module = module_of(
        """g (float[a, b] x) => (float[n, m] y)
            <int64[1] s = {0}, int64[1] e = {9223372036854775807}, int64[1] a = {0}>
            { f = Cast<to=6>(e) h = Cast<to=7>(f) y = Slice(x, s, h, a) }"""
    )
    (y,) = assert_agrees(module, FEED)
    assert len(y) == 4


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_bounds_of_three(op: str) -> None:
    module = module_of(
        f"""g (float[a, b] x) => (int64[2] y) <int64[2] c = {{4, 2}}, int64[1] d = {{4}}>
            {{ n = Shape(x) y = {op}(n, c, d) }}"""
    )
    assert_agrees(module, FEED)


@pytest.mark.parametrize(
    ("made", "stays"),
    [
        ("p = Mul(n, c)", True),
        ("p = Add(n, c)", True),
        ("q = Mul(n, c) p = Div(q, three)", True),
        ("p = Pow(n, forty)", True),
        ("p = Mul(n, three)", False),
        ("p = Identity(n)", False),
        ("p = Min(n, most)", False),
        ("p = Max(n, c)", True),
        ("m = Neg(n) d = Neg(c) p = Min(m, d)", True),
        ("m = Neg(n) d = Neg(c) p = Max(m, d)", False),
    ],
)
def test_canonicalize_drops_narrow_casts_of_what_fits(made: str, stays: bool) -> None:
    text = f"""g (float[a, b] x) => (int64[2] y)
        <{TYPES}, int64 three = {{3}}, int64 forty = {{40}}>
        {{ n = Shape(x) {made} k = Cast<to=6>(p) y = Cast<to=7>(k) }}"""
    module, plain = module_of(text), run_plain(module_of(text), FEED)
    run_pass_to_the_end(Canonicalize(), module)
    assert ("Cast" in ops(module)) == stays
    np.testing.assert_array_equal(run_plain(module, FEED)[0], plain[0])


@pytest.mark.parametrize(("made", "stays"), [("p = Neg(n)", True), ("p = Add(n, n)", False)])
def test_negative_numbers_do_not_fit_a_type_without_them(made: str, stays: bool) -> None:
    text = f"""g (float[a, b] x) => (int64[2] y)
        {{ n = Shape(x) {made} k = Cast<to=12>(p) y = Cast<to=7>(k) }}"""
    module, plain = module_of(text), run_plain(module_of(text), FEED)
    run_pass_to_the_end(Canonicalize(), module)
    assert ("Cast" in ops(module)) == stays
    np.testing.assert_array_equal(run_plain(module, FEED)[0], plain[0])


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(l, one) r = Range(zero, a, one) y = Cast<to=1>(r)",
        "a = Add(l, one) q = Div(a, two) r = Range(zero, q, one) y = Cast<to=1>(r)",
        "a = Mul(l, two) q = Div(a, two) r = Range(zero, q, one) y = Cast<to=1>(r)",
    ],
    ids=["add", "divide", "multiply"],
)
def test_extents_are_compiled_once_for_all(body: str) -> None:
    module = module_of(
        f"""g (float[a, b] x) => (float[k] y) <int64 zero = {{0}}, int64 one = {{1}},
            int64 two = {{2}}, int64[1] axes = {{0}}>
            {{ n = Shape<start = 1, end = 2>(x) l = Squeeze(n, axes) {body} }}"""
    )
    lowered = to_fx(module)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowered, backend=counted, fullgraph=True, dynamic=True)
    for extent in (5, 8, 11):
        x = torch.zeros(2, extent)
        torch.testing.assert_close(compiled(x), lowered(x))
    assert counted.frame_count == 1
