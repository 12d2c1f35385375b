"""Passes as other people write them: pattern rules, functions over the module, full classes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import module_of, ops, run_pass_to_the_end, run_plain

import lwc
from lwc.analysis.manager import AnalysisManager
from lwc.cli.opt import main
from lwc.core.errors import PassError, UsageError
from lwc.core.module import Module
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Approximate, Pass, PassContext, PassResult
from lwc.pipeline.registry import Registry, default_registry, describe_pass
from lwc.pipeline.rule_pass import AnyRule
from lwc.pipeline.spec import to_spec
from lwc.rewrite import Editor, Outcome
from lwc.verify.structure.well_formed import verify_structure


class QuickGelu(lwc.PatternRule):
    """x * sigmoid(x * alpha) = QuickGelu(x)."""

    def pattern(self, op: Any, x: Any, alpha: Any) -> Any:
        return op.Mul(x, op.Sigmoid(op.Mul(x, alpha)))

    def check(self, edit: Editor, x: ir.Value, alpha: ir.Value) -> dict[str, Any] | lwc.Miss:
        factor = edit.scalar(alpha)
        if factor is None:
            return lwc.Miss("the factor is no constant number", alpha.producer())
        return {"factor": float(factor)}

    def rewrite(self, edit: Editor, x: ir.Value, alpha: ir.Value, factor: float) -> ir.Value:
        return edit.op("QuickGelu", [x], {"alpha": factor}, domain="com.microsoft")


class FuseQuickGelu(lwc.RulePass):
    """Fuse x * sigmoid(x * alpha) into one operator."""

    rules = (QuickGelu,)


GELU = (
    "g (float[2] x, float e) => (float[2] y, float[2] z) <float a = {1.5}, float unread = {0}> {"
    " s = Mul(a, x)\n t = Sigmoid(s)\n y = Mul(t, x)\n dead = Exp(x)"
    " u = Mul(e, x)\n v = Sigmoid(u)\n z = Mul(v, x) }"
)


def test_a_pass_of_a_pattern_rule() -> None:
    module = module_of(GELU)
    feed = {"x": np.array([-1.5, 2.0], np.float32), "e": np.array(0.5, np.float32)}
    wanted = run_plain(module, feed)
    assert (FuseQuickGelu.name, QuickGelu.name) == ("fuse-quick-gelu", "quick-gelu")
    result = run_pass_to_the_end(FuseQuickGelu(), module)
    assert sorted(ops(module)) == ["Mul", "Mul", "QuickGelu", "Sigmoid"]
    assert result.rewrites == {"quick-gelu": 1}
    assert result.statistics == {"dead-code": 1, "unused-initializers": 2}
    assert module.graph.opset_imports["com.microsoft"] == 1
    missed = [remark for remark in module.remarks if remark.kind == "missed"]
    assert {remark.message for remark in missed} == {"the factor is no constant number"}
    for after, before in zip(run_plain(module, feed), wanted, strict=True):
        # Both compute one sigmoid and two products in float32.
        np.testing.assert_allclose(after, before, rtol=4e-7)


def test_a_rule_pass_that_finds_nothing_says_so() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert not run_pass_to_the_end(FuseQuickGelu(), module).changed
    assert "nothing to rewrite" in {remark.message for remark in module.remarks}


@lwc.rule("Neg")
def neg_of_neg(node: ir.Node, edit: Editor) -> Outcome:
    """-(-x) = x."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Neg" else None


def test_rules_of_every_kind_go_together() -> None:
    class Mixed(lwc.RulePass):
        """A function, a class and an instance."""

        name: ClassVar[str] = "mixed-up"
        rules = (neg_of_neg, QuickGelu, QuickGelu())

    module = module_of("g (float[2] x) => (float[2] y) { a = Neg(x)\n b = Neg(a)\n y = Exp(b) }")
    assert Mixed.name == "mixed-up"
    assert run_pass_to_the_end(Mixed(), module).rewrites == {"neg-of-neg": 1}
    assert ops(module) == ["Exp"]


