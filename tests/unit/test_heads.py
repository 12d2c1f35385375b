"""Views of heads: what they say is what numpy's reshape, transpose and broadcast do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.core.module import Module
from lwc.passes.attention.heads import View, find_heads, views
from lwc.pipeline.passes import PassContext
from lwc.rewrite import Editor

Array = np.ndarray[Any, Any]


def editor(module: Module) -> Editor:
    return PassContext(AnalysisManager(module), source="test").editor()


def through(view: View, source: Array) -> Array:
    """Gather the elements that a view says its value has, axis by axis."""
    axes = [[piece.extent for piece in axis] for axis in view]
    grid = np.indices([int(extent) for axis in axes for extent in axis]).astype(int)
    places: list[Any] = [0] * source.ndim
    counted = iter(grid)
    for axis in view:
        for piece in axis:
            at = next(counted)
            if piece.axis is not None:
                places[piece.axis] = places[piece.axis] + at * int(piece.stride)
    whole = np.broadcast_arrays(*places, grid[0] if len(grid) else np.zeros(()))[:-1]
    shape = [int(np.prod(axis, dtype=int)) for axis in axes]
    return np.asarray(source[tuple(whole)]).reshape(shape)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], list[str], Array, Array]:
    """Draw a shape, the text of view operators on it, and numpy's result of them."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    source = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    value, lines, constants = source, [], []
    for n in range(draw(st.integers(1, 5))):
        name = f"v{n}"
        before = f"v{n - 1}" if n else "x"
        form = draw(st.sampled_from(["transpose", "reshape", "unsqueeze", "expand"]))
        if form == "transpose":
            perm = draw(st.permutations(range(value.ndim)))
            value = value.transpose(perm)
            lines.append(f"{name} = Transpose <perm = {list(perm)}> ({before})")
            continue
        if form == "expand":
            target = [draw(st.sampled_from([2, 3])) if d == 1 else d for d in value.shape]
            value = np.broadcast_to(value, target)
            op = "Expand"
        elif form == "unsqueeze":
            target = [draw(st.integers(0, value.ndim))]
            value = np.expand_dims(value, target[0])
            op = "Unsqueeze"
        else:
            target = draw(st.sampled_from(_factored(value.size)))
            value = value.reshape(target)
            op = "Reshape"
        count = len(target)
        constants.append(f"int64[{count}] c{n} = {{{', '.join(map(str, target))}}}")
        lines.append(f"{name} = {op} ({before}, c{n})")
    last = f"v{len(lines) - 1}"
    dims = ", ".join(map(str, shape))
    out = ", ".join(map(str, value.shape))
    given = f"<{', '.join(constants)}> " if constants else ""
    body = "\n".join(lines)
    text = f"g (float[{dims}] x) => (float[{out}] {last}) {given}{{ {body} }}"
    return shape, [text], source, value


def _factored(size: int) -> list[list[int]]:
    return [[size], *([a, size // a] for a in (2, 3, 4) if size % a == 0)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(chains())
def test_views_agree_with_numpy(drawn: tuple[list[int], list[str], Array, Array]) -> None:
    _, (text,), source, wanted = drawn
    module = module_of(text)
    edit = editor(module)
    (output,) = module.graph.outputs
    for value, view in views(output, edit):
        if value.name == "x":
            np.testing.assert_array_equal(through(view, source), wanted)


FLAT = """g (float[N, S, 16] x) => (float[N, 4, S, 8] y)
<int64[4] a = {0, 0, 2, 8}, int64[1] axis = {2}, int64[5] times = {1, 1, 2, 1, 1},
 int64[4] b = {0, 4, -1, 8}>
{ apart = Reshape (x, a)  heads = Transpose <perm = [0, 2, 1, 3]> (apart)
  one = Unsqueeze (heads, axis)  two = Expand (one, times)  y = Reshape (two, b) }"""


def test_repeated_heads_are_found_before_they_are_repeated() -> None:
    module = module_of(FLAT)
    found = find_heads(module.graph.outputs[0], editor(module))
    assert found is not None
    assert (found.value.name, found.layout) == ("x", "flat")
    assert (found.heads, found.repeats, found.size) == (2, 2, 8)


def test_heads_repeated_in_turns_are_heads_of_their_own() -> None:
    text = FLAT.replace("axis = {2}", "axis = {1}").replace("1, 1, 2, 1, 1", "1, 2, 1, 1, 1")
    module = module_of(text)
    found = find_heads(module.graph.outputs[0], editor(module))
    assert found is not None
    assert (found.heads, found.repeats, found.layout) == (4, 1, "apart")
    assert found.value is module.graph.outputs[0]


@pytest.mark.parametrize(("turned", "layout"), [(False, "apart"), (True, "turned")])
def test_heads_of_an_input(turned: bool, layout: str) -> None:
    module = module_of("g (float[N, 2, 3, 8] x) => (float[N, 2, 3, 8] y) { y = Tanh (x) }")
    found = find_heads(module.graph.inputs[0], editor(module), turned=turned)
    assert found is not None
    assert (found.layout, found.heads) == (layout, 2)
    assert found.size == (3 if turned else 8)
