"""The `fx` backend: runs a module as a torch.fx.GraphModule, behind the interface of a backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx_ir as ir
import torch

from lwc.backends.base import NodeTime
from lwc.backends.checks import check_array, check_feed, check_outputs
from lwc.backends.fx.walk import lowered
from lwc.core.errors import LwcError
from lwc.core.torch_types import array_of, tensor_of_array

if TYPE_CHECKING:
    from lwc.backends.fx.module import OnnxGraphModule
    from lwc.core.module import Module
    from lwc.pipeline.passes import Feed

__all__ = ["FxBackend", "FxExecutable"]


class FxBackend:
    """Runs modules in PyTorch, operator by operator."""

    def compile(
        self, module: Module, *, threads: int | None = None, expose: Sequence[str] = ()
    ) -> FxExecutable:
        """Lower `module`.

        Args:
            module: The module; it is not changed.
            threads: Threads of one operator, while it runs; PyTorch's choice by default.
            expose: Values of the main graph to return besides the outputs.

        Raises:
            LwcError: An operator has no lowering; the message names the node.
        """
        return FxExecutable(module, lowered(module, expose=expose), threads)


class FxExecutable:
    """A lowered module; made by `FxBackend.compile`.

    Args:
        module: The module, for the types of its inputs and outputs.
        graph_module: What it was lowered to.
        threads: Threads of one operator.
        device: Where weights and inputs go; where they are made when None.
    """

    def __init__(
        self,
        module: Module,
        graph_module: OnnxGraphModule,
        threads: int | None,
        device: str | None = None,
    ) -> None:
        names = graph_module.meta["lwc"]
        self._file = module.source.path
        self._threads = threads
        self._device = device
        self._graph_module: OnnxGraphModule | None = graph_module.to(device)
        self._inputs = {value.name or "": value for value in module.graph.inputs}
        self._input_names: list[str] = names["inputs"]
        self.output_names: tuple[str, ...] = tuple(names["outputs"])
        self._dtypes = {value.name: value.dtype for value in module.graph.outputs}

    @property
    def graph_module(self) -> OnnxGraphModule:
        """What the module was lowered to."""
        return self._opened()

    def run(
        self, feed: Feed, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch and return the named values; all outputs and exposed ones by default.

        Raises:
            LwcError: The feed does not fit the inputs, an output is not known, or a node fails.
        """
        check_outputs(outputs or (), self.output_names, self._file)
        arguments = self._arguments(feed)
        results = self._timed(lambda: self._opened()(*arguments))
        return {
            name: array_of(result, self._dtypes.get(name))
            for name, result in zip(self.output_names, results, strict=True)
            if outputs is None or name in outputs
        }

    def warm_up(self, feed: Feed, runs: int = 3) -> None:
        """Run `feed` a few times."""
        for _ in range(runs):
            self.run(feed)

    def bind(self, feed: Feed) -> Callable[[], None]:
        """Return a call that runs `feed`, turned into tensors already: for timing."""
        arguments = self._arguments(feed)

        def call() -> None:
            self._timed(lambda: self._opened()(*arguments))

        return call

    def profile(self, feed: Feed, *, runs: int = 5) -> list[NodeTime]:
        """Return what each node costs, in the order of execution: the median over the runs."""
        arguments = self._arguments(feed)
        timers = []
        for _ in range(runs):
            timer = _Timer(self._opened(), self._wait)
            self._timed(lambda: timer.run(*arguments))  # noqa: B023
            timers.append(timer)
        return [
            NodeTime(
                node.meta["onnx"]["name"] or node.name,
                node.meta["onnx"]["op"].rpartition("::")[2],
                float(np.median([timer.seconds[node] for timer in timers])),
                1,
            )
            for node in self._opened().graph.nodes
            if "onnx" in node.meta
        ]

    def close(self) -> None:
        """Free the weights."""
        self._graph_module = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> OnnxGraphModule:
        if self._graph_module is None:
            raise LwcError("the executable is closed", file=self._file, remedy="compile it again")
        return self._graph_module

    def _timed(self, call: Callable[[], Any]) -> Sequence[Any]:
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                results = call()
                self._wait()
        finally:
            torch.set_num_threads(before)
        return results if len(self.output_names) > 1 else (results,)

    def _wait(self) -> None:
        """Wait for a device that computes while Python goes on."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _arguments(self, feed: Feed) -> list[Any]:
        check_feed(self._inputs, feed, self._file)
        return [
            torch.fx.node.map_aggregate(
                _tensor(feed.get(name), self._inputs[name], self._file), self._placed
            )
            for name in self._input_names
        ]

    def _placed(self, given: Any) -> Any:
        return given.to(self._device) if isinstance(given, torch.Tensor) else given


def _tensor(array: Any, value: ir.Value, file: str | None) -> Any:
    if array is None:
        return None
    if isinstance(array, list | tuple):
        for item in array:
            check_array(value, item, file)
        return [_tensor(item, value, file) for item in array]
    return tensor_of_array(array, value.dtype or ir.tensor(array).dtype)


class _Timer(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs a graph node by node and takes the time of each."""

    def __init__(self, graph_module: torch.fx.GraphModule, wait: Callable[[], None]) -> None:
        super().__init__(graph_module)
        self._wait = wait
        self.seconds: dict[torch.fx.Node, float] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(node)
        self._wait()
        self.seconds[node] = time.perf_counter() - start
        return result
