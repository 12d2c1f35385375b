"""From a rule, the graphs that it should rewrite are found, and graphs that nearly are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support import ops

from lwc.analysis.shapes import Shapes
from lwc.core.errors import LwcError, PassError
from lwc.core.module import Module
from lwc.core.printer import print_module
from lwc.rewrite.driver import rewrite
from lwc.rewrite.editor import Editor
from lwc.rewrite.patterns import PatternRule, pattern_rule
from lwc.rewrite.rules import Miss, RuleSet
from lwc.verify.generate.motifs import MOTIFS
from lwc.verify.generate.patterns import matching, pattern_motif
from lwc.verify.generate.sketch import sketches
from lwc.verify.generate.validity import is_valid

DRAWN = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class SigmoidGate(PatternRule):
    """x * sigmoid(x)."""

    def pattern(self, op: Any, x: Any) -> Any:
        return x * op.Sigmoid(x)

    def rewrite(self, edit: Editor, x: ir.Value) -> ir.Value:
        return edit.op("Mul", [edit.op("Sigmoid", [x]), edit.op("Identity", [x])])


class BiasedProduct(PatternRule):
    """A linear layer: constant weights of rank 2 and a bias of rank 1, as the check wants."""

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias)

    def check(self, edit: Editor, **bindings: Any) -> Miss | None:
        x, weight, bias = (bindings[name] for name in ("x", "weight", "bias"))
        if edit.rank(x) != 2:
            return Miss("not a matrix")
        if not edit.is_constant(weight) or edit.rank(weight) != 2:
            return Miss("the weight is no constant matrix")
        if edit.rank(bias) != 1:
            return Miss("the bias is no row")
        return None

    def rewrite(self, edit: Editor, x: ir.Value, weight: ir.Value, bias: ir.Value) -> ir.Value:
        return edit.op("Gemm", [x, weight, bias])


class RmsNorm(PatternRule):
    """RMSNorm with the axis as an input: only at opset 18 and above."""

    def pattern(self, op: Any, x: Any, axes: Any, epsilon: Any, weight: Any) -> Any:
        square = op.Pow(x, 2.0)
        mean = op.ReduceMean(square, axes, keepdims=1)
        inverse = op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))
        return op.Mul(op.Mul(x, inverse), weight)

    def check(self, edit: Editor, **bindings: Any) -> Miss | None:
        if edit.ints(bindings["axes"]) != [-1]:
            return Miss("not over the last axis")
        if edit.scalar(bindings["epsilon"]) is None:
            return Miss("epsilon is no constant number")
        return None

    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
        x = bindings["x"]
        square = edit.op("Mul", [x, x])
        mean = edit.op("ReduceMean", [square, bindings["axes"]], {"keepdims": 1})
        root = edit.op("Sqrt", [edit.op("Add", [mean, bindings["epsilon"]])])
        return edit.op("Mul", [edit.op("Div", [x, root]), bindings["weight"]])


class TwoTransposes(PatternRule):
    """Attributes as variables."""

    def pattern(self, op: Any, x: Any, first: Any, second: Any) -> Any:
        return op.Transpose(op.Transpose(x, perm=first), perm=second)

    def rewrite(self, edit: Editor, x: ir.Value, first: ir.Attr, second: ir.Attr) -> ir.Value:
        inner, outer = first.as_ints(), second.as_ints()
        return edit.op("Transpose", [x], {"perm": [inner[axis] for axis in outer]})


class NormalizedConvolution(PatternRule):
    """Many operands that must go together."""

    def pattern(self, op: Any, x: Any, w: Any, b: Any, s: Any, mean: Any) -> Any:  # noqa: PLR0917
        return op.BatchNormalization(op.Conv(x, w, b), s, b, mean, s)

    def rewrite(self, edit: Editor, **bindings: Any) -> Miss:
        return Miss("only found")


class EitherSquash(PatternRule):
    """Alternatives."""

    def pattern(self, op: Any, x: Any) -> Any:
        from onnxscript.rewriter import pattern as language

        return op.Relu(language.OrValue([op.Tanh(x), op.Sigmoid(x)], name="squashed"))

    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
        value: ir.Value = bindings["squashed"]
        return edit.op("Identity", [value])


class Nonsense(PatternRule):
    """An operator that does not exist."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Nonsense(x)

    def rewrite(self, edit: Editor, x: ir.Value) -> ir.Value:
        return x


REWRITING = (SigmoidGate, BiasedProduct, RmsNorm, TwoTransposes, EitherSquash)


def hits(rule: type[PatternRule], module: Module) -> int:
    twin = module.clone()
    done = rewrite(Editor(twin, Shapes.build(twin), "test"), RuleSet([pattern_rule(rule)]))
    return sum(done.hits.values())


