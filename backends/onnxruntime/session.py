"""The `onnxruntime` backend: compiles a module into an inference session on the CPU."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from lwc.backends.base import NodeTime
from lwc.backends.checks import check_feed, check_outputs
from lwc.backends.onnxruntime.custom_operators import is_native, register
from lwc.backends.onnxruntime.packing import PackedModule, pack
from lwc.core.errors import LwcError

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.module import Module
    from lwc.pipeline.passes import Feed

__all__ = [
    "ORT_ERRORS",
    "OnnxRuntimeBackend",
    "OnnxRuntimeExecutable",
    "Optimize",
    "make_runner",
    "translated",
]

Optimize: TypeAlias = Literal["all", "basic", "none"]

_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_EXACT_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "0"}
"""By default ONNX Runtime turns DequantizeLinear + MatMul into MatMulNBits with int8 activations,
so a weight-only graph would compute something else than it says."""

ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(k for k in vars(ort_errors).values() if isinstance(k, type) and issubclass(k, Exception)),
)
"""What ONNX Runtime raises."""

_NODE_PATTERNS = (
    re.compile(r"while running (?P<op>\S+) node\. Name:'(?P<name>[^']*)'"),
    re.compile(r"In Node, \(\"(?P<name>[^\"]*)\", (?P<op>[^,]+),"),
    re.compile(r"Node ?\((?P<name>[^)]*)\) Op ?\((?P<op>[^)]*)\)"),
    re.compile(r"node with name '(?P<name>[^']*)'"),
    re.compile(r"for (?:the node )?(?P<name>[^:\s]+):(?P<op>\w+)\(\d+\)"),
)


class OnnxRuntimeBackend:
    """Runs modules on ONNX Runtime's CPU kernels."""

    def compile(
        self,
        module: Module,
        *,
        threads: int | None = None,
        expose: Sequence[str] = (),
        optimize: Optimize = "all",
        arena: bool = True,
        memory_pattern: bool = True,
        config: Mapping[str, str] = MappingProxyType({}),
        native: bool = True,
        time_limit: float | None = None,
    ) -> OnnxRuntimeExecutable:
        """Compile `module` into a session.

        Args:
            module: The module; it is not changed.
            threads: Threads of one operator; one per core by default.
            expose: Values of the main graph to return besides the outputs.
            optimize: ONNX Runtime's own graph optimisations: `none` runs the graph as written.
            arena: Keep freed activation memory for the next run.
            memory_pattern: Plan activation memory per input shape.
            config: Session configuration entries, over lwc's own: MatMulNBits that ONNX Runtime
                makes of DequantizeLinear + MatMul stays float32 exact.
            native: Use lwc's own kernels for its operators, where they were built; otherwise these
                run as the functions that they are.
            time_limit: Seconds after which a run fails: for loops that may never end.

        Raises:
            LwcError: ONNX Runtime refuses the module; the message names the node.
        """
        packed = pack(module, expose)
        native = native and is_native(module)

        def options() -> ort.SessionOptions:
            made = ort.SessionOptions()
            made.graph_optimization_level = _LEVELS[optimize]
            made.intra_op_num_threads = threads or 0
            made.inter_op_num_threads = 1
            made.enable_cpu_mem_arena = arena
            made.enable_mem_pattern = memory_pattern
            made.log_severity_level = 4
            for key, text in {**_EXACT_CONFIG, **config}.items():
                made.add_session_config_entry(key, text)
            if native:
                register(made)
            return made

        executable = OnnxRuntimeExecutable(packed, options, _inputs(module), module.source.path)
        executable.time_limit = time_limit
        return executable


def make_runner(module: Module, expose: Sequence[str] = ()) -> OnnxRuntimeExecutable:
    """Compile `module` with extra outputs; what `PassContext.make_runner` takes."""
    return OnnxRuntimeBackend().compile(module, expose=expose)


