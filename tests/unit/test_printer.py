"""The printed form of a module, exactly."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir

import lwc
from lwc.core.printer import print_module, print_node
from lwc.frontend.onnx_reader import from_proto

TEXT = """<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
main (bool c, float[batch, 4] x) => (float[batch, 4] y)
<float[4] b = {1, 2, 3, 1e-5}, float[batch, 4] t> {
  [scale] t = Gemm <transB = 1, alpha = 0.1> (x, w, b)
  u = If (c) <
    then_branch = yes () => (float[batch, 4] p) { p = Relu(t) },
    else_branch = no () => (float[batch, 4] q) {
      m = Constant <value = int64[1] {1}> ()
      q = ReduceMean <axes = [1], keepdims = 1> (t)
    }
  >
  l, r = Split <axis = 1> (u)
  y = d.f <k = 0.5> (l)
}
<domain: "d", opset_import: ["" : 17]>
f <k> (a) => (z) { s = Constant <value_float: float = @k> () z = Mul(a, s) }"""

PRINTED = """\
opset ai.onnx 17, d 1
graph main(%c: b8[], %x: f32[batch, 4]) {
  %b: f32[4] = [1.0, 2.0, 3.0, 1e-05]
  %w: f32[4, 4] = ...
  %t: f32[batch, 4] = Gemm(%x, %w, %b) {alpha=0.1, transB=1}  # scale
  %u: ? = If(%c)
    else_branch() {
      %m: ? = Constant() {value=i64[1] [1]}
      %q: f32[batch, 4] = ReduceMean(%t) {axes=[1], keepdims=1}
      return %q: f32[batch, 4]
    }
    then_branch() {
      %p: f32[batch, 4] = Relu(%t)
      return %p: f32[batch, 4]
    }
  %l: ?, %r: ? = Split(%u) {axis=1}
  %y: f32[batch, 4] = d::f(%l) {k=0.5}
  return %y: f32[batch, 4]
}

function d::f<k>(%a: ?) {
  %s: ? = Constant() {value_float=@k}
  %z: ? = Mul(%a, %s)
  return %z: ?
}
"""


def make_module() -> lwc.Module:
    proto = onnx.parser.parse_model(TEXT)
    weight = onnx.numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    proto.graph.initializer.append(weight)
    return from_proto(proto)


def test_whole_module() -> None:
    module = make_module()
    assert print_module(module) == PRINTED
    assert str(module) == PRINTED


def test_printing_is_stable_over_a_clone() -> None:
    assert print_module(make_module().clone()) == PRINTED


def test_one_node() -> None:
    module = make_module()
    gemm = module.graph.node(0)
    assert print_node(gemm) == (
        "%t: f32[batch, 4] = Gemm(%x, %w, %b) {alpha=0.1, transB=1}  # scale"
    )
    absent = ir.node("Clip", [gemm.outputs[0], None, gemm.outputs[0]])
    absent.outputs[0].name = "o"
    assert print_node(absent) == "%o: ? = Clip(%t, _, %t)"


def test_long_attributes_are_elided() -> None:
    node = ir.node(
        "Op",
        [],
        {"many": list(range(20)), "text": "a" * 100, "reals": [0.1, 2.0], "names": ["a", "b"]},
        domain="my",
    )
    node.outputs[0].name = "o"
    assert print_node(node) == (
        "%o: ? = my::Op() {many=[0, 1, 2, 3, 4, 5, 6, 7, ... 20 in all], names=['a', 'b'], "
        f"reals=[0.1, 2.0], text='{'a' * 57}...'}}"
    )


def test_composite_types() -> None:
    value = ir.Value(
        name="s",
        type=ir.OptionalType(ir.SequenceType(ir.TensorType(ir.DataType.INT64))),
        shape=ir.Shape([None, 2]),
    )
    node = ir.Node("", "Identity", [value], outputs=[value_like(value)])
    assert print_node(node) == "%o: optional(seq(i64[?, 2])) = Identity(%s)"


def value_like(value: ir.Value) -> ir.Value:
    return ir.Value(name="o", type=value.type, shape=value.shape)
