"""--explain: the nearest match, the node it reached, the condition that failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from support import module_of

from lwc.analysis.manager import AnalysisManager
from lwc.cli.opt import main
from lwc.core.errors import PassError
from lwc.pipeline.passes import PassContext
from lwc.pipeline.registry import default_registry
from lwc.rewrite import Editor, Miss, Missed, Outcome, RuleSet, rewrite, rule
from lwc.rewrite.patterns import PatternRule, pattern_rule


def misses(text: str, definition: type[PatternRule], explain: str | None = None) -> list[Missed]:
    module = module_of(text)
    context = PassContext(AnalysisManager(module), source="test-pass", explain=explain)
    done = rewrite(context.editor(), RuleSet([pattern_rule(definition)]))
    assert not done.hits
    return done.missed


class Norm(PatternRule):
    """x / sqrt(mean(x * x) + epsilon) * scale: one operator."""

    def pattern(self, op: Any, x: Any, axes: Any, scale: Any) -> Any:
        square = op.Pow(x, 2.0)
        mean = op.ReduceMean(square, axes, keepdims=1)
        root = op.Sqrt(op.Add(mean, 0.001))
        return op.Mul(op.Div(x, root), scale)

    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
        raise AssertionError("not reached")


def norm(**changes: str) -> str:
    """Write the graph that `Norm` looks for, one line of it changed."""
    lines = {
        "p": "[p] p = Pow(x, two)",
        "m": "[m] m = ReduceMean <keepdims = 1> (p, axes)",
        "a": "[a] a = Add(m, epsilon)",
        "r": "[r] r = Sqrt(a)",
        "d": "[d] d = Div(x, r)",
        "y": "[y] y = Mul(d, w)",
        **changes,
    }
    weights = "int64[1] axes = {-1}, float two = {2}, float three = {3}, float epsilon = {0.001}"
    body = "\n".join(lines.values())
    return (
        "g (float[n, 4] x, float[4] w, float[n, 4] z, float e) => (float[n, 4] y)"
        f" <{weights}> {{\n{body}\n}}"
    )


NEAR = [
    ({"p": "[p] p = Pow(x, three)"}, "p", "expected the constant 2.0, 'three' is 3.0"),
    ({"p": "[p] p = Mul(x, x)"}, "p", "expected Pow, found Mul"),
    ({"p": "[p] p = Pow(z, two)"}, "p", "'x' stands for both 'x' and 'z'"),
    (
        {"m": "[m] m = ReduceMean <keepdims = 0> (p, axes)"},
        "m",
        "expected keepdims=1, it has keepdims=0",
    ),
    ({"m": "[m] m = ReduceMean(p, axes)"}, "m", "expected keepdims=1, it has no keepdims"),
    ({"a": "[a] a = Add(m, e)"}, "a", "expected the constant 0.001, 'e' is a graph input"),
    ({"a": "[a] a = Add(m, two)"}, "a", "expected the constant 0.001, 'two' is 2.0"),
    ({"p": "", "m": "[m] m = ReduceMean <keepdims = 1> (x, axes)"}, "m", "found the graph input"),
    ({"r": "[r] r = Exp(a)"}, "r", "expected Sqrt, found Exp"),
]


@pytest.mark.parametrize(("changes", "node", "reason"), NEAR)
@pytest.mark.parametrize("swap", [False, True])
def test_a_near_miss_names_the_furthest_node_and_the_condition(
    changes: dict[str, str], node: str, reason: str, swap: bool
) -> None:
    if swap:  # the commuted variant gets further than the one as written
        changes = {"y": "[y] y = Mul(w, d)", **changes}
    found = misses(norm(**changes), Norm, explain="'y'" if node == "r" else None)
    (miss,) = [each for each in found if each.root.name == "y"]
    assert miss.node.name == node
    assert reason in miss.reason
    assert miss.rule == "norm"


def test_little_of_a_pattern_is_no_near_miss_unless_someone_asks() -> None:
    text = "g (float[2] x, float[2] w) => (float[2] y) { [e] e = Exp(x)\n [y] y = Mul(e, w) }"
    assert not misses(text, Norm)
    assert not misses(text, Norm, explain="'other'")
    for asked in ("", "'y'", "y", "Mul"):
        (miss,) = misses(text, Norm, explain=asked)
        assert (miss.node.name, miss.reason) == ("e", "expected Div, found Exp")


def test_the_nearest_of_all_roots_is_told_at_its_own_root() -> None:
    text = norm(p="[p] p = Pow(x, three)", y="[other] o = Mul(z, w)\n[y] y = Mul(d, o)")
    (miss,) = misses(text, Norm)
    assert miss.root.name == "y"


def test_a_condition_of_check_outranks_the_structure_of_other_variants() -> None:
    class Product(PatternRule):
        """x * y."""

        def pattern(self, op: Any, x: Any, y: Any) -> Any:
            return op.Mul(x, op.Exp(y))

        def check(self, edit: Editor, **bindings: Any) -> Miss:
            return Miss("never legal", bindings["y"].producer())

        def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
            raise AssertionError("not reached")

    text = "g (float[2] x) => (float[2] y) { [a] a = Abs(x)\n [e] e = Exp(a)\n [y] y = Mul(e, x) }"
    (miss,) = misses(text, Product, explain="")
    assert (miss.reason, miss.node.name) == ("never legal", "a")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda op, x, y: (op.Neg(x), op.Exp(y)), "more than one end"),
        (lambda op, x, y: (op.Neg(op.Exp(x)), op.Exp(x)), "more than one end"),
        (lambda op, x, y: None, "no usable pattern"),
    ],
)
def test_a_pattern_that_no_rule_can_have_is_refused(body: Any, reason: str) -> None:
    class Odd(PatternRule):
        """Wrong."""

        def pattern(self, op: Any, x: Any, y: Any) -> Any:
            return body(op, x, y)

        def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
            raise AssertionError("not reached")

    with pytest.raises(PassError, match=reason):
        pattern_rule(Odd)


def test_declared_roots_must_be_where_the_pattern_ends() -> None:
    class Elsewhere(PatternRule):
        """Says that it starts at Exp."""

        roots = ("Exp",)

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Neg(op.Exp(x))

        def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
            raise AssertionError("not reached")

    module = module_of("g (float[2] x) => (float[2] y) { a = Exp(x)\n y = Neg(a) }")
    context = PassContext(AnalysisManager(module))
    with pytest.raises(PassError, match="starts at Exp, but its pattern ends in Neg"):
        rewrite(context.editor(), RuleSet([pattern_rule(Elsewhere)]))


def test_constants_of_nodes_count_and_defaults_of_inputs_do_not() -> None:
    class Twice(PatternRule):
        """x * 2 = x + x."""

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(x, 2.0)

        def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
            return edit.op("Add", [bindings["x"], bindings["x"]])

    module = module_of(
        "g (float[2] x) => (float[2] y) { c = Constant <value_float = 2.0> ()\n y = Mul(x, c) }"
    )
    context = PassContext(AnalysisManager(module))
    assert rewrite(context.editor(), RuleSet([pattern_rule(Twice)])).hits == {"twice": 1}
    # The caller may feed another number than the initializer says.
    module = module_of("g (float[2] x, float c) => (float[2] y) <float c = {2}> { y = Mul(x, c) }")
    context = PassContext(AnalysisManager(module))
    assert not rewrite(context.editor(), RuleSet([pattern_rule(Twice)])).hits


def test_rules_that_look_and_find_nothing_are_told_on_demand() -> None:
    @rule("Abs")
    def twice_absolute(node: ir.Node, edit: Editor) -> Outcome:
        """abs(abs(x)) = abs(x).

        More about it.
        """
        return None

    text = "g (float[2] x) => (float[2] y) { [a] a = Abs(x)\n [y] y = Exp(a) }"

    def looked(explain: str | None) -> list[Missed]:
        module = module_of(text)
        context = PassContext(AnalysisManager(module), explain=explain)
        return rewrite(context.editor(), RuleSet([twice_absolute])).missed

    assert looked(None) == looked("") == looked("'y'") == []
    (miss,) = looked("'a'")
    assert not miss.near
    assert miss.reason == "looked here and found nothing like it: abs(abs(x)) = abs(x)"


PLUGIN = '''
import lwc


class DoubleNeg(lwc.PatternRule):
    """-(-x) = x."""

    def pattern(self, op, x):
        return op.Neg(op.Neg(x))

    def rewrite(self, edit, x):
        return edit.op("Identity", [x])


@lwc.rule("Neg")
def neg_of_abs(node, edit):
    """-|x|, which some backends compute at once."""
    producer = node.inputs[0].producer()
    if producer is not None and producer.op_type == "Abs":
        return lwc.Miss("this backend does not", producer)


class Negs(lwc.RulePass):
    """Simplify negations."""

    rules = (DoubleNeg, neg_of_abs)
'''

MODEL = """
g (float[2] x) => (float[2] y, float[2] z, float[2] v) {
    [dead_exp] gone = Exp(x)
    [inner] i = Neg(x)
    [outer] y = Neg(i)
    [absolute] a = Abs(x)
    [negated] z = Neg(a)
    [sine] s = Sin(x)
    [lonely] v = Neg(s)
}
"""


@pytest.fixture
def explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    onnx.save(ir.to_proto(module_of(MODEL).model), "in.onnx")
    Path("lwc_test_negs.py").write_text(PLUGIN)

    def run(asked: str, pipeline: str | None = None) -> tuple[int, list[str], str]:
        given = [] if pipeline is None else ["-p", pipeline]
        plugin = "--load-pass-plugin=lwc_test_negs.py"
        default_registry.cache_clear()
        code = main(["in.onnx", plugin, "-q", *given, f"--explain={asked}"])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    yield run
    default_registry.cache_clear()


def test_every_rule_at_a_node_is_told_of(explain: Any) -> None:
    code, lines, _ = explain("negs@lonely")
    assert code == 0
    assert lines[0].startswith("negs: changed the module")
    assert "  double-neg: expected Neg, found Sin" in lines
    assert "    at Sin 'sine', reached from Neg 'lonely'" in lines
    assert (
        "  neg-of-abs: looked here and found nothing like it: "
        "-|x|, which some backends compute at once" in lines
    )
    assert "    at Neg 'lonely'" in lines


def test_a_near_miss_is_told_from_both_ends(explain: Any) -> None:
    for name in ("negated", "absolute"):
        _, lines, _ = explain(f"negs@{name}")
        assert "  neg-of-abs: this backend does not" in lines
        assert "    at Abs 'absolute', reached from Neg 'negated'" in lines


def test_what_was_rewritten_or_removed_at_a_node_is_told(explain: Any) -> None:
    _, lines, _ = explain("negs@outer")
    assert lines[lines.index("applied:") + 1 :][:2] == [
        "  double-neg: applied here",
        "    at Neg 'outer'",
    ]
    _, lines, _ = explain("negs@dead_exp")
    assert "  dead-code: applied here" in lines
    _, lines, _ = explain("negs@inner")
    assert "  nothing about Neg 'inner': negs removed it where nothing read it any more" in lines


def test_a_node_no_rule_looks_at_is_told_so(explain: Any) -> None:
    _, lines, _ = explain("negs@sine")
    assert "    at Sin 'sine', reached from Neg 'lonely'" in lines
    _, lines, _ = explain("infer-shapes@sine")
    assert "  nothing about Sin 'sine': no rule of infer-shapes starts there" in lines


def test_without_a_node_everything_is_grouped(explain: Any) -> None:
    _, lines, _ = explain("negs")
    assert "       1 x double-neg" in lines
    assert "  double-neg: expected Neg, found Sin" in lines
    assert not any("looked here" in line for line in lines)


def test_a_node_that_is_not_there_gets_the_nearest_names(explain: Any) -> None:
    code, lines, err = explain("negs@lonly")
    assert (code, lines) == (2, [])
    assert "no node has 'lonly' in its name" in err
    assert "did you mean 'lonely'?" in err
    code, _, err = explain("negs@qqqqqqqqqqqq")
    assert code == 2
    assert "there are 'dead_exp', 'gone', 'inner' …" in err


def test_a_node_that_an_earlier_pass_removed_is_told_so(explain: Any) -> None:
    code, _, err = explain("infer-shapes@dead_exp", "canonicalize,infer-shapes")
    assert code == 2
    assert "no node 'dead_exp' is left where infer-shapes runs" in err
    assert "pass 1, canonicalize, removed or renamed it: --explain=canonicalize@dead_exp" in err


def test_a_node_goes_by_its_outputs_too(explain: Any) -> None:
    _, lines, _ = explain("negs@v")
    assert any("Neg 'lonely'" in line for line in lines)
