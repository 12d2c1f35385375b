"""Hostile and damaged files: each gets an InputError of one line, never another exception."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import lwc
from lwc.core.errors import InputError
from lwc.frontend.onnx_reader import from_proto

SIMPLE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
  t = Mul(x, w)
  y = Relu(t)
}"""


def simple() -> onnx.ModelProto:
    return onnx.parser.parse_model(SIMPLE)


def write(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def refused(path: Path | str, *words: str, follow_symlinks: bool = False) -> InputError:
    """Assert that a file is refused in one line that names it and holds `words`."""
    with pytest.raises(InputError) as caught:
        lwc.load(path, follow_symlinks=follow_symlinks)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    for word in words:
        assert word in line, f"'{word}' not in: {line}"
    assert caught.value.exit_code == 2
    return caught.value


def refused_proto(proto: onnx.ModelProto, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        from_proto(proto)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, f"'{word}' not in: {line}"


# Files that are no model


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "no.onnx", "does not exist", "check the path")
    refused(tmp_path / "no.onnxtxt", "does not exist")
    refused(tmp_path / "no", "does not exist")


def test_empty(tmp_path: Path) -> None:
    for name in ("e.onnx", "e.onnxtxt"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "is empty")


def test_folder_and_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    refused(tmp_path / "m.onnx", "neither model.onnx nor config.json")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")
    (tmp_path / "m.h5").write_bytes(b"x")
    refused(tmp_path / "m.h5", "'.h5'", "give a .onnx")
    refused("bad\0name.onnx", "cannot be read")


def test_text_named_onnx(tmp_path: Path) -> None:
    path = tmp_path / "t.onnx"
    path.write_text("This is a text, not a model.\n" * 20)
    refused(path, "a text file")


def test_random_bytes(tmp_path: Path) -> None:
    generator = random.Random(7)
    for size in (1, 10, 1000, 100_000, 2_000_000):
        path = tmp_path / f"r{size}.onnx"
        path.write_bytes(generator.randbytes(size))
        refused(path)


def test_truncated_everywhere(tmp_path: Path) -> None:
    whole = simple().SerializeToString()
    path = tmp_path / "t.onnx"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        refused(path)


def test_truncated_big_weights(tmp_path: Path) -> None:
    proto = simple()
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((1024, 512), "f4"), "big"))
    whole = proto.SerializeToString()
    path = tmp_path / "t.onnx"
    for size in (len(whole) - 1, len(whole) // 2, 5000):
        path.write_bytes(whole[:size])
        refused(path, "truncated or not an ONNX model")


def test_more_than_protobuf_holds(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    refused(path, "2 GiB", "external data")


def test_text_model_errors(tmp_path: Path) -> None:
    path = tmp_path / "m.onnxtxt"
    path.write_text("<ir_version: 8> nonsense {{{")
    refused(path, "cannot be parsed")
    path.write_text(SIMPLE.replace("(t)", "(é t"), encoding="utf-8")
    line = str(refused(path, "cannot be parsed: line 4, column 12: "))
    assert line.endswith("Expected character ) not found, in 'y = Relu(é t'")
    path.write_text(SIMPLE.replace("w = {1", f"w = {{{'1, ' * 9000}?, 1"))
    line = str(refused(path, "cannot be parsed: line 2, column 27053: ", "1, 1, ?, 1, 2"))
    assert len(line) < 500
    path.write_text("<ir_version: 99999999999999999999>")
    refused(path, "cannot be parsed: a number is out of range")
    path.write_bytes(b"\xff\xfe\x00")
    refused(path, "UTF-8")
    path.write_text("<" + "seq(" * 100_000)
    refused(path, "nests too deeply")


# Graphs


def test_cycle() -> None:
    proto = simple()
    proto.graph.node[0].input[1] = "y"
    refused_proto(proto, "cycle", "Mul -> 't'")


def test_cycle_through_a_subgraph() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["late"], ["inner"])],
        "b",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
            helper.make_node("Relu", ["y"], ["late"]),
        ],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    refused_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), "cycle", "If -> 'y'"
    )


