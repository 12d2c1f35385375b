"""The fingerprint: all that a file would show is in it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from lwc.core.module import Module
from lwc.frontend.onnx_reader import from_proto

TEXT = """<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
g (bool c, float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
  t = Mul(x, w)
  u = If (c) <
    then_branch = yes () => (float[n, 4] p) { p = Relu(t) },
    else_branch = no () => (float[n, 4] q) { q = Neg(t) }
  >
  v = Softmax <axis = -1> (u)
  y = d.f <al = 0.5> (v)
}
<domain: "d", opset_import: ["" : 17]> f <al> (a) => (b) { b = LeakyRelu<alpha: float = @al>(a) }"""


def find(module: Module, op_type: str) -> ir.Node:
    return next(node for node in module.nodes() if node.op_type == op_type)


def function(module: Module) -> ir.Function:
    (found,) = module.model.functions.values()
    return found


def add_default(module: Module) -> None:
    function(module).attributes["al"] = ir.AttrFloat32("al", 0.25)


def annotate(module: Module) -> None:
    names = {"SCALE_TENSOR": "w"}
    find(module, "Mul").outputs[0].meta["quant_parameter_tensor_names"] = names


def replace_weight(module: Module) -> None:
    weight = module.graph.initializers["w"]
    assert weight.const_value is not None
    module.replace_initializer(weight, ir.tensor(weight.const_value.numpy().copy()))


def rename_function(module: Module) -> None:
    found = function(module)
    del module.model.functions[found.identifier()]
    found.overload = "fast"
    module.model.functions[found.identifier()] = found


CHANGES: dict[str, Callable[[Module], object]] = {
    "metadata of the model": lambda m: m.model.metadata_props.update(a="b"),
    "metadata of the graph": lambda m: m.graph.metadata_props.update(a="b"),
    "metadata of a node": lambda m: find(m, "Mul").metadata_props.update(a="b"),
    "metadata of a value": lambda m: find(m, "Mul").outputs[0].metadata_props.update(a="b"),
    "metadata of an input": lambda m: m.graph.inputs[0].metadata_props.update(a="b"),
    "metadata of a weight": lambda m: m.graph.initializers["w"].metadata_props.update(a="b"),
    "metadata in a branch": lambda m: find(m, "Relu").metadata_props.update(a="b"),
    "metadata of a function": lambda m: function(m).metadata_props.update(a="b"),
    "metadata in a function": lambda m: find(m, "LeakyRelu").metadata_props.update(a="b"),
    "a quantization annotation": annotate,
    "a node's name": lambda m: setattr(find(m, "Mul"), "name", "renamed"),
    "a node's text": lambda m: setattr(find(m, "Mul"), "doc_string", "text"),
    "a value's text": lambda m: setattr(find(m, "Mul").outputs[0], "doc_string", "text"),
    "a graph's name": lambda m: setattr(m.graph, "name", "renamed"),
    "a graph's text": lambda m: setattr(m.graph, "doc_string", "text"),
    "the model's text": lambda m: setattr(m.model, "doc_string", "text"),
    "the IR version": lambda m: setattr(m.model, "ir_version", 10),
    "the producer": lambda m: setattr(m.model, "producer_name", "me"),
    "the producer's version": lambda m: setattr(m.model, "producer_version", "1"),
    "the model's version": lambda m: setattr(m.model, "model_version", 7),
    "the model's domain": lambda m: setattr(m.model, "domain", "d"),
    "an opset": lambda m: m.graph.opset_imports.update({"": 18}),
    "another opset": lambda m: m.graph.opset_imports.update({"com.microsoft": 1}),
    "an opset of a function": lambda m: function(m).opset_imports.update({"": 18}),
    "a default of a function": add_default,
    "an overload": rename_function,
    "an attribute": lambda m: find(m, "Softmax").attributes.add(ir.AttrInt64("axis", 1)),
    "an attribute's type": lambda m: find(m, "f").attributes.add(ir.AttrInt64("al", 1)),
    "a stated shape": lambda m: setattr(find(m, "Mul").outputs[0], "shape", ir.Shape(["n", 4])),
    "a weight's stated shape": lambda m: setattr(
        m.graph.initializers["w"], "shape", ir.Shape(["k"])
    ),
    "a weight": replace_weight,
    "a new weight": lambda m: m.add_initializer("k", np.ones(2, np.float32)),
    "a removed function": lambda m: m.model.functions.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_file_shows_is_in_it(change: str) -> None:
    module = from_proto(onnx.parser.parse_model(TEXT))
    before = module.fingerprint()
    assert module.fingerprint() == before
    CHANGES[change](module)
    assert module.fingerprint() != before


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_has_the_fingerprint_of_its_original(change: str) -> None:
    module = from_proto(onnx.parser.parse_model(TEXT))
    CHANGES[change](module)
    assert module.clone().fingerprint() == module.fingerprint()


def test_what_no_file_shows_is_not_in_it() -> None:
    module = from_proto(onnx.parser.parse_model(TEXT))
    before = module.fingerprint()
    find(module, "Mul").meta["seen"] = True
    assert find(module, "Mul").metadata_props == {}
    assert find(module, "Mul").outputs[0].metadata_props == {}
    assert module.model.metadata_props == {}
    module.fresh_name("t")
    assert module.fingerprint() == before
