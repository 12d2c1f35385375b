"""Rotary embedding and gated activations in the interpreter against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from lwc.backends.triton import launch
from lwc.core.errors import UsageError

# Results are rounded once and stay below 16 in magnitude: half a unit in the last place there.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
TYPES = st.sampled_from(list(ROUNDING))


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).clamp(-4, 4).to(dtype)


def turned(x: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2])
    first, second = pairs if interleaved else (x[..., :half], x[..., half : 2 * half])
    both = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat([joined, x[..., 2 * half :]], -1)


ODD: dict[str, Any] = {"batch": 2, "length": 3, "heads": 3, "half": 20, "dtype": torch.float32}


@settings(max_examples=30, deadline=None, derandomize=True)
@example(**ODD, rest=0, angles="by index", interleaved=True)
@example(**ODD, rest=3, angles="by position", interleaved=True)
@example(**ODD, rest=0, angles="by token", interleaved=False)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 9), heads=st.integers(1, 9),
    half=st.sampled_from([1, 4, 20, 32]), rest=st.sampled_from([0, 0, 3, 16]), dtype=TYPES,
    angles=st.sampled_from(["by index", "by token", "by position"]), interleaved=st.booleans(),
)  # fmt: skip
def test_rotary_equals_torch(
    *, batch: int, length: int, heads: int, half: int, rest: int, dtype: torch.dtype, angles: str,
    interleaved: bool,
) -> None:  # fmt: skip
    packed = numbers(0, batch, length, heads + 2, 2 * half + rest, dtype=dtype)
    x = packed[:, :, 1:-1]
    angle = numbers(1, *((batch, length) if angles == "by token" else (17,)), half) * 3
    cos, sin = angle.cos(), angle.sin()
    positions = torch.arange(batch * length).view(batch, length) * 7 % 17
    ways: dict[str, Callable[[Any], Any]] = {
        "by index": lambda table: table[:length].expand(batch, -1, -1),
        "by token": lambda table: table,
        "by position": lambda table: table[positions],
    }
    rows = ways[angles]
    found = launch.rotary(
        x, cos, sin, positions if angles == "by position" else None, interleaved=interleaved
    )
    expected = turned(x.double(), rows(cos).double(), rows(sin).double(), interleaved=interleaved)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu-tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(rows=st.integers(1, 5), columns=st.integers(1, 2100), packed=st.booleans())
def test_activations_equal_torch(
    *, rows: int, columns: int, packed: bool, dtype: torch.dtype, function: str
) -> None:
    both = numbers(0, rows, 2 * columns, dtype=dtype)
    gate, up = both[:, :columns], both[:, columns:]
    if not packed:
        gate, up = gate.contiguous(), up.contiguous()
    plain: dict[str, Callable[[Any], Any]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu-tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }
    expected = up.double() * plain[function](gate.double())
    found = launch.gated_activation(gate, up, function)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_activations_end_where_they_should() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    for function in ("silu", "gelu", "gelu-tanh", "relu"):
        found = launch.gated_activation(gate, torch.ones_like(gate), function)
        torch.testing.assert_close(found, gate.relu(), rtol=0, atol=1e-30)


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu-tanh", "relu"])
def test_activations_pass_on_what_is_no_number(function: str) -> None:
    gate = torch.tensor([[torch.nan, 2.0]])
    found = launch.gated_activation(gate, torch.ones_like(gate), function)
    assert found.isnan().tolist() == [[True, False]]


def test_what_does_not_fit_is_refused() -> None:
    x, table = numbers(0, 1, 3, 2, 8), numbers(1, 3, 4)
    with pytest.raises(UsageError, match="x has 3 dimensions, not 4"):
        launch.rotary(x[0], table, table)
    with pytest.raises(UsageError, match="2 rows for 3 tokens"):
        launch.rotary(x, table[:2], table[:2])
    with pytest.raises(UsageError, match=r"cos has shape \[3, 5\]"):
        launch.rotary(x, numbers(1, 3, 5), table)
    with pytest.raises(UsageError, match="no activation is called 'swish'"):
        launch.gated_activation(x, x, "swish")