def test_value_defined_twice() -> None:
    proto = simple()
    proto.graph.node[1].output[0] = "t"
    refused_proto(proto, "'t' is defined twice", "Relu")


@pytest.mark.parametrize("field", ["input", "initializer"])
def test_duplicate_names(field: str) -> None:
    proto = simple()
    items = getattr(proto.graph, field)
    items.append(items[0])
    refused_proto(proto, "defined twice", items[0].name)


def test_output_shadows_input() -> None:
    proto = simple()
    proto.graph.node[0].output[0] = "x"
    refused_proto(proto, "'x' is defined twice")


def test_undefined_input_and_output() -> None:
    proto = simple()
    proto.graph.node[1].input[0] = "nowhere"
    refused_proto(proto, "Relu -> 'y'", "'nowhere'")
    proto = simple()
    proto.graph.output[0].name = "nothing"
    refused_proto(proto, "graph output 'nothing'")


def test_no_stray_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    proto = simple()
    proto.graph.node[1].input[0] = "nowhere"
    with caplog.at_level(logging.WARNING), pytest.raises(InputError):
        from_proto(proto)
    assert not caplog.records


def test_unknown_standard_operator() -> None:
    proto = simple()
    proto.graph.node[1].op_type = "Relux"
    refused_proto(proto, "Relux -> 'y'", "opset 17")
    proto.graph.node[1].op_type = "Gelu"
    refused_proto(proto, "Gelu", "opset 17")
    proto.opset_import[0].version = 20
    from_proto(proto)


def test_wrong_signature() -> None:
    proto = simple()
    proto.graph.node[1].input.append("x")
    refused_proto(proto, "2 inputs, 1 expected")
    proto = simple()
    proto.graph.node[1].attribute.append(helper.make_attribute("slope", 1.0))
    refused_proto(proto, "'slope'")
    proto = simple()
    proto.graph.node[1].op_type = "Softmax"
    proto.graph.node[1].attribute.append(helper.make_attribute("axis", 1.5))
    refused_proto(proto, "'axis' has the wrong type")
    proto = simple()
    proto.graph.node[1].op_type = "Cast"
    refused_proto(proto, "lacks the attribute 'to'")


def test_opset_imports() -> None:
    proto = simple()
    del proto.opset_import[:]
    refused_proto(proto, "imports no opset")
    proto = simple()
    proto.opset_import[0].version = 999
    refused_proto(proto, "opset 999", "upgrade onnx")
    proto = simple()
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 16))
    refused_proto(proto, "two versions")
    proto = simple()
    proto.opset_import[0].version = -3
    refused_proto(proto, "version -3")
    proto = simple()
    proto.graph.node[1].domain = "ai.onnx.ml"
    refused_proto(proto, "'ai.onnx.ml'", "does not import")


def test_no_graph_and_no_version() -> None:
    proto = simple()
    proto.ClearField("graph")
    refused_proto(proto, "no graph")
    proto = simple()
    proto.ClearField("ir_version")
    refused_proto(proto, "no IR version")


def nested(depth: int) -> onnx.ModelProto:
    body = "o0 = Identity(c)"
    for level in range(1, depth):
        body = (
            f"o{level} = If (c) <then_branch = t{level} () => (bool o{level - 1}) {{ {body} }},"
            f" else_branch = e{level} () => (bool e{level}) {{ e{level} = Not(c) }}>"
        )
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (bool c) => (bool o{depth - 1}) {{ {body} }}'
    )


def test_nesting_bomb(tmp_path: Path) -> None:
    from_proto(nested(8))
    path = tmp_path / "n.onnx"
    head = b""
    for _ in range(5000):
        inner = b"\x0a" + _length(len(head)) + head
        attribute = b"\x32" + _length(len(inner)) + inner + b"\xa0\x01\x05"
        head = b"\x22\x02If\x2a" + _length(len(attribute)) + attribute
    graph = b"\x0a" + _length(len(head)) + head
    path.write_bytes(b"\x08\x08\x42\x02\x10\x11\x3a" + _length(len(graph)) + graph)
    refused(path)