class OnnxRuntimeExecutable:
    """A session; made by `OnnxRuntimeBackend.compile`."""

    def __init__(
        self,
        packed: PackedModule,
        options: Callable[[], ort.SessionOptions],
        inputs: dict[str, ir.Value],
        file: str | None,
    ) -> None:
        self._packed = packed
        self._options = options
        self._inputs = inputs
        self._file = file
        self.time_limit: float | None = None
        self._session: ort.InferenceSession | None = self._open(options())
        self.output_names: tuple[str, ...] = tuple(
            output.name for output in self._session.get_outputs()
        )

    def run(
        self, feed: Feed, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch and return the named values; all outputs and exposed ones by default.

        Raises:
            LwcError: The feed does not fit the inputs, an output is not known, or a node fails.
        """
        names = list(self.output_names if outputs is None else outputs)
        check_outputs(names, self.output_names, self._file)
        arrays = self._checked(feed)
        session = self.opened()
        try:
            results = self._run_in_time(session, names, arrays)
        except ORT_ERRORS as error:
            raise translated(error, self._file) from error
        return dict(zip(names, results, strict=True))

    def _run_in_time(
        self, session: ort.InferenceSession, names: list[str], arrays: dict[str, Any]
    ) -> list[Any]:
        if self.time_limit is None:
            return list(session.run(names, arrays))
        settings = ort.RunOptions()
        timer = threading.Timer(self.time_limit, setattr, (settings, "terminate", True))
        timer.start()
        try:
            return list(session.run(names, arrays, settings))
        finally:
            timer.cancel()

    def warm_up(self, feed: Feed, runs: int = 3) -> None:
        """Run `feed` a few times, so that caches, pools and lazily packed weights are ready."""
        for _ in range(runs):
            self.run(feed)

    def bind(self, feed: Feed) -> Callable[[], None]:
        """Return a call that runs `feed` with inputs and outputs in place: for timing.

        Outputs keep the shapes of a first run, which is made here. Strings, sequences and maps
        cannot stay in place: with one of them the call is a plain run.
        """
        arrays, results = self._checked(feed), self.run(feed)
        session = self.opened()
        if not all(_is_numeric(value) for value in [*arrays.values(), *results.values()]):
            return lambda: session.run(None, arrays)
        binding = session.io_binding()
        keep: list[ort.OrtValue] = []
        for name, array in arrays.items():
            keep.append(ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C")))
            binding.bind_ortvalue_input(name, keep[-1])
        for name, result in results.items():
            keep.append(ort.OrtValue.ortvalue_from_numpy(result))
            binding.bind_ortvalue_output(name, keep[-1])

        def call(_keep: object = keep) -> None:
            session.run_with_iobinding(binding)

        return call

    def profile(self, feed: Feed, *, runs: int = 5) -> list[NodeTime]:
        """Return what each node costs, in the order of execution.

        A second session is opened for it, since profiling slows a session down. Nodes that ONNX
        Runtime fused or made carry its names.
        """
        from lwc.backends.onnxruntime.profile import profiled

        arrays = self._checked(feed)
        try:
            return profiled(self._open, self._options, arrays, runs)
        except ORT_ERRORS as error:
            raise translated(error, self._file) from error

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        buffers = self._packed.attach(options)
        try:
            session = ort.InferenceSession(
                self._packed.graph,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(self._packed.disabled_optimizers) or None,
            )
        except ORT_ERRORS as error:
            raise translated(error, self._file) from error
        del buffers
        return session

    def opened(self) -> ort.InferenceSession:
        """Return the session.

        Raises:
            LwcError: It is closed.
        """
        if self._session is None:
            raise LwcError("the executable is closed", file=self._file, remedy="compile it again")
        return self._session

    def _checked(self, feed: Feed) -> dict[str, Any]:
        check_feed(self._inputs, feed, self._file)
        return dict(feed)


def _inputs(module: Module) -> dict[str, ir.Value]:
    return {value.name: value for value in module.graph.inputs if value.name}


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "OUS"


def translated(error: Exception, file: str | None) -> LwcError:
    """Turn ONNX Runtime's message into one line that names the node."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    node = None
    for pattern in _NODE_PATTERNS:
        match = pattern.search(text)
        if match:
            groups = match.groupdict()
            node = f"{groups['op']} '{groups['name']}'" if groups.get("op") else groups["name"]
            break
    return LwcError(f"ONNX Runtime: {text}", file=file, node=node)
