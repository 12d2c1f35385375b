"""Targets: interpolation, storage, and predictions made with them."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from onnx import TensorProto, helper

from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.predict import predict
from lwc.analysis.target import Table, Target
from lwc.backends.onnxruntime import measure
from lwc.backends.onnxruntime.measure import measure_target
from lwc.backends.onnxruntime.microbenchmarks import BENCHMARKS, Graph, Weight, build
from lwc.core.errors import InputError, UsageError
from lwc.core.paths import cache_folder
from lwc.frontend.onnx_reader import from_proto

LINE = Table(((10.0, 1000.0),), (1e-9, 1e-11))


def target(**changes) -> Target:
    values = {
        "cpu": "test cpu", "runtime": "test 1", "threads": 1, "bandwidth": 1e9,
        "peak_flops": 1e9, "node_seconds": 1e-6, "run_seconds": 1e-5, "tables": {"binary": LINE},
    }  # fmt: skip
    return Target(**{**values, **changes})


def test_a_table_returns_what_was_measured_at_its_points():
    grid = Table(((1.0, 10.0), (2.0, 20.0)), (1e-9, 2e-9, 3e-9, 4e-9))
    assert grid.time([1, 2]) == pytest.approx(1e-9 * 2)
    assert grid.time([1, 20]) == pytest.approx(2e-9 * 20)
    assert grid.time([10, 2]) == pytest.approx(3e-9 * 20)
    assert grid.time([10, 20]) == pytest.approx(4e-9 * 200)


def test_a_table_interpolates_in_logarithms_and_keeps_efficiency_outside():
    assert LINE.time([100]) == pytest.approx(1e-10 * 100)  # halfway in both logarithms
    assert LINE.time([1]) == pytest.approx(1e-9)
    assert LINE.time([1e6]) == pytest.approx(1e-11 * 1e6)
    assert LINE.time([0]) == 0.0
    with pytest.raises(ValueError, match="axes"):
        LINE.time([1, 2])


def test_a_target_survives_storage(tmp_path):
    path = target().save(tmp_path / "target.json")
    assert Target.load(path) == target()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 999}', '{"format": 1, "cpu": 3}'])
def test_a_damaged_target_is_a_clear_error(tmp_path, text):
    path = tmp_path / "target.json"
    path.write_text(text)
    with pytest.raises(InputError, match="delete the file"):
        Target.load(path)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LWC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    one, two = Target.place("cpu", "rt 1", 1), Target.place("cpu", "rt 1", 2)
    assert one != two
    assert one.parent == tmp_path / "targets"


def add_module(op="Add"):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "x"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, ["n"])],
        [info("y", TensorProto.FLOAT, ["n"])],
    )
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def test_prediction_adds_kernel_node_and_run():
    cost = AnalysisManager(add_module()).get(Cost)
    found = predict(cost, target(), {"n": 1000})
    assert found.seconds == pytest.approx(1e-11 * 1000 + 1e-6 + 1e-5)
    assert found.rooflined == {}


def test_a_kernel_without_a_table_takes_the_roofline_and_is_listed():
    cost = AnalysisManager(add_module()).get(Cost)
    found = predict(cost, target(tables={}), {"n": 1000})
    assert found.seconds == pytest.approx(12 * 1000 / 1e9 + 1e-6 + 1e-5)
    assert found.rooflined == {"binary": 1}


def test_prediction_refuses_a_missing_binding_and_another_thread_count():
    cost = AnalysisManager(add_module()).get(Cost)
    with pytest.raises(UsageError, match="'n'"):
        predict(cost, target(), {})
    with pytest.raises(UsageError, match="threads"):
        predict(cost, target(), {"n": 1}, threads=2)


def test_a_size_that_depends_on_data_leaves_a_node_unpredicted():
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Neg", ["i"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["n"])], [info("y", TensorProto.INT64, None)]
    )
    module = from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    cost = AnalysisManager(module).get(Cost)
    found = predict(cost, target(), {"n": 1000})
    assert found.unpredicted == {"NonZero": 1, "Neg": 1}
    with pytest.raises(UsageError, match="'n'"):
        predict(cost, target(), {})


def test_copies_of_a_weight_differ_without_overflow():
    """Equal weights would be packed once for all copies, which a model does not do."""
    for dtype in (np.int8, np.uint8, np.float32):
        weight = Weight(np.full((128, 256), np.asarray(99, dtype)))
        graph = Graph("MatMul", [np.ones((1, 128), np.float32), weight])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, _, copies = build(graph, 128 * 256)
        first = [bytes(tensor.raw_data[:4]) for tensor in model.graph.initializer]
        assert copies > 50
        assert len(set(first)) == min(copies, 100)


def test_measuring_gives_positive_tables_of_the_right_size():
    chosen = tuple(b for b in BENCHMARKS if b.kernel in ("relu", "copy"))
    found = measure_target(1, benchmarks=chosen)
    assert set(found.tables) == {"relu", "copy"}
    for table in found.tables.values():
        assert len(table.seconds) == math.prod(len(axis) for axis in table.grid)
        assert all(seconds > 0 for seconds in table.seconds)
    assert 1e8 < found.bandwidth < 1e13
    assert json.loads(json.dumps(found.cpu))


def test_past_its_time_a_measurement_runs_each_kernel_once(monkeypatch):
    runs = []
    original = measure._quick

    def counting(times):
        runs.append(len(times))
        return original(times)

    monkeypatch.setattr(measure, "_quick", counting)
    chosen = tuple(b for b in BENCHMARKS if b.kernel == "relu")
    found = measure_target(1, benchmarks=chosen, seconds=0.0)
    assert all(seconds > 0 for seconds in found.tables["relu"].seconds)
    assert runs[-4:] == [1, 1, 1, 1]