def _length(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_recursive_function() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
    g (float[4] x) => (float[4] y) { y = d.f(x) }
    <domain: "d", opset_import: ["" : 17, "d" : 1]> f (a) => (b) { b = d.h(a) }
    <domain: "d", opset_import: ["" : 17, "d" : 1]> h (a) => (b) { b = d.f(a) }""")
    refused_proto(proto, "calls itself")


def test_recursive_function_through_a_branch() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
    g (bool c) => (bool y) { y = d.f(c) }
    <domain: "d", opset_import: ["" : 17, "d" : 1]> f (a) => (b) {
      b = If (a) <
        then_branch = t () => (bool p) { p = d.f(a) },
        else_branch = e () => (bool q) { q = Not(a) }
      >
    }""")
    refused_proto(proto, "function 'f' calls itself")


def test_types_that_lwc_does_not_read() -> None:
    proto = simple()
    proto.graph.output[0].type.map_type.key_type = TensorProto.INT64
    refused_proto(proto, "'y' is a map")
    proto = simple()
    proto.graph.output[0].type.tensor_type.elem_type = 4000
    refused_proto(proto, "unknown element type 4000")
    proto = simple()
    proto.graph.sparse_initializer.add()
    refused_proto(proto, "sparse")


def test_interface_without_types() -> None:
    proto = simple()
    proto.graph.output[0].ClearField("type")
    refused_proto(proto, "'y' has no type")
    proto = simple()
    proto.graph.input[0].type.tensor_type.ClearField("elem_type")
    refused_proto(proto, "'x' has no type")
    proto = simple()
    del proto.graph.output[:]
    refused_proto(proto, "no graph outputs")


def test_attributes_without_type_and_text_that_is_not_utf8(tmp_path: Path) -> None:
    proto = simple()
    proto.graph.node[1].domain = "my"
    proto.opset_import.append(helper.make_opsetid("my", 1))
    proto.graph.node[1].attribute.add(name="k")
    refused_proto(proto, "'k' has unknown type 0")
    path = tmp_path / "m.onnx"
    for name in (b"Relu", b"\x0a\x01t"):
        damaged = simple().SerializeToString().replace(name, name[:-1] + b"\xff")
        path.write_bytes(damaged)
        refused(path, "not UTF-8")


# Tensors


def with_tensor(change: Callable[[TensorProto], None]) -> onnx.ModelProto:
    proto = simple()
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    change(tensor)
    proto.graph.initializer[0].CopyFrom(tensor)
    return proto


def test_tensor_shapes() -> None:
    def dims(*extents: int) -> Callable[[TensorProto], None]:
        def change(tensor: TensorProto) -> None:
            del tensor.dims[:]
            tensor.dims.extend(extents)

        return change

    refused_proto(with_tensor(dims(-4)), "negative extent", "'w'")
    refused_proto(with_tensor(dims(5)), "needs 20 bytes but has 16")
    refused_proto(with_tensor(dims(2**62, 2**62)), "needs", "but has 16")
    refused_proto(with_tensor(dims(2**32, 2**32)), "but has 16")
    refused_proto(with_tensor(dims(0)), "needs 0 bytes")

    def empty(*extents: int) -> Callable[[TensorProto], None]:
        def change(tensor: TensorProto) -> None:
            dims(*extents)(tensor)
            tensor.raw_data = b""

        return change

    refused_proto(with_tensor(empty(0, 2**62)), "'w'", "absurd shape")
    from_proto(with_tensor(empty(0, 2**40)))
    from_proto(with_tensor(dims(2, 2)))


def test_inputs_that_contradict_their_initializers() -> None:
    def with_input(kind: int, *extents: int | str) -> onnx.ModelProto:
        proto = simple()
        proto.graph.input.append(helper.make_tensor_value_info("w", kind, extents))
        return proto

    refused_proto(with_input(TensorProto.INT64, 4), "'w'", "INT64", "FLOAT", "(export")
    refused_proto(with_input(TensorProto.FLOAT, 5), "'w'", "[5]", "[4]")
    refused_proto(with_input(TensorProto.FLOAT, 1, 4), "'w'", "[1, 4]", "[4]")
    from_proto(with_input(TensorProto.FLOAT, 4))
    from_proto(with_input(TensorProto.FLOAT, "any"))
    shapeless = with_input(TensorProto.FLOAT)
    shapeless.graph.input[1].type.tensor_type.ClearField("shape")
    from_proto(shapeless)