@dataclass(frozen=True)
class ScaleNegs(lwc.RulePass):
    """A rule that depends on an option."""

    contract: ClassVar[Approximate] = Approximate(rtol=1.0, atol=1.0)

    factor: float = -1.0

    def find_rules(self) -> list[AnyRule]:
        """Make the rule."""

        def scale(node: ir.Node, edit: Editor) -> Outcome:
            constant = edit.constant(np.array(self.factor, np.float32))
            return edit.op("Mul", [node.inputs[0], constant])

        return [lwc.Rule("scale", ("Neg",), scale)]


def test_rules_may_depend_on_options() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    run_pass_to_the_end(ScaleNegs(factor=-2.0), module)
    (constant,) = module.graph.initializers.values()
    assert constant.const_value is not None
    assert constant.const_value.numpy() == -2.0
    assert to_spec(ScaleNegs(factor=-2.0)) == "scale-negs{factor=-2.0}"


def test_a_pattern_may_end_in_any_output_of_its_last_node() -> None:
    class Second(lwc.PatternRule):
        """Where the least are: where the greatest of the negated are."""

        def pattern(self, op: Any, x: Any, k: Any) -> Any:
            _, indices = op.TopK(op.Neg(x), k, _outputs=2)
            return indices

        def rewrite(self, edit: Editor, x: ir.Value, k: ir.Value) -> ir.Value:
            return edit.node("TopK", [x, k], {"largest": 0}, outputs=2).outputs[1]

    class Indices(lwc.RulePass):
        """See the rule."""

        rules = (Second,)

    module = module_of(
        "g (float[4] x) => (int64[2] i, float[2] y) <int64[1] k = {2}>"
        "{ n = Neg(x)\n v, i = TopK(n, k)\n y = Exp(x) }"
    )
    feed = {"x": np.array([3.0, 1.0, 2.0, 0.0], np.float32)}
    wanted = run_plain(module, feed)
    assert run_pass_to_the_end(Indices(), module).rewrites == {"second": 1}
    assert ops(module) == ["TopK", "Exp"]
    for after, before in zip(run_plain(module, feed), wanted, strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((), "'odd' has no rules"),
        ((int,), "has <class 'int'> among its rules, which is none"),
        ((type("Bare", (lwc.PatternRule,), {}),), "rule 'Bare' has no method pattern and no rew"),
    ],
)
def test_what_is_no_rule_is_named(rules: Any, message: str) -> None:
    odd = type("Odd", (lwc.RulePass,), {"rules": rules})
    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(PassError, match=message):
        PassManager([odd()]).run(module)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda edit, x: None, "rewrite returned a NoneType, not 1 values or a Miss"),
        (lambda edit, x: [x, x], "rewrite returned 2, not 1 values"),
        (lambda edit, y: y, "unexpected keyword argument 'x'"),
        (lambda edit, x: x.nothing, "AttributeError"),
    ],
)
def test_a_rewrite_that_returns_nonsense_is_one_line(made: Any, message: str) -> None:
    class Odd(lwc.PatternRule):
        """Wrong."""

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Neg(x)

        def rewrite(self, *given: Any, **bindings: Any) -> Any:
            return made(*given, **bindings)

    class Odds(lwc.RulePass):
        """Wrong."""

        rules = (Odd,)

    module = module_of("g (float[2] x) => (float[2] y) { [n] y = Neg(x) }")
    before = module.fingerprint()
    with pytest.raises(PassError, match=message) as caught:
        PassManager([Odds()]).run(module)
    assert str(caught.value).startswith("Neg 'n': pass 'odds': rule 'odd' raised ")
    assert "\n" not in str(caught.value)
    assert module.fingerprint() == before


