"""The onnxruntime backend: values, exposed values, errors, profiles, weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support import module_of

from lwc.backends.base import Backend, Executable
from lwc.backends.onnxruntime.packing import pack
from lwc.backends.onnxruntime.profile import node_times
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend, make_runner
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.weights import DataFile, FileTensor, stored_bytes

Array = np.ndarray[Any, Any]

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


def parse(text: str) -> Module:
    return Module(ir.from_onnx_text(HEADER + text))


def linear(weight: ir.TensorProtocol | Array) -> Module:
    """y = Relu(x @ w) with the given weight `[rows, columns]`."""
    rows, columns = tuple(weight.shape)
    module = parse(
        f"g (float[n, {rows}] x) => (float[n, {columns}] y)\n"
        f"<float[1] other = {{0}}> {{ [product] h = MatMul(x, x) y = Relu(h) }}"
    )
    product = module.graph[0]
    product.replace_input_with(1, module.add_initializer("w", weight))
    return module


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(0).standard_normal((64, 48), np.float32)


@pytest.fixture
def x() -> Array:
    return np.random.default_rng(1).standard_normal((5, 64), np.float32)


def in_memory(array: Array, folder: Path) -> ir.TensorProtocol:
    return ir.Tensor(array)


def in_file(array: Array, folder: Path) -> ir.TensorProtocol:
    (folder / "w.data").write_bytes(b"\0" * 100 + array.tobytes())
    return ir.ExternalTensor(
        "w.data", 100, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="w",
        base_dir=folder,
    )  # fmt: skip


def in_store(array: Array, folder: Path) -> ir.TensorProtocol:
    store = Module(ir.from_onnx_text(HEADER + "g () => () {}")).store
    store.put(np.zeros(10, np.float32))
    return store.put(array)


def in_data_file(array: Array, folder: Path) -> ir.TensorProtocol:
    (folder / "d.data").write_bytes(b"\0" * 100 + array.tobytes())
    file = DataFile(folder / "d.data")
    return cast(ir.TensorProtocol, FileTensor(file, 100, ir.DataType.FLOAT, array.shape, "w"))


@pytest.mark.parametrize("place", [in_memory, in_file, in_store, in_data_file])
@pytest.mark.parametrize("optimize", ["all", "basic", "none"])
def test_runs_with_weights_wherever_they_lie(
    place: Callable[[Array, Path], ir.TensorProtocol],
    optimize: Any,
    weight: Array,
    x: Array,
    tmp_path: Path,
) -> None:
    module = linear(place(weight, tmp_path))
    before = module.fingerprint()
    with OnnxRuntimeBackend().compile(module, threads=1, optimize=optimize) as compiled:
        result = compiled.run({"x": x})
    assert list(result) == ["y"]
    np.testing.assert_allclose(result["y"], np.maximum(x @ weight, 0), rtol=1e-5, atol=1e-5)
    assert module.fingerprint() == before


def test_big_weights_stay_out_of_the_protobuf_and_are_not_copied(weight: Array) -> None:
    tensor = ir.Tensor(weight)
    packed = pack(linear(tensor))
    assert list(packed.weights.values()) == [tensor]
    assert len(packed.graph) < 1000 < weight.nbytes
    assert np.shares_memory(stored_bytes(tensor), weight)


def test_onnxruntime_maps_data_files_itself(weight: Array, tmp_path: Path) -> None:
    packed = pack(linear(in_data_file(weight, tmp_path)))
    assert list(packed.files) == ["d.data"]
    assert not packed.weights
    assert not packed.attach(ort.SessionOptions())


def test_data_files_of_two_folders(weight: Array, x: Array, tmp_path: Path) -> None:
    module = linear(in_data_file(weight, tmp_path))
    (tmp_path / "other").mkdir()
    module.add_initializer("v", in_data_file(weight + 1, tmp_path / "other"))
    module.graph[1].replace_input_with(0, module.graph[0].outputs[0])
    packed = pack(module)
    assert (list(packed.files), list(packed.weights)) == (["d.data"], ["weight_0"])
    with OnnxRuntimeBackend().compile(module, expose=["v"]) as compiled:
        found = compiled.run({"x": x})
    np.testing.assert_array_equal(found["v"], weight + 1)
    np.testing.assert_allclose(found["y"], np.maximum(x @ weight, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["replaced", "removed", "linked"])
def test_the_file_that_was_opened_is_what_runs(
    change: str, weight: Array, x: Array, tmp_path: Path
) -> None:
    path = tmp_path / "d.data"
    module = linear(in_data_file(weight, tmp_path))
    if change == "linked":
        (tmp_path / "hub").mkdir()
        path.rename(tmp_path / "hub" / "1f2e")
        path.symlink_to(tmp_path / "hub" / "1f2e")
        module = linear(
            cast(
                ir.TensorProtocol,
                FileTensor(DataFile(path), 100, ir.DataType.FLOAT, weight.shape, "w"),
            )
        )
    packed = pack(module)
    if change == "replaced":
        (tmp_path / "new").write_bytes(bytes(100 + weight.nbytes))
        (tmp_path / "new").replace(path)
    elif change == "removed":
        path.unlink()
    assert len(packed.attach(ort.SessionOptions())) == (change != "linked")
    with OnnxRuntimeBackend().compile(module) as compiled:
        y = compiled.run({"x": x})["y"]
    np.testing.assert_allclose(y, np.maximum(x @ weight, 0), rtol=1e-5, atol=1e-5)


def test_stored_bytes_maps_what_lies_on_disk(weight: Array, tmp_path: Path) -> None:
    for place in (in_file, in_store):
        found = stored_bytes(place(weight, tmp_path))
        assert found.tobytes() == weight.tobytes()
        assert not found.flags.owndata
        assert not found.flags.writeable


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_packed_sub_byte_weights(name: str) -> None:
    low = -8 if name == "int4" else 0
    numbers = np.random.default_rng(0).integers(low, low + 16, (128, 33))
    module = parse(
        "g (float[n, 128] x) => (float[n, 33] y) <float s = {0.5}>\n"
        "{ w = DequantizeLinear(s, s) y = MatMul(x, w) }"
    )
    quantized = module.add_initializer("q", numbers.astype(getattr(ml_dtypes, name)))
    module.graph[0].replace_input_with(0, quantized)
    x = np.random.default_rng(1).standard_normal((3, 128), np.float32)
    assert len(pack(module).weights) == 1
    with OnnxRuntimeBackend().compile(module, optimize="none") as compiled:
        y = compiled.run({"x": x})["y"]
    np.testing.assert_allclose(y, x @ (0.5 * numbers.astype(np.float32)), rtol=1e-5, atol=1e-3)


def test_dequantized_weights_keep_float_activations() -> None:
    """ONNX Runtime's default turns these into MatMulNBits with int8 activations, off by ~1 %."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(-8, 8, (256, 64))
    module = parse(
        "g (float[n, 256] x) => (float[n, 64] y) <float s = {0}>\n"
        "{ w = DequantizeLinear<axis=0, block_size=32>(s, s) y = MatMul(x, w) }"
    )
    node = module.graph[0]
    node.replace_input_with(0, module.add_initializer("q", numbers.astype(ml_dtypes.int4)))
    scales = rng.uniform(0.5, 1.5, (8, 64)).astype(np.float32)
    node.replace_input_with(1, module.add_initializer("scales", scales))
    x = rng.standard_normal((3, 256), np.float32)
    expected = x @ (numbers * np.repeat(scales, 32, axis=0)).astype(np.float32)
    error = {}
    for level in ("0", "4"):
        config = {"session.qdq_matmulnbits_accuracy_level": level} if level == "4" else {}
        with OnnxRuntimeBackend().compile(module, config=config) as compiled:
            error[level] = np.abs(compiled.run({"x": x})["y"] - expected).max()
            ops = {entry.op for entry in compiled.profile({"x": x}, runs=1)}
            assert ops == {"MatMulNBits"}
    assert error["0"] < 1e-3
    assert error["4"] > 1e-2


