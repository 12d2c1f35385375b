"""Preserved analyses: kept ones are what they would be if built anew, or the pass is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest
from support import module_of

from lwc.analysis.cost import Cost
from lwc.analysis.manager import Analysis, AnalysisManager
from lwc.analysis.memory import Memory
from lwc.analysis.shapes import Shapes
from lwc.core.errors import VerificationError
from lwc.core.module import Module
from lwc.passes.cleanup.infer_shapes import InferShapes
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult
from lwc.verify.structure.preserved import verify_preserved

TEXT = """
g (float[N, 4] x, bool[N] keep) => (float[?, 8] y) <float[4, 1] w = {1, 2, 3, 4}> {
    n = Neg(x)
    a = Relu(n)
    s = Compress<axis=0>(a, keep)
    d = Concat<axis=0>(s, s)
    y = MatMul(d, w)
}
"""


def make_module() -> Module:
    module = module_of(TEXT)
    weight = module.graph.initializers["w"]
    module.replace_initializer(weight, ir.tensor([[0.5] * 8] * 4, dtype=ir.DataType.FLOAT))
    return module


def find(module: Module, op_type: str) -> ir.Node:
    return next(node for node in module.nodes() if node.op_type == op_type)


class Named(Analysis):
    """Names the operators; two of them can be compared."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    @classmethod
    def build(cls, module: Module, analyses: AnalysisManager) -> Named:
        return cls(tuple(node.op_type for node in module.nodes()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.names == other.names

    __hash__ = None  # type: ignore[assignment]


class Opaque(Analysis):
    """Cannot be compared."""

    @classmethod
    def build(cls, module: Module, analyses: AnalysisManager) -> Opaque:
        return cls()


class Telling(Named):
    """Says what differs."""

    def differs_from(self, other: Telling) -> str | None:
        return None if self == other else f"the second operator is {other.names[1]}"

    @classmethod
    def requires(cls) -> tuple[type[Analysis], ...]:
        return (Shapes,)


def use_tanh(module: Module) -> None:
    """Change an operator; every value keeps its type, shape and place."""
    find(module, "Relu").op_type = "Tanh"


def use_abs(module: Module) -> None:
    """Change an operator to one of the same cost that cannot work in place."""
    find(module, "Relu").op_type = "Abs"


def rename(module: Module) -> None:
    find(module, "Relu").name = "named"


def widen(module: Module) -> None:
    """Give y another width: `w` is another weight."""
    weight = module.graph.initializers["w"]
    module.replace_initializer(weight, ir.tensor([[0.5] * 9] * 4, dtype=ir.DataType.FLOAT))
    module.graph.outputs[0].shape = ir.Shape([None, 9])


def more_rows(module: Module) -> None:
    """Concatenate three instead of two: an extent that nobody knows, times 3."""
    node = find(module, "Concat")
    node.resize_inputs(3)
    node.replace_input_with(2, node.inputs[0])


@pytest.mark.parametrize("kind", [Named, Shapes, Cost, Memory, Telling])
@pytest.mark.parametrize("change", [None, rename])
def test_what_still_holds_is_accepted(
    kind: type[Analysis], change: Callable[[Module], None] | None
) -> None:
    module = make_module()
    analyses = AnalysisManager(module)
    for each in (Shapes, Cost, kind):
        analyses.get(each)
    if change is not None:
        change(module)
    verify_preserved(analyses, [Shapes, Cost, kind])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (Named, use_tanh, "preserve Named, but it is not equal to one built anew"),
        (Telling, use_tanh, "preserve Telling, but the second operator is Tanh"),
        (Opaque, rename, "preserve Opaque, but it cannot be compared with one built anew"),
        (Shapes, widen, r"preserve Shapes, but 'w' is FLOAT \[4, 8\], built anew FLOAT \[4, 9\]"),
        (Shapes, more_rows, r"preserve Shapes, but 'd' is FLOAT \[2\*unk__1, 4\], built anew"),
        (Cost, more_rows, "preserve Shapes, but 'd'"),
        (Cost, use_tanh, "preserve Cost, but the cost of Tanh"),
        (Memory, use_tanh, "preserve Cost, but the cost of Tanh"),
        (Memory, use_abs, "preserve Memory, but the buffer of 'n'"),
    ],
)
def test_what_does_not_hold_is_named(
    kind: type[Analysis], change: Callable[[Module], None], words: str
) -> None:
    module = make_module()
    analyses = AnalysisManager(module)
    analyses.get(kind)
    analyses.get(Shapes)
    change(module)
    with pytest.raises(VerificationError, match=words):
        verify_preserved(analyses, [Memory, kind, Cost, Shapes])