def test_tensor_content() -> None:
    refused_proto(with_tensor(lambda t: setattr(t, "data_type", 0)), "unknown element type 0")
    refused_proto(with_tensor(lambda t: setattr(t, "data_type", 777)), "unknown element type 777")
    refused_proto(with_tensor(lambda t: setattr(t, "raw_data", b"abc")), "has 3")
    refused_proto(with_tensor(lambda t: t.ClearField("raw_data")), "needs 4 numbers but has 0")
    refused_proto(with_tensor(lambda t: setattr(t, "name", "")), "no name")

    def wrong_field(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.int64_data.extend([1, 2, 3, 4])

    refused_proto(with_tensor(wrong_field), "needs 4 numbers but has 0")


def test_strings_with_raw_bytes(tmp_path: Path) -> None:
    def raw(size: int) -> Callable[[TensorProto], None]:
        def change(tensor: TensorProto) -> None:
            tensor.data_type = TensorProto.STRING
            tensor.raw_data = bytes(size)
            tensor.string_data.extend([b"a"] * 4)

        return change

    refused_proto(with_tensor(raw(16)), "'w'", "raw bytes")
    refused(write(tmp_path / "m.onnx", with_tensor(raw(2 << 20))), "'w'", "raw bytes")


def test_constant_node_content() -> None:
    proto = simple()
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "c")
    tensor.raw_data = b"123"
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], name="k", value=tensor))
    refused_proto(proto, "Constant 'k'", "needs 16 bytes but has 3")


# External data


def external(folder: Path, entries: dict[str, str], name: str = "m.onnx") -> Path:
    def change(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    folder.mkdir(exist_ok=True)
    return write(folder / name, with_tensor(change))


def test_external_data_reads(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"12345" + np.arange(4, dtype=np.float32).tobytes())
    module = lwc.load(external(tmp_path, {"location": "w.bin", "offset": "5", "length": "16"}))
    tensor = module.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), [0, 1, 2, 3])


def test_external_data_missing(tmp_path: Path) -> None:
    refused(external(tmp_path, {"location": "w.bin"}), "'w.bin'", "'w'", "missing")
    refused(external(tmp_path, {}), "names no external data file")
    (tmp_path / "w.bin").mkdir()
    refused(external(tmp_path, {"location": "w.bin"}), "not a regular file")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": "8"}, "ends at byte 24"),
        ({"offset": "99999999999"}, "which has 16 bytes"),
        ({"offset": "-8"}, "offset '-8'"),
        ({"offset": "x"}, "offset 'x'"),
        ({"offset": "9" * 400}, "offset '9999"),
        ({"length": "12"}, "has length 12"),
        ({"length": "20"}, "has length 20"),
    ],
)
def test_external_data_bounds(tmp_path: Path, entries: dict[str, str], words: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    refused(external(tmp_path, {"location": "w.bin", **entries}), words, "'w'")


def test_external_data_too_short(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(15))
    refused(external(tmp_path, {"location": "w.bin"}), "which has 15 bytes", "truncated")


def test_external_data_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(16))
    folder = tmp_path / "model"
    refused(external(folder, {"location": str(secret)}), "absolute path")
    refused(external(folder, {"location": "../secret.bin"}), "outside the model's folder")
    refused(external(folder, {"location": "a/../../secret.bin"}), "outside the model's folder")
    for location in ("C:\\secret.bin", "..\\secret.bin", "\\\\host\\x"):
        refused(external(folder, {"location": location}))
    path = external(folder, {"location": "../secret.bin"})
    refused(path, "outside the model's folder", follow_symlinks=True)


def test_external_data_symlinks(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    path = external(tmp_path / "model", {"location": "w.bin"})
    (tmp_path / "model" / "w.bin").symlink_to(secret)
    refused(path, "symbolic link", "--follow-symlinks")
    tensor = lwc.load(path, follow_symlinks=True).graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), [0, 1, 2, 3])
    refused(external(tmp_path / "m2", {"location": "d/w.bin"}), "missing")
    (tmp_path / "m2" / "d").symlink_to(tmp_path)
    (tmp_path / "w.bin").write_bytes(bytes(16))
    refused(tmp_path / "m2" / "m.onnx", "symbolic link")