@pytest.mark.parametrize("outcome", [3, ["x"], ir.Node("", "Neg", [])])
def test_a_rule_function_that_returns_nonsense_is_one_line(outcome: Any) -> None:
    class Odd(lwc.RulePass):
        """Wrong."""

        rules = (lwc.Rule("odd-one", ("Neg",), lambda node, edit: outcome),)

    module = module_of("g (float[2] x) => (float[2] y) { [n] y = Neg(x) }")
    with pytest.raises(PassError, match=r"rule 'odd-one' returned a .*, which is no outcome"):
        PassManager([Odd()]).run(module)


def test_the_editor_answers_what_rules_ask() -> None:
    module = module_of(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { [a] a = Mul(x, w)\n y = Neg(a) }"
    )
    edit = PassContext(AnalysisManager(module), source="ask").editor()
    (product, negation) = module.graph
    assert edit.opset(product) == 17
    assert [edit.is_constant(value) for value in product.inputs] == [False, True]
    assert edit.single_use(product.outputs[0])
    made = edit.at(negation).op("Abs", [product.outputs[0]])
    edit.replace(negation.outputs[0], made)
    edit.erase(negation)
    verify_structure(module)
    assert ops(module) == ["Mul", "Abs"]
    assert made.producer() is not None
    assert module.graph.outputs[0].name == "y"


# Functions


@lwc.function_pass
def drop_dropouts(module: Module) -> int:
    """Remove Dropout."""
    count = 0
    for node in list(module.graph):
        if node.op_type == "Dropout" and node.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            module.graph.remove(node)
            count += 1
    return count


@lwc.function_pass(
    name="clip",
    contract=Approximate(rtol=0.1, atol=0.1),
    positional="to",
    changes_again="it clips what it clipped",
    never_more=frozenset({"nodes"}),
)
def clip_weights(
    module: Module, ctx: PassContext, *, to: float = 1.0, only: tuple[str, ...] = ()
) -> bool:
    """Clip weights.

    Args:
        module: The module.
        to: The largest magnitude that stays.
        only: Names of the weights to clip.
    """
    ctx.note(f"clipping to {to:g}")
    for name, value in module.graph.initializers.items():
        if name in only and value.const_value is not None:
            module.replace_initializer(
                value, ir.tensor(np.clip(value.const_value.numpy(), -to, to))
            )
    return bool(only)


def test_a_pass_of_a_function() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { a = Dropout(x)\n y = Exp(a) }")
    assert issubclass(drop_dropouts, Pass)
    assert drop_dropouts.name == "drop-dropouts"
    assert run_pass_to_the_end(drop_dropouts(), module).rewrites == {"drop-dropouts": 1}
    assert ops(module) == ["Exp"]
    info = describe_pass(drop_dropouts)
    assert (info.name, info.summary, info.contract) == ("drop-dropouts", "Remove Dropout.", "exact")
    assert info.target == f"{__name__}:drop_dropouts"


def test_a_function_has_options_and_the_context() -> None:
    module = module_of("g (float[2] x) => (float[2] y) <float[2] w = {1, 5}> { y = Mul(x, w) }")
    registry = Registry()
    registry.add(clip_weights)
    info = describe_pass(clip_weights)
    assert [(each.name, each.type, each.default) for each in info.options] == [
        ("to", "float", "1.0"),
        ("only", "list of str", ""),
    ]
    assert info.options[0].help == "The largest magnitude that stays."
    chosen = clip_weights(to=2.0, only=("w",))
    assert to_spec(chosen) == "clip{2.0 only=w}"
    assert chosen == clip_weights(to=2.0, only=("w",))
    assert (chosen.changes_again, chosen.never_more) == (
        "it clips what it clipped",
        frozenset({"nodes"}),
    )
    record = PassManager([chosen]).run(module)
    assert record.passes[0].changed
    value = module.graph.initializers["w"].const_value
    assert value is not None
    assert value.numpy().tolist() == [1.0, 2.0]
    assert "clipping to 2" in {remark.message for remark in module.remarks}