def test_weights_of_subgraphs(x: Array) -> None:
    weights = np.random.default_rng(3).standard_normal((2, 64, 64), np.float32)
    module = parse(
        "g (float[n, 64] x, bool c) => (float[n, 64] y)\n"
        "{ y = If (c) <then_branch = yes () => (float[n, 64] a) { a = Identity(x) },"
        " else_branch = no () => (float[n, 64] b) { b = Identity(x) }> }"
    )
    branches = [
        module.graph[0].attributes[name].as_graph() for name in ("then_branch", "else_branch")
    ]
    for branch, array in zip(branches, weights, strict=True):
        value = module.add_initializer("w", array, graph=branch)
        output = branch.outputs[0]
        node = ir.Node("", "MatMul", [module.graph.inputs[0], value])
        node.outputs[0].name = output.name
        node.outputs[0].type = output.type
        branch.outputs[0] = node.outputs[0]
        branch.remove(branch[0])
        branch.append(node)
    with OnnxRuntimeBackend().compile(module) as compiled:
        for index, flag in enumerate((True, False)):
            y = compiled.run({"x": x, "c": np.array(flag)})["y"]
            np.testing.assert_allclose(y, x @ weights[index], rtol=1e-4, atol=1e-4)


def test_exposes_any_value_of_the_main_graph(weight: Array, x: Array) -> None:
    module = linear(weight)
    with make_runner(module, ["h", "w", "x", "y", "h"]) as runner:
        result = runner.run({"x": x})
        assert sorted(result) == ["h", "w", "x", "y"]
        np.testing.assert_allclose(result["h"], x @ weight, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(result["w"], weight)
        np.testing.assert_array_equal(result["x"], x)
        assert list(runner.run({"x": x}, ["h"])) == ["h"]
    assert [value.name for value in module.graph.outputs] == ["y"]


def test_exposing_an_unknown_value_is_an_error(weight: Array) -> None:
    with pytest.raises(LwcError, match="no value 'nothing' in the main graph"):
        OnnxRuntimeBackend().compile(linear(weight), expose=["nothing"])


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"lacks input 'x' \(it is float \[n, 64\]\)"),
        ({"x": 1, "z": 1}, r"'z', which is no input \(the inputs are x\)"),
        ({"x": np.ones((2, 64))}, r"'x' was fed .*float64 \(feed float \[n, 64\]\)"),
        ({"x": np.ones((2, 63), np.float32)}, r"'x' was fed .*\[2, 63\]"),
        ({"x": np.ones(64, np.float32)}, r"'x' was fed .*\[64\]"),
        ({"x": np.array([["a"] * 64])}, r"'x' was fed .*string"),
    ],
)
def test_feed_errors_name_the_input_and_what_it_wants(
    feed: dict[str, Any], message: str, weight: Array
) -> None:
    with (
        OnnxRuntimeBackend().compile(linear(weight)) as compiled,
        pytest.raises(LwcError, match=message),
    ):
        compiled.run(feed)


