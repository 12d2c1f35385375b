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
from lwc.verify.structural import verify_structure

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


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
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
