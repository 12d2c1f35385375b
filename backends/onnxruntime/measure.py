"""Measures a `Target`: how fast ONNX Runtime's kernels are on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lwc.analysis.target import Table, Target, cpu_name
from lwc.backends.onnxruntime.custom_operators import instruction_set, register
from lwc.backends.onnxruntime.microbenchmarks import BENCHMARKS, Benchmark, build

__all__ = ["load_or_measure", "load_target", "measure_target", "runtime_name"]

_ENOUGH_SECONDS = 0.03
_ENOUGH_RUNS = 5
_TOO_LONG_SECONDS = 0.3


def runtime_name() -> str:
    """Return the runtime as targets name it, with lwc's own kernels where they were built."""
    own = instruction_set()
    return f"onnxruntime {ort.__version__}" + ("" if own is None else f" with lwc {own}")


def load_or_measure(
    threads: int = 1, track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None
) -> Target:
    """Return the target in the user's cache folder, measured and stored there if it is not.

    Args:
        threads: Threads the runtime computes with.
        track: Wraps the loop over benchmarks to show progress; see `measure_target`.

    Raises:
        InputError: The file in the cache folder is damaged.
    """
    target = load_target(threads)
    if target is None:
        target = measure_target(threads, track)
        target.save()
    return target


def load_target(threads: int = 1) -> Target | None:
    """Return the target in the user's cache folder, or None if it was not measured yet.

    Raises:
        InputError: The file in the cache folder is damaged.
    """
    place = Target.place(cpu_name(), runtime_name(), threads)
    return Target.load(place) if place.exists() else None


def measure_target(
    threads: int = 1,
    track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
    benchmarks: tuple[Benchmark, ...] = BENCHMARKS,
    seconds: float = 45.0,
) -> Target:
    """Run the microbenchmarks.

    Kernels that this build of ONNX Runtime lacks get no table.

    Args:
        threads: Threads the runtime computes with.
        track: Given the benchmarks and a description, yields them while showing progress.
        benchmarks: What to measure.
        seconds: How long to take about: past that, where a machine is slow or busy, each kernel
            that is left runs only once after its warm-up.
    """
    start = time.perf_counter()
    run_seconds = _quick(_time(*_tiny(1), threads))
    many = 512
    node_seconds = max(_quick(_time(*_tiny(many), threads)) - run_seconds, 0.0) / (many - 1)
    tables: dict[str, Table] = {}
    peak = 0.0
    for benchmark in track(benchmarks, "measuring kernels") if track else benchmarks:
        try:
            table = _table(benchmark, threads, run_seconds, node_seconds, start + seconds)
        except _UNSUPPORTED:
            continue
        tables[benchmark.kernel] = table
        if benchmark.kernel == "matmul":
            peak = 2.0 / min(table.seconds)
    bandwidth = 2.0 / tables["copy"].seconds[-1] if "copy" in tables else 0.0
    if not peak or not bandwidth:
        peak, bandwidth = peak or 1e9, bandwidth or 1e9
    return Target(
        cpu=cpu_name(),
        runtime=runtime_name(),
        threads=threads,
        bandwidth=bandwidth,
        peak_flops=peak,
        node_seconds=node_seconds,
        run_seconds=run_seconds,
        tables=tables,
        measured_in=time.perf_counter() - start,
    )


_UNSUPPORTED = tuple(
    getattr(ort.capi.onnxruntime_pybind11_state, name)
    for name in ("NotImplemented", "InvalidGraph", "Fail", "InvalidArgument", "RuntimeException")
)


def _table(
    benchmark: Benchmark, threads: int, run_seconds: float, node_seconds: float, end: float
) -> Table:
    seconds = []
    for problem in benchmark.problems():
        graph = benchmark.make(*problem)
        work = math.prod(problem)
        model, feeds, copies = build(graph, work * graph.calls)
        whole = _quick(_time(model, feeds, threads, end)) - run_seconds
        kernel = whole / copies - node_seconds
        least = 1e-9  # a kernel faster than the clock tells still takes a nanosecond
        seconds.append(max(kernel, least) / graph.calls / work)
    return Table(tuple(tuple(float(x) for x in axis) for axis in benchmark.grid), tuple(seconds))


def _time(
    model: ModelProto, feeds: dict[str, Any], threads: int, end: float = math.inf
) -> list[float]:
    """Run a model as it is written, inputs and outputs in place, and return seconds per run.

    One thread is timed by its processor time: other programs on the machine do not count.

    Args:
        model: The model.
        feeds: Its inputs.
        threads: Threads of the session.
        end: When to stop, by `time.perf_counter`; one run is made in any case.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if instruction_set() is not None:
        register(options)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    names = [output.name for output in session.get_outputs()]
    outputs = session.run_with_ort_values(
        names, {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in feeds.items()}
    )
    for name, value in zip(names, outputs, strict=True):
        binding.bind_ortvalue_output(name, value)
    session.run_with_iobinding(binding)
    seconds: list[float] = []
    spent = 0.0
    while not seconds or (
        (spent < _ENOUGH_SECONDS or len(seconds) < _ENOUGH_RUNS)
        and spent < _TOO_LONG_SECONDS
        and time.perf_counter() < end
    ):
        begin = clock()
        session.run_with_iobinding(binding)
        seconds.append(clock() - begin)
        spent += seconds[-1]
    return seconds


def _quick(seconds: list[float]) -> float:
    """Return the lower quartile: the median of an undisturbed machine on a disturbed one."""
    return statistics.quantiles(seconds, n=4)[0] if len(seconds) > 1 else seconds[0]


def _tiny(count: int) -> tuple[ModelProto, dict[str, Any]]:
    """A chain of `count` nodes on 16 numbers, of several operators, as models mix them."""
    turns: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
        ("Add", ["row"], {}),
        ("Transpose", [], {"perm": [1, 0]}),
        ("Mul", ["column"], {}),
        ("Unsqueeze", ["zero"], {}),
        ("Concat", [], {"axis": 0}),
        ("Squeeze", ["zero"], {}),
        ("Slice", ["zero", "four"], {}),
        ("Sigmoid", [], {}),
    )
    nodes = []
    for index in range(count):
        op, rest, attributes = turns[index % len(turns)]
        names = [f"x{index}", *rest]
        nodes.append(helper.make_node(op, names, [f"x{index + 1}"], **attributes))
    constants: dict[str, np.ndarray[Any, Any]] = {
        "row": np.ones((1, 4), np.float32),
        "column": np.ones((4, 1), np.float32),
        "zero": np.array([0], np.int64),
        "four": np.array([4], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [4, 4])],
        [helper.make_empty_tensor_value_info(f"x{count}")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), {
        "x0": np.ones((4, 4), np.float32)
    }
