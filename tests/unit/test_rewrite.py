"""The rewrite driver and editor: names, provenance, outputs, misses, order, patterns."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from support import module_of, ops

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.shapes import Shapes
from lwc.core.errors import PassError
from lwc.core.module import Module
from lwc.rewrite import ANY, EDITED, Editor, Miss, Outcome, Rule, RuleSet, rewrite, rule
from lwc.rewrite.patterns import PatternRule, pattern_rule
from lwc.verify.structure.well_formed import verify_structure


def editor_of(module: Module) -> Editor:
    return Editor(module, AnalysisManager(module).get(Shapes), "test-pass")


@rule("Relu")
def relu_to_abs(node: ir.Node, edit: Editor) -> Outcome:
    return edit.op("Abs", [node.inputs[0]])


def test_replacement_takes_the_name_records_the_pass_and_counts() -> None:
    module = module_of("g (float[2] x) => (float[2] y) { a = Relu(x)\n b = Neg(a)\n y = Relu(b) }")
    done = rewrite(editor_of(module), RuleSet([relu_to_abs]))
    verify_structure(module)
    assert ops(module) == ["Abs", "Neg", "Abs"]
    assert [node.outputs[0].name for node in module.nodes()] == ["a", "b", "y"]
    assert done.hits == {"relu-to-abs": 2}
    marks = [node.metadata_props.get("lwc.pass") for node in module.nodes()]
    assert marks == ["test-pass", None, "test-pass"]


def test_output_that_is_an_input_gets_an_identity() -> None:
    @rule("Relu")
    def drop(node: ir.Node, edit: Editor) -> Outcome:
        return node.inputs[0]

    module = module_of("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)\n z = Neg(y) }")
    rewrite(editor_of(module), RuleSet([drop]))
    verify_structure(module)
    assert sorted(ops(module)) == ["Identity", "Neg"]
    assert [value.name for value in module.graph.outputs] == ["y", "z"]
    negation = next(node for node in module.nodes() if node.op_type == "Neg")
    assert negation.inputs[0] is module.graph.inputs[0]


def test_merging_into_a_graph_output_keeps_that_outputs_name() -> None:
    @rule("Neg")
    def same_as_relu(node: ir.Node, edit: Editor) -> Outcome:
        assert node.inputs[0] is not None
        return next(u.node.outputs[0] for u in node.inputs[0].uses() if u.node.op_type == "Abs")

    module = module_of(
        "g (float[2] x) => (float[2] y, float[2] z) { r = Relu(x)\n n = Neg(x)\n z = Exp(n)\n"
        " y = Identity(r) }"
    )
    rewrite(editor_of(module), RuleSet([relu_to_abs]))
    abs_node = next(node for node in module.nodes() if node.op_type == "Abs")
    module.graph.outputs[0] = abs_node.outputs[0]
    abs_node.outputs[0].name = "top"
    rewrite(editor_of(module), RuleSet([same_as_relu]))
    assert [value.name for value in module.graph.outputs] == ["top", "z"]


def test_dead_chains_and_bodies_are_erased_and_release_their_inputs() -> None:
    module = module_of(
        """g (float[2] x, bool p) => (float[2] y) {
            a = Abs(x)
            b = If (p) <then_branch = t () => (float[2] c) { c = Exp(a) },
                        else_branch = e () => (float[2] d) { d = Neg(a) }>
            y = Relu(x)
        }"""
    )
    done = rewrite(editor_of(module), RuleSet([]))
    assert ops(module) == ["Relu"]
    assert done.erased == 2
    assert len(module.graph.inputs[0].uses()) == 1


def test_rules_do_not_see_the_inside_of_erased_nodes() -> None:
    @rule(ANY)
    def every_operand_is_there(node: ir.Node, edit: Editor) -> Outcome:
        assert all(value is not None for value in node.inputs)
        return None

    module = module_of(
        """g (float[2] x, bool p) => (float[2] y) {
            b = If (p) <then_branch = t () => (float[2] c) { c = Exp(x) },
                        else_branch = e () => (float[2] d) {
                            d = If (p) <then_branch = s () => (float[2] f) { f = Neg(x) },
                                        else_branch = u () => (float[2] h) { h = Abs(x) }>
                        }>
            y = Relu(x)
        }"""
    )
    rewrite(editor_of(module), RuleSet([every_operand_is_there]))
    assert ops(module) == ["Relu"]


def test_rules_reach_bodies_and_functions_but_not_nodes_with_parameter_attributes() -> None:
    module = module_of(
        """g (float[2] x, bool p) => (float[2] y) {
            b = If (p) <then_branch = t () => (float[2] c) { c = Relu(x) },
                        else_branch = e () => (float[2] d) { d = Neg(x) }>
            y = local.f <k = 0> (b)
        }
        <domain: "local", opset_import: ["" : 17]>
        f <k> (v) => (w) { r = Relu(v)\n w = Softmax <axis: int = @k> (r) }"""
    )
    module.import_opset("local", 1)

    @rule(ANY)
    def never_sees_references(node: ir.Node, edit: Editor) -> Outcome:
        assert node.op_type != "Softmax"
        return None

    done = rewrite(editor_of(module), RuleSet([never_sees_references, relu_to_abs]))
    assert done.hits["relu-to-abs"] == 2
    assert "Relu" not in ops(module)


def test_a_miss_names_the_furthest_node_and_vanishes_once_the_rule_applies() -> None:
    @rule("Neg")
    def wants_abs(node: ir.Node, edit: Editor) -> Outcome:
        producer = node.inputs[0].producer() if node.inputs[0] else None
        if producer is not None and producer.op_type == "Relu":
            return Miss("the operand is a Relu", producer)
        if producer is not None and producer.op_type == "Abs":
            return edit.op("Exp", [producer.inputs[0]])
        return None

    text = "g (float[2] x) => (float[2] y) { a = Relu(x)\n y = Neg(a) }"
    module = module_of(text)
    (missed,) = rewrite(editor_of(module), RuleSet([wants_abs])).missed
    assert (missed.rule, missed.node.op_type) == ("wants-abs", "Relu")
    module = module_of(text)
    done = rewrite(editor_of(module), RuleSet([wants_abs, relu_to_abs]))
    assert not done.missed
    assert ops(module) == ["Exp"]


def test_rules_that_never_end_are_an_error() -> None:
    restless = Rule("restless", ("Relu",), lambda node, edit: EDITED)
    module = module_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(PassError, match="restless"):
        rewrite(editor_of(module), RuleSet([restless]))


def test_rules_that_undo_each_other_through_new_nodes_are_an_error() -> None:
    there = Rule("there", ("Neg",), lambda node, edit: edit.op("Abs", [node.inputs[0]]))
    back = Rule("back", ("Abs",), lambda node, edit: edit.op("Neg", [node.inputs[0]]))
    module = module_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(PassError, match=r"rule '(there|back)' comes to no end"):
        rewrite(editor_of(module), RuleSet([there, back]))


def test_a_rule_that_leaves_its_root_alive_and_matches_it_again_is_an_error() -> None:
    again = Rule("again", ("TopK",), lambda node, edit: [edit.op("Exp", [node.inputs[0]]), None])
    module = module_of("g (float[2] x) => (int64[k] i) <int64[1] n = {1}> { y, i = TopK(x, n) }")
    with pytest.raises(PassError, match="rule 'again' comes to no end"):
        rewrite(editor_of(module), RuleSet([again]))


def test_constants_are_shared_in_graphs_and_nodes_in_functions() -> None:
    @rule("Relu")
    def add_ones(node: ir.Node, edit: Editor) -> Outcome:
        return edit.op("Unsqueeze", [node.inputs[0], edit.constant([0], "axes")])

    module = module_of(
        """g (float[2] x) => (y, z) { y = Relu(x)\n z = Relu(y)\n w = local.f(x) q = Neg(w) }
        <domain: "local", opset_import: ["" : 17]> f (v) => (u) { u = Relu(v) }"""
    )
    module.import_opset("local", 1)
    rewrite(editor_of(module), RuleSet([add_ones]))
    assert list(module.graph.initializers) == ["axes"]
    (function,) = module.model.functions.values()
    assert [node.op_type for node in function] == ["Constant", "Unsqueeze"]
    assert not function.graph.initializers


class AddOfProducts(PatternRule):
    """x*a + x*b = x * (a + b)."""

    name = "add-of-products"
    roots = ("Add",)

    def pattern(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Add(op.Mul(x, a), op.Mul(x, b))

    def check(self, edit: Editor, **bindings: Any) -> dict[str, Any] | Miss:
        if not edit.same_shape(bindings["a"], bindings["b"]):
            return Miss("the factors differ in shape", bindings["a"].producer())
        return {"rank": edit.rank(bindings["a"])}

    def rewrite(self, edit: Editor, **bindings: Any) -> ir.Value:
        assert bindings["rank"] == 1
        total = edit.op("Add", [bindings["a"], bindings["b"]])
        return edit.op("Mul", [bindings["x"], total])


def test_patterns_match_commuted_operands_and_carry_what_check_found() -> None:
    module = module_of(
        "g (float[2] x, float[2] a, float[2] b) => (float[2] y)"
        " { p = Mul(a, x)\n q = Mul(x, b)\n y = Add(p, q) }"
    )
    done = rewrite(editor_of(module), RuleSet([pattern_rule(AddOfProducts())]))
    verify_structure(module)
    assert done.hits == {"add-of-products": 1}
    assert ops(module) == ["Add", "Mul"]
    assert module.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[2] x, float[2] a, float[1] b) => (float[2] y)"
            " { p = Mul(x, a)\n q = Mul(x, b)\n y = Add(p, q) }",
            "the factors differ in shape",
        ),
        (
            "g (float[2] x, float[2] a, float[2] b) => (float[2] y, float[2] p)"
            " { p = Mul(x, a)\n q = Mul(x, b)\n y = Add(p, q) }",
            "a value inside the pattern has other consumers",
        ),
    ],
)
def test_patterns_report_why_they_did_not_apply(text: str, reason: str) -> None:
    module = module_of(text)
    before = module.fingerprint()
    done = rewrite(editor_of(module), RuleSet([pattern_rule(AddOfProducts())]))
    assert reason in {each.reason for each in done.missed}
    assert module.fingerprint() == before