def test_fresh_symbols_go_by_any_name() -> None:
    """The same extents are unknown, in another order of making: nothing differs."""
    module = make_module()
    first, second = Shapes.build(module), Shapes(module)
    for _ in range(5):
        second.fresh()
    for value in module.graph.inputs:
        second.set_fact(value, first.fact(value))
    second.visit(module.graph)
    assert str(first.shape(find(module, "Concat").outputs[0])) != str(
        second.shape(find(module, "Concat").outputs[0])
    )
    assert first.differs_from(second) is None
    assert second.differs_from(first) is None


def test_two_unknown_extents_are_not_one() -> None:
    """An analysis that takes two unknown extents for the same is not the one that tells them."""
    module = module_of("""
    g (float[N] x, bool[N] k, bool[N] l) => (float[?] y, float[?] z) {
        y = Compress<axis=0>(x, k)
        z = Compress<axis=0>(x, l)
    }""")
    right, wrong = Shapes.build(module), Shapes.build(module)
    first, second = (node.outputs[0] for node in module.graph)
    wrong.set_fact(second, wrong.fact(first))
    assert right.differs_from(wrong) is not None
    assert wrong.differs_from(right) is not None


def test_known_content_counts() -> None:
    module = module_of("g (float[N, 4] x) => (int64[2] y) { y = Shape(x) }")
    right, wrong = Shapes.build(module), Shapes.build(module)
    (value,) = module.graph.outputs
    known = right.known(value)
    assert known is not None
    other = known.copy()
    other[1] = 5
    wrong.set_fact(value, right.fact(value)._replace(known=other))
    assert right.differs_from(wrong) == ("'y' is INT64 [2] = {N, 4}, built anew INT64 [2] = {N, 5}")
    wrong.set_fact(value, right.fact(value)._replace(known=None))
    assert right.differs_from(wrong) is not None


def test_what_would_be_dropped_anyway_is_not_compared() -> None:
    """Telling rests on shapes, which nobody claims to preserve."""
    module = make_module()
    analyses = AnalysisManager(module)
    analyses.get(Shapes)
    analyses.get(Telling)
    use_tanh(module)
    verify_preserved(analyses, [Telling])
    assert analyses.surviving([Telling]) == {}


def test_what_is_not_cached_costs_nothing() -> None:
    module = make_module()
    verify_preserved(AnalysisManager(module), [Opaque, Shapes])


@dataclass(frozen=True)
class Claim(Pass):
    """Change something and claim that the analyses hold."""

    name: ClassVar[str] = "claim"
    contract: ClassVar[Exact] = Exact()

    honest: bool = True

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        ctx.analyses.get(Named)
        (rename if self.honest else use_tanh)(module)
        return PassResult(True, preserved=frozenset({Named, Shapes}))


def test_the_manager_checks_the_claim() -> None:
    module = make_module()
    ctx = PassContext(AnalysisManager(module))
    PassManager([Claim()]).run(module, ctx)
    assert set(ctx.analyses.cached()) == {Shapes, Named}
    module = make_module()
    before = module.fingerprint()
    with pytest.raises(VerificationError, match="pass 'claim': it claims to preserve Named, but"):
        PassManager([Claim(honest=False)]).run(module)
    assert module.fingerprint() == before
    PassManager([Claim(honest=False)], verify="none").run(module)


def test_infer_shapes_preserves_what_it_says() -> None:
    module = make_module()
    ctx = PassContext(AnalysisManager(module))
    (record,) = PassManager([InferShapes()]).run(module, ctx).passes
    assert record.changed
    assert ctx.analyses.get(Shapes).differs_from(Shapes.build(module)) is None
