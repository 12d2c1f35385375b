"""Generated graphs are what they claim: well formed, valid ONNX, and they run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from support import module_of, ops, plain_session

from lwc.calibration.feeds import dim_names, make_feed
from lwc.core.module import Module
from lwc.core.printer import print_module
from lwc.verify.generate.motifs import MOTIFS
from lwc.verify.generate.mutant import Mutant
from lwc.verify.generate.mutations import MUTATIONS, Mutation
from lwc.verify.generate.near_misses import mutate, with_near_misses
from lwc.verify.generate.sketch import Motif, Sketch, sketches
from lwc.verify.generate.validity import is_valid, restate
from lwc.verify.structure.well_formed import verify_structure

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

OPSETS = (13, 17, 18, 21, 23)
EXTENTS = ((1, 1), (2, 3))
EXAMPLES = 30
DRAWN = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def feeds_of(module: Module) -> list[dict[str, Any]]:
    """Make a feed at each pair of extents; what is neither batch nor length gets the second."""
    feeds = []
    for batch, length in EXTENTS:
        extents = {name: batch if name == "N" else length for name in dim_names(module)}
        feeds.append(make_feed(module, extents, seed=length))
    return feeds


def check(module: Module) -> None:
    """Check structure, strict ONNX inference and execution; numbers must stay tame."""
    verify_structure(module)
    proto = ir.to_proto(module.model)
    onnx.checker.check_model(proto, full_check=True)
    session = plain_session(proto)
    for feed in feeds_of(module):
        for value, array in zip(module.graph.outputs, session.run(None, feed), strict=True):
            if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                assert not np.isnan(array).any(), f"{value.name} is NaN\n{module}"


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("motif", MOTIFS, ids=lambda motif: motif.name)
def test_motif(motif: Motif, opset: int) -> None:
    counts: Counter[str] = Counter()

    @DRAWN
    @given(st.data())
    def run(data: st.DataObject) -> None:
        counts["drawn"] += 1
        try:
            sketch = Sketch(cast("DrawFn", data.draw), opset)
            made = motif(sketch)
            module = sketch.finish()
        except UnsatisfiedAssumption:
            counts["rejected"] += 1
            raise
        assert made, "a motif returns what later pieces may build on"
        check(module)

    run()
    assert counts["rejected"] <= 0.2 * counts["drawn"], counts


@pytest.mark.parametrize("opset", OPSETS)
def test_sketches(opset: int) -> None:
    @DRAWN
    @given(sketches(MOTIFS, opset=opset))
    def run(module: Module) -> None:
        check(module)

    run()


@DRAWN
@given(st.data(), sketches(MOTIFS, steps=(1, 3)))
def test_near_misses(data: st.DataObject, module: Module) -> None:
    before = module.fingerprint()
    twin = mutate(cast("DrawFn", data.draw), module)
    assert module.fingerprint() == before, "a near miss leaves the graph it comes from alone"
    check(twin)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation(mutation: Mutation) -> None:
    """Each change is made somewhere, changes the graph where it says so, and may be valid."""
    valid = 0

    @settings(DRAWN, max_examples=60)
    @given(st.data(), sketches(MOTIFS, steps=(1, 3)))
    def run(data: st.DataObject, module: Module) -> None:
        nonlocal valid
        if any(node.op_type == "Loop" for node in module.nodes()):
            return  # `mutate` leaves loops alone: a small change, and one never ends
        before = print_module(module)
        twin = module.clone()
        change = mutation(Mutant(cast("DrawFn", data.draw), twin))
        assert print_module(module) == before
        if change is None:
            return
        restate(twin)
        assert print_module(twin) != before, change
        valid += is_valid(twin)

    run()
    assert valid >= 3


def test_a_graph_comes_before_its_near_misses() -> None:
    drawn: list[Module] = []

    @settings(DRAWN, max_examples=20)
    @given(with_near_misses(st.builds(small)))
    def run(module: Module) -> None:
        drawn.append(module)

    run()
    assert ops(drawn[0]) == ["MatMul", "Add"]
    assert len({print_module(module) for module in drawn}) > 5


def small() -> Module:
    return module_of(
        "g (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, "
        "float[2] b = {1, 2}> { p = MatMul(x, w) y = Add(p, b) }"
    )


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N] x, float[S] z) => (float[P] y) { y = Add(x, z) }",
        "g (float[N, 3] x) => (float[N, 3] y) { n = Neg(x) r = Abs(n) y = Log(n) }",
        "g (float[N, 3] x, double[N, 3] z) => (float[N, 3] y) { y = Add(x, z) }",
        "g (float[N, 3] x, float[4] z) => (float[N, 3] y) { y = Add(x, z) }",
    ],
    ids=["extents", "nan", "types", "shapes"],
)
def test_invalid_graphs_are_found_out(text: str) -> None:
    assert is_valid(small())
    assert not is_valid(module_of(text))