def test_failing_node_is_named() -> None:
    module = parse(
        "g (float[4, 2] table, int64[n] ids) => (float[n, 2] y)\n"
        "{ [look_up] y = Gather(table, ids) }"
    )
    feed = {"table": np.zeros((4, 2), np.float32), "ids": np.array([9])}
    with OnnxRuntimeBackend().compile(module) as compiled:
        with pytest.raises(LwcError) as caught:
            compiled.run(feed)
        with pytest.raises(LwcError, match="look_up"):
            compiled.profile(feed)
    assert caught.value.node == "Gather 'look_up'"
    assert "\n" not in str(caught.value)


def test_refused_module_names_the_node() -> None:
    module = parse("g (float[n] x) => (float[n] y) { [odd] y = com.microsoft.NoSuchOp(x) }")
    with pytest.raises(LwcError) as caught:
        OnnxRuntimeBackend().compile(module)
    assert "NoSuchOp" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unnamed_nodes_are_reported_by_their_output() -> None:
    module = parse("g (float[2] x, int64[1] s) => (float[k] y) { y = Reshape(x, s) }")
    module.graph[0].name = ""
    with (
        OnnxRuntimeBackend().compile(module) as compiled,
        pytest.raises(LwcError) as caught,
    ):
        compiled.run({"x": np.zeros(2, np.float32), "s": np.array([3])})
    assert caught.value.node == "Reshape 'y'"
    assert module.graph[0].name == ""


def test_unknown_output_and_closed_executable(weight: Array, x: Array) -> None:
    compiled = OnnxRuntimeBackend().compile(linear(weight))
    with pytest.raises(LwcError, match=r"'h' is no output.*expose="):
        compiled.run({"x": x}, ["h"])
    compiled.close()
    with pytest.raises(LwcError, match="closed"):
        compiled.run({"x": x})


def test_profile_lists_nodes_with_times_and_calls(
    weight: Array, x: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with OnnxRuntimeBackend().compile(linear(weight), optimize="none") as compiled:
        times = compiled.profile({"x": x}, runs=3)
    assert [(entry.node, entry.op, entry.calls) for entry in times] == [
        ("product", "MatMul", 1),
        ("y", "Relu", 1),
    ]
    assert all(0 <= entry.seconds < 1 for entry in times)
    assert os.listdir(tmp_path) == []


def test_profile_counts_calls_in_a_loop() -> None:
    module = parse(
        "g (float[2] x) => (float[2] y) <int64 trips = {7}, bool go = {1}>\n"
        "{ y = Loop (trips, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t)"
        " { d = Identity(c) [step] t = Add(s, s) }> }"
    )
    with OnnxRuntimeBackend().compile(module, optimize="none") as compiled:
        feed = {"x": np.ones(2, np.float32)}
        np.testing.assert_array_equal(compiled.run(feed)["y"], [128, 128])
        calls = {entry.node: entry.calls for entry in compiled.profile(feed, runs=2)}
    assert calls["step"] == 7
    assert calls["y"] == 1


def test_node_times_leave_warm_up_out_and_take_the_median() -> None:
    events: list[dict[str, Any]] = []
    for run, micros in enumerate((900, 10, 30, 20)):
        start = 1000 * run
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 950})
        for part in range(2):
            events.append(
                {"cat": "Node", "name": "a_kernel_time", "ts": start + 1 + part, "dur": micros,
                 "args": {"op_name": "Add"}}
            )  # fmt: skip
    (found,) = node_times(events, runs=3)
    assert (found.node, found.op, found.calls) == ("a", "Add", 2)
    assert found.seconds == pytest.approx(40e-6)


