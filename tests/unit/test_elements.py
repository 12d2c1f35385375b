"""Elements: what one element of a value is, whatever operators made it."""

from __future__ import annotations

import math

import pytest
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.core.dims import integer, subtract
from lwc.passes.attention.elements import (
    AtMost,
    Both,
    Element,
    Elements,
    Index,
    Never,
    Number,
    Read,
    Select,
)
from lwc.pipeline.passes import PassContext

ROW, COLUMN = integer("i"), integer("j")
CAUSAL = AtMost(subtract(COLUMN, ROW))


def element(body: str, *, constants: str = "", opset: int = 18) -> Element:
    """Return what `y[i, j]` is, where `body` makes y, `[S, S]`, of `x` and `mask`."""
    given = "int64 zero = {0}, int64 one = {1}, int64[1] axis1 = {1}, float low = {-1e9}, "
    given += "float nought = {0}" + (f", {constants}" if constants else "")
    module = module_of(
        f"""g (float[S, S] x, int64[S] mask) => (float[S, S] out) <{given}> {{
        length = Shape (mask)  last = Squeeze (length)
        keys = Range (zero, last, one)  rows = Unsqueeze (keys, axis1)
        {body}
        z = Cast <to = 1> (y)  out = Add (x, z) }}""",
        opset=opset,
    )
    edit = PassContext(AnalysisManager(module), source="test").editor()
    (value,) = (v for node in module.nodes() for v in node.outputs if v.name == "y")
    return Elements(edit).at(value, (ROW, COLUMN))


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("y = LessOrEqual (keys, rows)", CAUSAL),
        ("y = GreaterOrEqual (rows, keys)", CAUSAL),
        ("later = Greater (keys, rows)  y = Not (later)", CAUSAL),
        ("after = Add (rows, one)  y = Less (keys, after)", CAUSAL),
        ("y = Sub (rows, keys)", Index(subtract(ROW, COLUMN))),
        ("ok = LessOrEqual (keys, rows)  y = Where (ok, nought, low)", Select(CAUSAL, 0.0, -1e9)),
        (
            "ok = LessOrEqual (keys, rows)  one_or = Cast <to = 1> (ok)  y = Mul (one_or, low)",
            Select(CAUSAL, -1e9, 0.0),
        ),
        (
            "ok = LessOrEqual (keys, rows)  some = Where (ok, nought, low)\n"
            "y = Cast <to = 10> (some)",
            Select(CAUSAL, 0.0, -math.inf),
        ),
    ],
)
def test_what_an_element_is(body: str, wanted: Element) -> None:
    assert element(body) == wanted


def test_padding_is_read_through_gathers() -> None:
    body = """ok = LessOrEqual (keys, rows)  seen = Gather (mask, keys)
    real = Cast <to = 9> (seen)  y = And (ok, real)"""
    found = element(body)
    assert isinstance(found, Both)
    causal, read = found.terms
    assert causal == CAUSAL
    assert isinstance(read, Read)
    assert (read.value.name, read.index, read.nonzero) == ("mask", (COLUMN,), True)


def test_a_triangle_of_constants() -> None:
    body = "shape = Shape (x)  full = ConstantOfShape (shape)  y = Trilu <upper = 0> (full)"
    found = element(body)
    assert isinstance(found, Select)
    assert (found.condition, found.yes, found.no) == (CAUSAL, 0.0, 0.0)


def test_maps_that_hide_are_added() -> None:
    """Where both hide, the number is their sum: the lowest twice is minus infinity."""
    body = """ok = LessOrEqual (keys, rows)  a = Where (ok, nought, lowest)
    back = LessOrEqual (rows, keys)  b = Where (back, nought, lowest)  y = Add (a, b)"""
    found = element(body, constants="float lowest = {-3.4028234663852886e38}")
    other = AtMost(subtract(ROW, COLUMN))
    assert found == Select(Both((CAUSAL, other)), 0.0, -math.inf)


def test_indices_below_zero_count_from_the_end() -> None:
    body = "both = Concat <axis = 0> (zeros, ones)  n = Gather (both, minus)  y = Add (n, x)"
    constants = "int64 minus = {-1}, float[1] zeros = {0}, float[1] ones = {1}"
    found = element(body.replace("y = Add (n, x)", "y = Expand (n, shape)  ").replace(
        "both =", "shape = Shape (x)  both ="
    ), constants=constants)  # fmt: skip
    assert found == Number(1.0)


JOINED = """flat = Flatten <axis = 2> (x)  far = Mul ({far}, step)  places = Add ({near}, far)
    got = Gather (flat, places)  y = Squeeze (got, axis2)"""
"""As TorchScript writes x[i, j] with tensors for i and j: the place in memory order."""


@pytest.mark.parametrize(
    ("far", "near", "index"), [("rows", "keys", (ROW, COLUMN)), ("keys", "rows", (COLUMN, ROW))]
)
def test_places_in_joined_axes_are_taken_apart(far: str, near: str, index: object) -> None:
    body = "step = Identity (last)  " + JOINED.format(far=far, near=near)
    found = element(body, constants="int64[1] axis2 = {2}")
    assert isinstance(found, Read)
    assert (found.value.name, found.index) == ("x", index)


def test_places_that_are_no_index_of_each_axis_are_left() -> None:
    """x[i, j] is at i·S + j; 2i + j is elsewhere."""
    body = JOINED.format(far="rows", near="keys")
    found = element(body, constants="int64[1] axis2 = {2}, int64 step = {2}")
    assert isinstance(found, Read)
    assert found.value.name == "flat"


def test_a_reshape_that_joins_axes_is_not_taken_for_one_that_does_not() -> None:
    """Element j of a flattened value is not element j of its last axis."""
    body = """flat = Reshape (x, minus1)  part = Slice (flat, begin, length)
    shape = Shape (x)  y = Expand (part, shape)"""
    found = element(body, constants="int64[1] minus1 = {-1}, int64[1] begin = {0}")
    assert isinstance(found, Read)
    assert found.value.name != "x"


def test_what_is_not_understood_is_read_as_it_is() -> None:
    found = element("y = Exp (x)")
    assert isinstance(found, Read)
    assert found.value.name == "y"


def test_not_of_a_disjoint_condition() -> None:
    found = element("real = Cast <to = 9> (x)  y = Not (real)")
    assert isinstance(found, Never)
