"""Structural verification: every violation is found and named, and the walk is linear."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import lwc
from lwc.core.errors import VerificationError
from lwc.frontend.onnx_reader import from_proto
from lwc.verify.structure.well_formed import verify_structure

TEXT = """<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
main (bool c, float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
  t = Mul(x, w)
  u = If (c) <
    then_branch = yes () => (float[n, 4] p) { p = Relu(t) },
    else_branch = no () => (float[n, 4] q) { q = Neg(t) }
  >
  v = Softmax <axis = -1> (u)
  y = d.f (v)
}
<domain: "d", opset_import: ["" : 17]> f (a) => (b) { s = Abs(a) b = Neg(s) }"""


def make_module() -> lwc.Module:
    return from_proto(onnx.parser.parse_model(TEXT))


def find(module: lwc.Module, op_type: str) -> ir.Node:
    return next(node for node in module.nodes() if node.op_type == op_type)


def float_value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))


def test_a_sound_module_passes() -> None:
    verify_structure(make_module())


def use_before_definition(module: lwc.Module) -> None:
    softmax, mul = find(module, "Softmax"), find(module, "Mul")
    module.graph.remove(softmax)
    module.graph.insert_before(mul, softmax)


def use_of_a_removed_node(module: lwc.Module) -> None:
    module.graph.remove(find(module, "Mul"))


def use_of_a_stranger(module: lwc.Module) -> None:
    find(module, "Softmax").replace_input_with(0, float_value("stranger"))


def use_out_of_a_branch(module: lwc.Module) -> None:
    find(module, "Softmax").replace_input_with(0, find(module, "Relu").outputs[0])


def same_name_twice(module: lwc.Module) -> None:
    find(module, "Softmax").outputs[0].name = "t"


def name_hidden_in_a_branch(module: lwc.Module) -> None:
    find(module, "Relu").outputs[0].name = "t"


def initializer_of_a_taken_name(module: lwc.Module) -> None:
    value = float_value("x")
    value.const_value = ir.tensor(np.ones(4, np.float32), name="x")
    value.shape = ir.Shape([4])
    module.graph.initializers.add(value)


def initializer_of_another_type(module: lwc.Module) -> None:
    module.graph.initializers["w"].const_value = ir.tensor(np.ones(4, np.float16), name="w")


def initializer_of_another_shape(module: lwc.Module) -> None:
    module.graph.initializers["w"].const_value = ir.tensor(np.ones(5, np.float32), name="w")


def initializer_without_tensor(module: lwc.Module) -> None:
    module.graph.initializers["w"].const_value = None


def unknown_operator(module: lwc.Module) -> None:
    find(module, "Softmax").op_type = "Softmux"


def unknown_attribute(module: lwc.Module) -> None:
    find(module, "Softmax").attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def attribute_of_wrong_type(module: lwc.Module) -> None:
    find(module, "Softmax").attributes["axis"] = ir.AttrFloat32("axis", 1.0)


def missing_attribute(module: lwc.Module) -> None:
    find(module, "Softmax").op_type = "Cast"
    del find(module, "Cast").attributes["axis"]


def too_many_inputs(module: lwc.Module) -> None:
    softmax = find(module, "Softmax")
    softmax.resize_inputs(2)
    softmax.replace_input_with(1, softmax.inputs[0])


def undeclared_domain(module: lwc.Module) -> None:
    find(module, "Softmax").domain = "nowhere"


def output_not_produced(module: lwc.Module) -> None:
    module.graph.outputs[0] = float_value("ghost")


def output_without_type(module: lwc.Module) -> None:
    module.graph.outputs[0].type = None


def broken_function(module: lwc.Module) -> None:
    (function,) = module.model.functions.values()
    function.graph.node(1).replace_input_with(0, float_value("lost"))


def unknown_operator_in_a_function(module: lwc.Module) -> None:
    (function,) = module.model.functions.values()
    function.graph.node(0).op_type = "Abz"


def unknown_operator_in_a_branch(module: lwc.Module) -> None:
    find(module, "Relu").op_type = "Relux"


def output_of_another_node(module: lwc.Module) -> None:
    find(module, "Softmax").outputs[0]._producer = find(module, "Mul")


def use_that_the_value_does_not_know(module: lwc.Module) -> None:
    node = find(module, "Softmax")
    (value,) = node.inputs
    assert value is not None
    value._uses.clear()


def branch_with_too_many_outputs(module: lwc.Module) -> None:
    graph = find(module, "If").attributes["else_branch"].as_graph()
    graph.outputs.append(graph.outputs[0])


def branch_with_an_input(module: lwc.Module) -> None:
    find(module, "If").attributes["then_branch"].as_graph().inputs.append(float_value("extra"))


def call_with_too_many_inputs(module: lwc.Module) -> None:
    call = find(module, "f")
    call.resize_inputs(2)
    call.replace_input_with(1, call.inputs[0])


def call_with_too_many_outputs(module: lwc.Module) -> None:
    find(module, "f").resize_outputs(2)


def call_of_an_unknown_overload(module: lwc.Module) -> None:
    find(module, "f").overload = "fast"


def function_that_calls_itself(module: lwc.Module) -> None:
    inner = find(module, "Abs")
    inner.domain, inner.op_type = "d", "f"
    (function,) = module.model.functions.values()
    function.opset_imports["d"] = 1


def operator_of_the_dialect_without_meaning(module: lwc.Module) -> None:
    find(module, "Softmax").domain = "lwc"
    module.graph.opset_imports["lwc"] = 1


def opset_from_the_future(module: lwc.Module) -> None:
    module.graph.opset_imports[""] = 999


def opset_from_the_future_in_a_function(module: lwc.Module) -> None:
    (function,) = module.model.functions.values()
    function.opset_imports[""] = 999


def function_without_the_opset_it_uses(module: lwc.Module) -> None:
    (function,) = module.model.functions.values()
    del function.opset_imports[""]


def function_with_initializers(module: lwc.Module) -> None:
    (function,) = module.model.functions.values()
    value = float_value("k")
    value.const_value = ir.tensor(np.ones(4, np.float32), name="k")
    value.shape = ir.Shape([4])
    function.graph.initializers.add(value)


def reference_outside_of_a_function(module: lwc.Module) -> None:
    find(module, "Softmax").attributes["axis"] = ir.RefAttr("axis", "ax", ir.AttributeType.INT)


def reference_that_the_function_has_not(module: lwc.Module) -> None:
    find(module, "Abs").attributes.clear()
    node = find(module, "Abs")
    node.op_type = "Softmax"
    node.attributes["axis"] = ir.RefAttr("axis", "ax", ir.AttributeType.INT)


def attribute_of_another_name(module: lwc.Module) -> None:
    find(module, "Softmax").attributes.data["axis"] = ir.AttrInt64("axes", 1)


def initializer_of_a_branch_of_another_shape(module: lwc.Module) -> None:
    value = float_value("k")
    value.const_value = ir.tensor(np.ones(4, np.float32), name="k")
    value.shape = ir.Shape([5])
    find(module, "If").attributes["then_branch"].as_graph().initializers.add(value)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (output_of_another_node, ["'v'", "another node"]),
        (use_that_the_value_does_not_know, ["Softmax", "'u'", "does not know of this use"]),
        (branch_with_too_many_outputs, ["If", "else_branch has 2 outputs, 1 expected"]),
        (branch_with_an_input, ["If", "then_branch has 1 inputs, 0 expected"]),
        (call_with_too_many_inputs, ["d::f", "has 2 inputs, but the function has 1"]),
        (call_with_too_many_outputs, ["d::f", "has 2 outputs, but the function has 1"]),
        (call_of_an_unknown_overload, ["d::f", "overload 'fast'"]),
        (function_that_calls_itself, ["function 'f' calls itself"]),
        (operator_of_the_dialect_without_meaning, ["lwc::Softmax", "no meaning"]),
        (opset_from_the_future, ["the model imports opset 999", "newer than"]),
        (opset_from_the_future_in_a_function, ["function 'f' imports opset 999"]),
        (function_without_the_opset_it_uses, ["Abs", "domain 'ai.onnx' is not imported"]),
        (function_with_initializers, ["function 'f' has initializers"]),
        (reference_outside_of_a_function, ["Softmax", "'axis' refers to one of a function"]),
        (reference_that_the_function_has_not, ["'axis' refers to 'ax', which function 'f'"]),
        (attribute_of_another_name, ["attribute 'axis' calls itself 'axes'"]),
        (initializer_of_a_branch_of_another_shape, ["'k' of a subgraph of If", "[5]", "[4]"]),
        (use_before_definition, ["Softmax", "'u'", "If", "comes later"]),
        (use_of_a_removed_node, ["'t'", "Mul", "in no graph"]),
        (use_of_a_stranger, ["Softmax", "'stranger'", "neither produced"]),
        (use_out_of_a_branch, ["Softmax", "'p'", "out of sight"]),
        (same_name_twice, ["Softmax", "'t'", "taken"]),
        (name_hidden_in_a_branch, ["Relu", "'t'", "taken"]),
        (initializer_of_a_taken_name, ["initializer", "'x'", "taken"]),
        (initializer_of_another_type, ["'w'", "FLOAT", "FLOAT16"]),
        (initializer_of_another_shape, ["'w'", "[4]", "[5]"]),
        (initializer_without_tensor, ["'w'", "no tensor"]),
        (unknown_operator, ["Softmux", "opset 17"]),
        (unknown_attribute, ["Softmax", "'beta'"]),
        (attribute_of_wrong_type, ["Softmax", "'axis'", "wrong type"]),
        (missing_attribute, ["Cast", "'to'"]),
        (too_many_inputs, ["Softmax", "2 inputs, 1 expected"]),
        (undeclared_domain, ["nowhere::Softmax", "not imported"]),
        (output_not_produced, ["'ghost'", "not produced"]),
        (output_without_type, ["'y'", "no type"]),
        (broken_function, ["Neg", "'lost'"]),
        (unknown_operator_in_a_function, ["Abz"]),
        (unknown_operator_in_a_branch, ["Relux"]),
    ],
)
def test_violations(break_it: Callable[[lwc.Module], None], words: list[str]) -> None:
    module = make_module()
    break_it(module)
    with pytest.raises(VerificationError) as caught:
        verify_structure(module)
    for word in words:
        assert word in str(caught.value), f"'{word}' not in: {caught.value}"


def test_the_error_shows_the_neighbours() -> None:
    module = make_module()
    unknown_operator(module)
    with pytest.raises(VerificationError) as caught:
        verify_structure(module)
    assert str(caught.value).splitlines()[1:] == [
        "    %u = If(%c)",
        "--> %v = Softmux(%u)",
        "    %y = d::f(%v)",
    ]


def test_absent_optional_inputs_and_outputs_are_fine() -> None:
    module = from_proto(
        onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x, float hi) => (float[4] y) { y = Clip(x, , hi) }""")
    )
    verify_structure(module)
    (clip,) = module.graph
    dropout = ir.node("Dropout", [clip.outputs[0]])
    dropout.outputs[0].name = "z"
    dropout.resize_outputs(2)
    dropout.outputs[1].name = ""
    module.graph.append(dropout)
    verify_structure(module)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("y = Add(x, x)", 1, "lacks input 1 ('B'), which must be there"),
        ("y = Add(x, x)", 0, "lacks input 0 ('A')"),
        ("y = Clip(x, x)", 0, "lacks input 0 ('input')"),
        ("y = Sum(x, x, x)", 1, "lacks input 1 ('data_0')"),
    ],
)
def test_absent_inputs_that_must_be_there(text: str, position: int, words: str) -> None:
    """ONNX Runtime refuses such a file, or crashes on it."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) {{ {text} }}'
    module = from_proto(onnx.parser.parse_model(text))
    verify_structure(module)
    module.graph.node(0).replace_input_with(position, None)
    with pytest.raises(VerificationError) as caught:
        verify_structure(module)
    assert words in str(caught.value)


def test_old_operators_are_held_to_their_own_schema() -> None:
    """The region of a Resize became optional in opset 13."""
    modules = [
        ir.from_onnx_text(
            f"""<ir_version: 8, opset_import: ["" : {opset}]>
            g (float[1, 4] x) => (float[n, m] y) <float[2] s = {{1, 2}}>
            {{ y = Resize(x, s, s) }}"""
        )
        for opset in (11, 13)
    ]
    for model in modules:
        model.graph.node(0).replace_input_with(1, None)
    verify_structure(lwc.Module(modules[1]))
    with pytest.raises(VerificationError, match=r"lacks input 1 \('roi'\)"):
        verify_structure(lwc.Module(modules[0]))


LOOPS = """<ir_version: 9, opset_import: ["" : 17]>
g (int64 m, bool c, float[2] x, float[3, 2] xs) => (float[2] y, float[2] z, float[3, 2] zs) {
  y = Loop(m, c, x) <body = b (int64 i, bool k, float[2] v) => (bool k2, float[2] v2)
    { k2 = Identity(k) v2 = Relu(v) }>
  z, zs = Scan<num_scan_inputs = 1, body = s (float[2] a, float[2] b) => (float[2] p, float[2] q)
    { p = Add(a, b) q = Relu(b) }> (x, xs)
}"""


def widen(node: ir.Node, count: int) -> None:
    """Give a node more inputs: its last one again."""
    have = len(node.inputs)
    node.resize_inputs(count)
    for index in range(have, count):
        node.replace_input_with(index, node.inputs[have - 1])


@pytest.mark.parametrize(
    ("op_type", "change", "words"),
    [
        ("Loop", lambda node: widen(node, 4), "has 1 outputs for 2 loop-carried values"),
        (
            "Loop",
            lambda node: node.attributes["body"].as_graph().inputs.append(float_value("extra")),
            "body has 4 inputs, 3 expected",
        ),
        (
            "Loop",
            lambda node: node.attributes["body"].as_graph().outputs.pop(0),
            "body has 1 outputs, 2 expected",
        ),
        ("Scan", lambda node: node.resize_inputs(1), "body has 2 inputs, 1 expected"),
        ("Scan", lambda node: widen(node, 4), "has 2 outputs for 3 state variables"),
        (
            "Scan",
            lambda node: node.attributes.add(ir.AttrInt64("num_scan_inputs", 3)),
            "scans 3 of its 2 inputs",
        ),
        (
            "Scan",
            lambda node: node.attributes["body"].as_graph().outputs.pop(),
            "body has 1 outputs, 2 expected",
        ),
    ],
)
def test_bodies_fit_their_operator(
    op_type: str, change: Callable[[ir.Node], object], words: str
) -> None:
    module = from_proto(onnx.parser.parse_model(LOOPS))
    verify_structure(module)
    node = find(module, op_type)
    for value in list(module.graph.outputs):
        if value.producer() is node:
            module.graph.outputs.remove(value)
    change(node)
    with pytest.raises(VerificationError) as caught:
        verify_structure(module)
    assert words in str(caught.value)


def test_what_onnx_allows_is_allowed() -> None:
    """Unused inputs, nodes of one name, one value as two outputs, unknown attributes of calls."""
    module = make_module()
    for node in module.nodes():
        node.name = "same"
    module.graph.inputs.append(float_value("unused"))
    module.graph.outputs.append(module.graph.outputs[0])
    find(module, "f").attributes["extra"] = ir.AttrInt64("extra", 1)
    verify_structure(module)


def test_functions_may_call_each_other() -> None:
    module = from_proto(
        onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
    g (float[2] x) => (float[2] y) { a = d.f(x) y = d.h(a) }
    <domain: "d", opset_import: ["" : 17, "d" : 1]> f (a) => (b) { s = d.h(a) b = d.h(s) }
    <domain: "d", opset_import: ["" : 17]> h (a) => (b) { b = Neg(a) }""")
    )
    verify_structure(module)
    inner = next(f for f in module.model.functions.values() if f.name == "h")
    node = inner.graph.node(0)
    node.domain, node.op_type = "d", "f"
    with pytest.raises(VerificationError, match=r"function '[fh]' calls itself"):
        verify_structure(module)


def chain(length: int) -> lwc.Module:
    value = first = float_value("x")
    nodes = []
    for index in range(length):
        node = ir.Node("", "Softmax", [value], [ir.AttrInt64("axis", -1)])
        value = node.outputs[0]
        value.name = f"v{index}"
        nodes.append(node)
    value.type = first.type
    graph = ir.Graph([first], [value], nodes=nodes, opset_imports={"": 17}, name="g")
    return lwc.Module(ir.Model(graph, ir_version=8))


def test_cost_is_linear() -> None:
    """50,000 nodes take at most 30 times as long as 5,000 (10 times, and noise)."""

    def seconds(module: lwc.Module) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            verify_structure(module)
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(chain(5_000)), seconds(chain(50_000))
    assert large < 30 * small
    assert large < 5


@pytest.mark.models
@pytest.mark.parametrize("name", ["silero_vad", "tagger", "vit_s_focus", "ch_PP-OCRv4_rec_infer"])
def test_real_models_pass(model_file: Callable[[str], Path], name: str) -> None:
    verify_structure(lwc.load(model_file(name)))