def test_bound_call_runs_in_place(weight: Array, x: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[ort.OrtValue] = []
    make = ort.OrtValue.ortvalue_from_numpy

    def recorded(array: Array) -> ort.OrtValue:
        bound.append(make(array))
        return bound[-1]

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", recorded)
    with OnnxRuntimeBackend().compile(linear(weight), threads=1) as compiled:
        wanted = compiled.run({"x": -x})["y"]
        call = compiled.bind({"x": x})
        given, result = bound
        given.update_inplace(-x)
        assert not np.array_equal(result.numpy(), wanted)
        call()
        np.testing.assert_array_equal(result.numpy(), wanted)


def test_bind_takes_scalars() -> None:
    module = parse(
        "g (float[n] x, int64 y) => (float[m] z) <int64[1] axis = {0}, int64[1] far = {100}>\n"
        "{ begin = Unsqueeze(y, axis) z = Slice(x, begin, far) }"
    )
    module.graph.inputs[1].shape = ir.Shape([])
    with OnnxRuntimeBackend().compile(module) as compiled:
        compiled.bind({"x": np.ones(3, np.float32), "y": np.array(2)})()


def test_bind_takes_string_outputs() -> None:
    module = parse("g (string[n] x) => (string[n] y) { y = Identity(x) }")
    with OnnxRuntimeBackend().compile(module) as compiled:
        feed = {"x": np.array(["a", "b"], object)}
        assert list(compiled.run(feed)["y"]) == ["a", "b"]
        compiled.bind(feed)()


def test_optional_input_with_default_may_be_left_out() -> None:
    module = parse("g (float[2] x, float[2] b = {1, 2}) => (float[2] y) { y = Add(x, b) }")
    with OnnxRuntimeBackend().compile(module) as compiled:
        zeros = np.zeros(2, np.float32)
        np.testing.assert_array_equal(compiled.run({"x": zeros})["y"], [1, 2])
        np.testing.assert_array_equal(compiled.run({"x": zeros, "b": zeros})["y"], [0, 0])


def test_folding_would_copy_a_shared_table() -> None:
    module = parse(
        "g (float[n, 16] x, int64[m] ids) => (float[n, k] y, float[m, k] rows)\n"
        "<int64[2] shape = {16, 32768}>\n"
        "{ rows = Gather(x, ids) table = Reshape(x, shape) y = MatMul(x, table) }"
    )
    assert pack(module).disabled_optimizers == ()
    shared = module.add_initializer("shared", np.zeros((32768, 16), np.float32))
    module.graph[0].replace_input_with(0, shared)
    module.graph[1].replace_input_with(0, shared)
    assert pack(module).disabled_optimizers == ("ConstantFolding",)
    with OnnxRuntimeBackend().compile(module) as compiled:
        feed = {"x": np.ones((1, 16), np.float32), "ids": np.array([3])}
        ops = [entry.op for entry in compiled.profile(feed, runs=1)]
    assert "Reshape" in ops


def test_executable_and_backend_satisfy_the_protocols(weight: Array) -> None:
    backend: Backend = OnnxRuntimeBackend()
    with backend.compile(linear(weight)) as executable:
        kept: Executable = executable
    with pytest.raises(LwcError):
        kept.run({})


def test_a_loop_that_never_ends_fails_in_time() -> None:
    module = module_of(
        """g (float[N] x) => (float[N] y) <bool go = {1}>
        { y = Loop(, go, x) <body = b (int64 i, bool c, float[N] s) => (bool d, float[N] t)
          { d = Identity(c) t = Neg(s) }> }"""
    )
    with (
        OnnxRuntimeBackend().compile(module, optimize="none", time_limit=0.5) as executable,
        pytest.raises(LwcError),
    ):
        executable.run({"x": np.ones(3, np.float32)})
