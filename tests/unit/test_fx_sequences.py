"""Sequences in PyTorch, beside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from fx_agreement import assert_agrees, one_node, parsed, run_fx
from support import ops, run_pass_to_the_end, run_plain

from lwc.core.errors import LwcError
from lwc.passes.cleanup.canonicalize import Canonicalize

X = np.arange(6, dtype=np.float32).reshape(3, 2)


def of_three(op: str, place: str, result: str) -> Any:
    given = "s, x, i" if op == "SequenceInsert" else "s, i"
    return parsed(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float[3, 2] x) => ({result} y)
            <int64{place}> {{
                m = Neg(x) k = Exp(x) s = SequenceConstruct(x, m, k) y = {op}({given})
            }}"""
    )


RESULTS = {
    "SequenceAt": "float[3, 2]",
    "SequenceInsert": "seq(float)",
    "SequenceErase": "seq(float)",
}


@pytest.mark.parametrize("place", [" i = {1}", "[1] i = {1}", "[1] i = {-3}", "[2] i = {2, 1}"])
@pytest.mark.parametrize("op", RESULTS)
def test_places_that_are_vectors(op: str, place: str) -> None:
    assert_agrees(of_three(op, place, RESULTS[op]), {"x": X})


@pytest.mark.parametrize("place", [4, -4])
@pytest.mark.parametrize("op", RESULTS)
def test_places_that_are_none(op: str, place: int) -> None:
    module = of_three(op, f" i = {{{place}}}", RESULTS[op])
    with pytest.raises(Exception, match="Invalid sequence index"):
        run_plain(module, {"x": X})
    with pytest.raises(LwcError, match=rf"{op} -> 'y': a sequence of 3 has no place {place}"):
        run_fx(module, {"x": X})


@pytest.mark.parametrize("split", [None, 1, 2, 5])
def test_a_cut_of_nothing_has_no_parts(split: int | None) -> None:
    given = {"x": X[:0], "split": None if split is None else np.array(split)}
    module, feed = one_node("SplitToSequence", given, constant=["split"])
    (parts,) = assert_agrees(module, feed)
    assert parts == []


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("split", [None, 1, [1, 1, 1], [2, 1]])
def test_cuts_without_their_axis(split: Any, constant: bool) -> None:
    """Also by a scalar of 1, which the standard says keeps it."""
    given = {"x": X, "split": None if split is None else np.array(split)}
    module, feed = one_node(
        "SplitToSequence", given, constant=["split"] if constant else (), keepdims=0
    )
    assert_agrees(module, feed)


def test_canonicalize_keeps_a_cut_that_drops_its_axis() -> None:
    module = parsed(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[3, 2] x) => (float[n] y)
            <int64 one = {1}, int64 i = {1}> {
                s = SplitToSequence<keepdims = 0>(x, one) y = SequenceAt(s, i)
            }"""
    )
    assert_agrees(module, {"x": X})
    run_pass_to_the_end(Canonicalize(), module)
    assert "Split" not in ops(module)
    np.testing.assert_array_equal(run_plain(module, {"x": X})[0], X[1])


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_map_over_nothing(outputs: int) -> None:
    more = ", v" if outputs > 1 else ""
    body = (
        f"b (float e) => (float f{', float h' if outputs > 1 else ''}) {{ f = Neg(e) h = Exp(e) }}"
    )
    module = parsed(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float[3, 2] x) => (int64 y) {{
            s = SequenceEmpty<dtype = 1>() u{more} = SequenceMap<body = {body}>(s)
            y = SequenceLength({"v" if outputs > 1 else "u"})
        }}"""
    )
    assert_agrees(module, {"x": X})
