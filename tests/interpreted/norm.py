"""Norms in the interpreter against torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lwc.backends.triton import launch
from lwc.backends.triton.architectures import nearest
from lwc.backends.triton.kernels.norm import norm_operation
from lwc.core.errors import UsageError

# One rounding of a result below 8 in magnitude: half a unit in the last place.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
TYPES = st.sampled_from(list(ROUNDING))


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).clamp(-2, 2).to(dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 700), dtype=TYPES, weighted=st.booleans(),
    biased=st.booleans(), residual=st.booleans(), centred=st.booleans(),
)  # fmt: skip
def test_norms_equal_torch(
    *, rows: int, columns: int, dtype: torch.dtype, weighted: bool, biased: bool, residual: bool,
    centred: bool,
) -> None:  # fmt: skip
    x, other = numbers(0, rows, columns, dtype=dtype), numbers(1, rows, columns, dtype=dtype)
    weight = numbers(2, columns, dtype=dtype) if weighted else None
    bias = numbers(3, columns, dtype=dtype) if biased else None
    total = x + other if residual else x
    exact = total.double()
    wide = [None if t is None else t.double() for t in (weight, bias)]
    given_residual = other if residual else None
    if centred:
        expected = torch.nn.functional.layer_norm(exact, (columns,), *wide, eps=1e-5)
        found = launch.layer_norm(x, weight, bias, residual=given_residual)
    else:
        expected = torch.nn.functional.rms_norm(exact, (columns,), wide[0], eps=1e-6)
        found = launch.rms_norm(x, weight, residual=given_residual)
    if residual:
        found, summed = found
        torch.testing.assert_close(summed, total, rtol=0, atol=0)
    assert found.dtype == dtype
    # bfloat16 is computed from the exact sum here, and by torch from the rounded one.
    bound = ROUNDING[dtype] * (2 if dtype == torch.bfloat16 and residual else 1)
    scale = max(1.0, float(expected.abs().max()) / 8)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * scale)


def test_the_norm_is_that_of_the_stored_sum() -> None:
    """2049 is no number of float16, and without it the row has no variance."""
    x, residual = torch.full((1, 2), 2048.0).half(), torch.tensor([[1.0, 0.0]]).half()
    found, total = launch.layer_norm(x, None, residual=residual)
    assert total.tolist() == [[2048.0, 2048.0]]
    assert found.tolist() == [[0.0, 0.0]]


def test_rows_need_not_lie_side_by_side() -> None:
    wide = numbers(0, 2, 3, 64)
    expected = torch.nn.functional.rms_norm(wide[..., :24], (24,), eps=1e-6)
    torch.testing.assert_close(launch.rms_norm(wide[..., :24], None), expected)
    whole = numbers(1, 2, 3, 24)
    expected = torch.nn.functional.rms_norm(wide[..., :24] + whole, (24,), eps=1e-6)
    for x, residual in ((wide[..., :24], whole), (whole, wide[..., :24])):
        torch.testing.assert_close(launch.rms_norm(x, None, residual=residual)[0], expected)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_what_lies_beside_a_tensor_is_not_touched_unseen(name: str) -> None:
    """Tests of kernels rely on it."""
    x = numbers(0, 4, 8)[:2, :7]
    operation = norm_operation(x, None, None, None, nearest(80), eps=1e-6, centred=False)
    (made,) = operation.prepare(operation.candidates[0])
    made.run()
    more = {**made.arguments, name: made.arguments[name] + 1}
    with pytest.raises(Exception, match="touches what is no element of its tensors"):
        replace(made, arguments=more).run()


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = numbers(0, 2, 8)
    with pytest.raises(UsageError, match=r"weight has shape \[7\], not \[8\]"):
        launch.rms_norm(x, numbers(0, 7))
    with pytest.raises(UsageError, match=r"residual has shape \[2, 7\]"):
        launch.rms_norm(x, None, residual=numbers(0, 2, 7))
    with pytest.raises(UsageError, match="float64"):
        launch.rms_norm(x.double(), None)
    with pytest.raises(UsageError, match="longer than"):
        launch.rms_norm(numbers(0, 1, 16385), None)