def test_a_required_option_and_a_full_result() -> None:
    def at_least(module: Module, *, count: int) -> PassResult:
        """Count."""
        return PassResult(False, statistics={"count": count})

    made = lwc.function_pass(at_least)
    with pytest.raises(TypeError, match="count"):
        made()
    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert run_pass_to_the_end(made(count=3), module).statistics == {"count": 3}


def no_module() -> int:
    return 0


def two_more(module: Any, ctx: Any, other: Any) -> int:
    return 0


def variable(module: Any, *others: Any) -> int:
    return 0


def untyped(module: Any, *, option=1) -> int:  # type: ignore[no-untyped-def]
    return int(option)


def reserved(module: Any, *, name: str = "x") -> int:
    return 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_module, "function 'no_module' makes no pass: its first parameter must be the module"),
        (two_more, "'other' is neither the module, the context nor an option"),
        (variable, r"'\*others' is no option"),
        (untyped, "option 'option' has no type"),
        (reserved, "an option cannot be called 'name'"),
    ],
)
def test_a_function_that_makes_no_pass_says_why(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lwc.function_pass(function)


@pytest.mark.parametrize("returned", [None, "yes", 1.5, -1])
def test_a_function_that_returns_nonsense_leaves_the_module(returned: Any) -> None:
    @lwc.function_pass
    def nonsense(module: Module) -> Any:
        """Return nonsense."""
        module.graph.outputs[0].producer().op_type = "Exp"  # type: ignore[union-attr]
        return returned

    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(PassError, match="pass 'nonsense': the function returned"):
        PassManager([nonsense()]).run(module)
    assert ops(module) == ["Neg"]


# All of it from a plugin file

PLUGIN = '''
import lwc


class SwishRule(lwc.PatternRule):
    """x * sigmoid(x) = QuickGelu(x), alpha 1."""

    def pattern(self, op, x):
        return op.Mul(x, op.Sigmoid(x))

    def check(self, edit, x):
        if edit.opset(edit.root) < 13:
            return lwc.Miss("the opset is too old")

    def rewrite(self, edit, x):
        return edit.op("QuickGelu", [x], {"alpha": 1.0}, domain="com.microsoft")


class FuseSwish(lwc.RulePass):
    """Fuse x * sigmoid(x)."""

    rules = (SwishRule,)


@lwc.function_pass
def count_nodes(module, ctx, *, least: int = 0):
    """Count nodes."""
    if len(module.graph) < least:
        ctx.warn("there are few")
    return 0
'''


def test_a_plugin_of_thirty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    default_registry.cache_clear()
    text = "g (float[2] x) => (float[2] y) { s = Sigmoid(x)\n y = Mul(s, x) }"
    onnx.save(ir.to_proto(module_of(text).model), "in.onnx")
    Path("lwc_test_swish.py").write_text(PLUGIN)
    pipeline = "fuse-swish,count-nodes{least=2}"
    plugin = "--load-pass-plugin=lwc_test_swish.py"
    arguments = ["in.onnx", plugin, "-p", pipeline, "-o", "out.onnx", "--verify=numeric"]
    assert main([*arguments, "--require-match=fuse-swish:1"]) == 0
    assert "warning: count-nodes: there are few" in capsys.readouterr().err
    assert [node.op_type for node in onnx.load("out.onnx").graph.node] == ["QuickGelu"]
    default_registry.cache_clear()


def test_the_names_of_the_authoring_interface_load_nothing_heavy_before_they_are_used() -> None:
    code = (
        "import sys, lwc\n"
        "lwc.function_pass\n"
        "assert not {'onnx_ir', 'sympy', 'onnxscript', 'torch'} & set(sys.modules)\n"
        "class F(lwc.PatternRule): pass\n"
        "lwc.RulePass, lwc.Rule, lwc.rule, lwc.Miss, lwc.EDITED, lwc.Editor\n"
        "assert not {'onnxscript', 'torch', 'hypothesis'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