@pytest.mark.parametrize("rule", REWRITING)
def test_matching_graphs_are_valid_and_rewritten(rule: type[PatternRule]) -> None:
    counts: Counter[str] = Counter()

    @DRAWN
    @given(matching(rule, near_misses=0))
    def run(module: Module) -> None:
        assert is_valid(module)
        onnx.checker.check_model(ir.to_proto(module.model), full_check=True)
        found = hits(rule, module)
        counts["drawn"] += 1
        counts["rewritten"] += found > 0
        counts["twice"] += found > 1

    run()
    assert counts["rewritten"] >= 0.7 * counts["drawn"], counts
    assert counts["twice"] >= 3, counts


@pytest.mark.parametrize("rule", [SigmoidGate, BiasedProduct])
def test_near_misses_of_matches(rule: type[PatternRule]) -> None:
    texts: set[str] = set()
    found: Counter[bool] = Counter()

    @settings(DRAWN, max_examples=100)
    @given(matching(rule, evenly=True))
    def run(module: Module) -> None:
        assert is_valid(module)
        texts.add(print_module(module))
        found[hits(rule, module) > 0] += 1

    run()
    assert min(found[True], found[False]) > 5, found
    assert len(texts) > 20


def test_operands_that_must_go_together() -> None:
    @settings(DRAWN, max_examples=10)
    @given(matching(NormalizedConvolution, near_misses=0))
    def run(module: Module) -> None:
        assert {"Conv", "BatchNormalization"} <= set(ops(module))

    run()


def test_both_alternatives_are_made() -> None:
    seen: set[str] = set()

    @DRAWN
    @given(matching(EitherSquash, near_misses=0))
    def run(module: Module) -> None:
        seen.update(ops(module))

    run()
    assert {"Tanh", "Sigmoid", "Relu"} <= seen


def test_the_axes_are_an_input_only_where_the_opset_has_it() -> None:
    opsets: set[int] = set()

    @DRAWN
    @given(matching(RmsNorm, near_misses=0))
    def run(module: Module) -> None:
        opsets.add(module.opset)

    run()
    assert len(opsets) > 1
    assert min(opsets) >= 18


def test_an_operator_that_only_onnx_runtime_has_is_left_out() -> None:
    class NormalizedSum(PatternRule):
        def pattern(self, op: Any, x: Any, y: Any, scale: Any) -> Any:
            return op.LayerNormalization(op.Add(x, y), scale, axis=-1)

        def rewrite(self, edit: Editor, **bindings: Any) -> Miss:
            return Miss("only found")

    @DRAWN
    @given(matching(NormalizedSum, near_misses=0))
    def run(module: Module) -> None:
        assert module.opset >= 17

    run()


def test_a_pattern_is_a_motif() -> None:
    found: Counter[bool] = Counter()

    @DRAWN
    @given(sketches([*MOTIFS[:3], *[pattern_motif(SigmoidGate)] * 3], steps=(2, 3), opset=18))
    def run(module: Module) -> None:
        found[hits(SigmoidGate, module) > 0] += 1

    run()
    assert found[True] > 10


def test_searches_are_the_same_each_time() -> None:
    def drawn() -> list[str]:
        texts: list[str] = []

        @settings(DRAWN, max_examples=15)
        @given(matching(BiasedProduct, opset=18))
        def run(module: Module) -> None:
            texts.append(print_module(module))

        run()
        return texts

    assert drawn() == drawn()


def test_where_nothing_is_found_the_error_says_what_to_give() -> None:
    @DRAWN
    @given(matching(Nonsense, opset=18))
    def run(module: Module) -> None:
        raise AssertionError(module)

    with pytest.raises(LwcError, match=r"rule 'nonsense' matches .*give graphs="):
        run()


def test_what_is_no_rule_is_refused_at_once() -> None:
    class Empty(PatternRule):
        def rewrite(self, edit: Editor, **bindings: Any) -> Miss:
            return Miss("")

    with pytest.raises(PassError, match="pattern"):
        matching(Empty)


def test_constants_keep_their_types() -> None:
    class Halved(PatternRule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(op.Tanh(x), 0.5)

        def rewrite(self, edit: Editor, x: ir.Value) -> ir.Value:
            return edit.op("Tanh", [x])

    kinds: set[ir.DataType | None] = set()

    @DRAWN
    @given(matching(Halved, near_misses=0, opset=18))
    def run(module: Module) -> None:
        for node in module.graph:
            if node.op_type == "Mul":
                numbers = [v.const_value for v in node.inputs if v is not None and v.const_value]
                kinds.update(tensor.dtype for tensor in numbers)
                assert all(np.isclose(tensor.numpy(), 0.5) for tensor in numbers)

    run()
    assert ir.DataType.FLOAT in kinds