def test_external_data_hard_link_inside(tmp_path: Path) -> None:
    path = external(tmp_path / "model", {"location": "w.bin"})
    (tmp_path / "model" / "a.bin").write_bytes(bytes(16))
    os.link(tmp_path / "model" / "a.bin", tmp_path / "model" / "w.bin")
    tensor = lwc.load(path).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().sum() == 0


def test_external_data_without_a_folder() -> None:
    def change(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")

    refused_proto(with_tensor(change), "the model has no path")


def test_external_constant_in_a_subgraph(tmp_path: Path) -> None:
    value = TensorProto(data_type=1, dims=[4], data_location=TensorProto.EXTERNAL, name="v")
    value.external_data.add(key="location", value="../v.bin")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=value)],
        "b",
        [],
        [helper.make_tensor_value_info("k", TensorProto.FLOAT, [4])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["k2"])],
        "e",
        [],
        [helper.make_tensor_value_info("k2", TensorProto.FLOAT, [4])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (tmp_path / "m").mkdir()
    path = write(tmp_path / "m" / "m.onnx", proto)
    refused(path, "outside the model's folder")


# Fuzzing


def _fuzz_bases() -> list[bytes]:
    branchy = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 11, "my" : 1]>
    g (bool c, float[n, 4] x) => (float[n, 4] y) {
      k = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
      z = my.Op <a = 1> (x)
      s = Softmax <axis = 1> (x)
      y = If (c) <
        then_branch = t () => (float[n, 4] a) { a = Relu(s) },
        else_branch = e () => (float[n, 4] b) { b = Neg(s) }
      >
    }""")
    functional = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17, "d" : 1]>
    g (float[n] x) => (float[n] y) <int64[2] w = {1, 2}> { y = d.f <k = 2.0> (x) }
    <domain: "d", opset_import: ["" : 17]>
    f <k> (a) => (b) { c = Constant <value_float: float = @k> () b = Mul(a, c) }""")
    return [p.SerializeToString() for p in (simple(), branchy, functional)]


@pytest.mark.parametrize("base", range(3))
def test_damaged_bytes_never_crash(tmp_path: Path, base: int) -> None:
    """Flip, insert, delete and splice bytes: reading works or raises InputError."""
    whole = _fuzz_bases()[base]
    generator = random.Random(base)
    path = tmp_path / "f.onnx"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(data))
            what = generator.randrange(4)
            if what == 0:
                data[at] ^= 1 << generator.randrange(8)
            elif what == 1:
                data[at] = generator.randrange(256)
            elif what == 2:
                del data[at : at + generator.randint(1, 3)]
            else:
                start = generator.randrange(len(data))
                data[at:at] = data[start : start + generator.randint(1, 12)]
        path.write_bytes(data)
        line = ""
        try:
            lwc.load(path)
        except InputError as error:
            line = str(error)
        outcomes["refused" if line else "read"] += 1
        assert "\n" not in line
    assert outcomes["read"] > 20
    assert outcomes["refused"] > 300


@pytest.mark.models
@pytest.mark.parametrize(
    "name", ["silero_vad_16k_sequence", "silero_vad", "ch_ppocr_mobile_v2.0_cls_infer"]
)
def test_damaged_real_models_never_crash(
    tmp_path: Path, model_file: Callable[[str], Path], name: str
) -> None:
    """Flip bits, mostly near the end and the start, where the structure is; cut the file."""
    whole = model_file(name).read_bytes()
    generator = random.Random(name)
    path = tmp_path / "f.onnx"
    refusals = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 20)):
            near = generator.choice([len(data), 4096])
            at = generator.choice(
                [generator.randrange(near), len(data) - 1 - generator.randrange(near)]
            )
            data[at] = generator.randrange(256)
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            lwc.load(path)
        except InputError:
            refusals += 1
    assert refusals > 20
