"""Reading valid models: dimensions, opsets, subgraphs, functions, custom operators, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lwc
from lwc.core.diagnostics import RemarkLog
from lwc.core.errors import InputError
from lwc.core.weights import FileTensor
from lwc.frontend.onnx_reader import MIN_OPSET, from_proto
from lwc.frontend.outline import outline
from lwc.verify.structure.well_formed import verify_structure


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def notes(module: lwc.Module) -> list[str]:
    return [remark.message for remark in module.remarks]


def test_anonymous_input_dims_each_get_a_name() -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
    g (float[a, b, c, d, 3] x, float[e] x2) => (float[f, a] y) { y = Op_(x, x2) }""".replace(
            "Op_", "Mul"
        )
    )
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_param = "?"
    dims[1].dim_param = "None"
    dims[2].dim_value = -1
    dims[3].dim_param = "unk__7"
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "x_d0"
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "?"
    module = from_proto(proto)
    first, second = module.graph.inputs
    assert first.shape is not None
    names = [dim if isinstance(dim, int) else dim.value for dim in first.shape]
    assert names == ["x_d0_", "x_d1", "x_d2", "x_d3", 3]
    assert second.shape == ir.Shape(["x_d0"])
    assert module.graph.outputs[0].shape == ir.Shape([None, "a"])
    assert any("x[2] = -1" in note for note in notes(module))
    # The caller's model is left alone.
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "?"


def test_anonymous_intermediate_dims_are_unknown() -> None:
    proto = parse("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x) => (float[n] y) <float[h] t> { t = Relu(x) y = Neg(t) }""")
    proto.graph.value_info[0].type.tensor_type.shape.dim[0].dim_param = "?"
    shape = from_proto(proto).graph.node(0).outputs[0].shape
    assert shape is not None
    assert isinstance(shape[0], ir.SymbolicDim)
    assert shape[0].value is None


def test_custom_operators_are_carried_with_one_remark_each() -> None:
    module = from_proto(
        parse("""<ir_version: 8, opset_import: ["" : 17, "my.ops" : 3]>
    g (float[n] x) => (float[n] y) {
      a = my.ops.Twist <angle = 3> (x) b = my.ops.Twist <angle = 4> (a) y = my.ops.Bend (b)
    }""")
    )
    assert notes(module) == [
        "my.ops::Bend (1 uses) is unknown to lwc and is carried through as it is",
        "my.ops::Twist (2 uses) is unknown to lwc and is carried through as it is",
    ]
    assert module.graph.node(1).attributes["angle"].value == 4


def test_microsoft_and_function_operators_need_no_remark() -> None:
    module = from_proto(
        parse("""<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1, "d" : 1]>
    g (float[n] x) => (float[n] y) { a = com.microsoft.Gelu (x) y = d.f (a) }
    <domain: "d", opset_import: ["" : 17]> f (a) => (b) { b = Relu(a) }""")
    )
    assert not notes(module)
    assert ("d", "f", "") in module.model.functions


def test_runtime_operators_of_the_standard_domain() -> None:
    module = from_proto(
        parse("""<ir_version: 8, opset_import: ["" : 14]>
    g (float[n, 4] x, float[4] s) => (float[n, 4] y) {
      a = SimplifiedLayerNormalization <axis = -1> (x, s) y = LayerNormalization(a, s)
    }""")
    )
    verify_structure(module)


def test_unsorted_graph_is_sorted() -> None:
    proto = parse("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x) => (float[n] y) { t = Relu(x) y = Neg(t) }""")
    proto.graph.node.reverse()
    module = from_proto(proto)
    assert [node.op_type for node in module.graph] == ["Relu", "Neg"]
    assert any("sorted" in note for note in notes(module))
    verify_structure(module)


def test_initializers_of_old_ir_versions_are_constants() -> None:
    proto = parse("""<ir_version: 3, opset_import: ["" : 17]>
    g (float[n, 2] x, float[2] w) => (float[n, 2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }""")
    module = from_proto(proto)
    assert [value.name for value in module.graph.inputs] == ["x"]
    assert not module.graph.initializers["w"].is_graph_input()
    proto.ir_version = 8
    assert len(from_proto(proto).graph.inputs) == 2


BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (bool c, float[n] x) => (float[n] y, float[n] z) {
  t = Relu(x)
  y = If (c) <
    then_branch = a () => (float[n] o) { s = Neg(t) o = Abs(s) },
    else_branch = b () => (float[n] o) { s = Exp(t) o = Abs(s) }
  >
  z = Neg(y)
}"""


def test_names_in_branches_are_made_unique() -> None:
    module = from_proto(parse(BRANCHES))
    names = [value.name for node in module.nodes() for value in node.outputs]
    assert len(names) == len(set(names))
    assert any("2 values in subgraphs" in note for note in notes(module))
    verify_structure(module)
    feed = {"c": np.array(True), "x": np.array([1.0, -2.0], np.float32)}
    session = ort.InferenceSession(ir.serde.serialize_model(module.model).SerializeToString())
    for flag, expected in ((True, [1.0, 0.0]), (False, np.exp([1.0, 0.0]))):
        (y,) = session.run(["y"], {**feed, "c": np.array(flag)})
        np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_text_models(tmp_path: Path) -> None:
    (tmp_path / "m.onnxtxt").write_text(BRANCHES)
    module = lwc.load(tmp_path / "m.onnxtxt")
    assert module.source.format == "onnxtxt"
    assert [node.op_type for node in module.graph] == ["Relu", "If", "Neg"]


def big_model(sizes: list[int], tail: bytes = b"") -> onnx.ModelProto:
    weights = [
        numpy_helper.from_array(np.random.default_rng(i).random(size, np.float32), f"w{i}")
        for i, size in enumerate(sizes)
    ]
    nodes = [helper.make_node("ReduceSum", [w.name], [f"s{w.name}"], keepdims=0) for w in weights]
    nodes.append(helper.make_node("Sum", [f"s{w.name}" for w in weights], ["y"]))
    graph = helper.make_graph(
        nodes, "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_big_inline_weights_stay_in_the_file(tmp_path: Path) -> None:
    proto = big_model([10, 300_000, 3, 20_000])
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    module = lwc.load(path)
    tensors = {name: value.const_value for name, value in module.graph.initializers.items()}
    kinds = [isinstance(tensor, FileTensor) for tensor in tensors.values()]
    assert kinds == [False, True, False, True]
    for weight in proto.graph.initializer:
        tensor = tensors[weight.name]
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), numpy_helper.to_array(weight))


def test_outline_keeps_all_but_the_weights() -> None:
    proto = big_model([10, 300_000, 3, 20_000])
    data = proto.SerializeToString()
    outlined = outline(memoryview(data))
    assert set(outlined.weights) == {1, 3}
    for position, (offset, length) in outlined.weights.items():
        assert data[offset : offset + length] == proto.graph.initializer[position].raw_data
        proto.graph.initializer[position].ClearField("raw_data")
    assert onnx.ModelProto.FromString(bytes(outlined.message)) == proto


def test_outline_leaves_odd_messages_whole() -> None:
    data = big_model([300_000]).SerializeToString()
    doubled = data + data
    for odd in (doubled, data[:-5], b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x07"):
        outlined = outline(memoryview(odd))
        assert not outlined.weights
        assert bytes(outlined.message) == odd


def test_models_over_two_gigabytes(tmp_path: Path) -> None:
    """Only what is read of the data file is touched: here it is mostly a hole."""
    rows = 1 << 20
    proto = big_model([4])
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend([rows, 1024])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    tensor.external_data.add(key="offset", value="12")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(12 + rows * 4096)
        file.seek(-4, 2)
        file.write(np.float32(7).tobytes())
    weight = lwc.load(tmp_path / "m.onnx").graph.initializers["w0"].const_value
    assert weight is not None
    assert weight.nbytes == 1 << 32
    assert weight.numpy()[-1, -1] == 7
    assert weight.numpy()[0, 0] == 0


# Opsets


OLD = """<ir_version: 5, opset_import: ["" : 11]>
g (float[n, 3, 4] x) => (float[n, 12] y) <float[12, 512] w, float[512] v> {
  s = Softmax <axis = 1> (x)
  u = Unsqueeze <axes = [0]> (s)
  q = Squeeze <axes = [0]> (u)
  f = Flatten (q)
  y = Dropout <ratio = 0.5> (f)
}"""


def test_old_opset_is_raised() -> None:
    proto = parse(OLD)
    proto.graph.value_info.clear()
    table = numpy_helper.from_array(np.random.default_rng(0).random((12, 12), np.float32), "w")
    proto.graph.initializer.append(table)
    proto.graph.node[4].CopyFrom(helper.make_node("MatMul", ["f", "w"], ["y"]))
    log = RemarkLog()
    module = from_proto(proto, remarks=log)
    assert module.opset == MIN_OPSET
    assert module.remarks is log
    assert notes(module) == ["raised from opset 11 to 13"]
    verify_structure(module)
    weight = module.graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), numpy_helper.to_array(table))
    feed = {"x": np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)}
    raised = ir.serde.serialize_model(module.model).SerializeToString()
    (expected,) = ort.InferenceSession(proto.SerializeToString()).run(None, feed)
    (actual,) = ort.InferenceSession(raised).run(None, feed)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def test_old_opset_in_a_subgraph_is_raised() -> None:
    proto = parse("""<ir_version: 5, opset_import: ["" : 11]>
    g (bool c, float[1, 4] x) => (float[4] y) {
      y = If (c) <
        then_branch = a () => (float[4] p) { p = Squeeze <axes = [0]> (x) },
        else_branch = b () => (float[4] q) { r = Neg(x) q = Squeeze <axes = [0]> (r) }
      >
    }""")
    module = from_proto(proto)
    verify_structure(module)
    squeezes = [node for node in module.nodes() if node.op_type == "Squeeze"]
    assert [len(node.inputs) for node in squeezes] == [2, 2]


def test_opset_that_the_converter_cannot_raise() -> None:
    """A Softmax of unknown rank is rewritten, which fails where a branch uses its output."""
    proto = parse("""<ir_version: 8, opset_import: ["" : 11, "my" : 1]>
    g (bool c, float[n, 4] x) => (float[n, 4] y) {
      z = my.Op (x)
      s = Softmax <axis = 1> (z)
      y = If (c) <
        then_branch = t () => (float[n, 4] a) { a = Relu(s) },
        else_branch = e () => (float[n, 4] b) { b = Neg(s) }
      >
    }""")
    with pytest.raises(InputError, match=r"opset 11.*cannot raise it.*opset 13 or newer"):
        from_proto(proto)


def test_old_opset_with_functions_is_refused() -> None:
    proto = parse("""<ir_version: 9, opset_import: ["" : 11, "d" : 1]>
    g (float[n] x) => (float[n] y) { y = d.f (x) }
    <domain: "d", opset_import: ["" : 11]> f (a) => (b) { b = Relu(a) }""")
    with pytest.raises(InputError, match="functions"):
        from_proto(proto)


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("ch_PP-OCRv4_det_infer", 0),
        ("ch_PP-OCRv4_rec_infer", 9),
        ("ch_ppocr_mobile_v2.0_cls_infer", 3),
    ],
)
def test_rapidocr_models_are_raised(
    model_file: Callable[[str], Path], name: str, extra: int
) -> None:
    """Same outputs bit for bit, and only what Softmax needs more."""
    path = model_file(name)
    module = lwc.load(path)
    verify_structure(module)
    original = onnx.load(path)
    count = sum(node.op_type != "Constant" for node in original.graph.node)
    assert sum(node.op_type != "Constant" for node in module.nodes()) <= count + extra
    height = 48 if "det" not in name else 64
    feed = np.random.default_rng(0).standard_normal((2, 3, height, 192)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = [
        ort.InferenceSession(data, options).run(None, {"x": feed})
        for data in (
            path.read_bytes(),
            ir.serde.serialize_model(module.model).SerializeToString(),
        )
    ]
    for before, after in zip(*outputs, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
