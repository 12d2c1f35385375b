"""A model with the policy of its cache, fed with the tokens of one sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, TypeAlias

import numpy as np

from lwc.backends.decoding import CacheInterface, Decoder
from lwc.calibration.inputs import input_role
from lwc.core.diagnostics import Remark
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.walk import constant_tensor
from lwc.generate.interface import NO_CACHE, find_interface
from lwc.generate.policies import CachePolicy, Tracker
from lwc.generate.recompute import RecomputingDecoder, looks_ahead
from lwc.generate.variants import check_no_windows, told_positions, weighed

__all__ = ["CHUNK", "Feeder"]

Array: TypeAlias = np.ndarray[Any, Any]

CHUNK = 512
"""Tokens of a prompt in one step: bounds the memory of their activations and logits."""


class Feeder(AbstractContextManager["Feeder"]):
    """Opens the decoder that a sequence needs, and cuts the cache after each step.

    A policy whose budget holds the whole sequence drops nothing, and then the model runs as it is.

    Args:
        module: The model. It gets a remark where it has no cache.
        policy: What the cache keeps.
        threads: Threads of one operator.

    Raises:
        LwcError: The model is no decoder, or its cache cannot be cut as `policy` wants.
    """

    def __init__(self, module: Module, policy: CachePolicy, threads: int | None = None) -> None:
        self._module, self._policy, self._threads = module, policy, threads
        self.interface = find_interface(module)
        self._cutting: tuple[Module, CacheInterface] | None = None
        if not self.interface.tensors:
            if policy.budget is not None:
                raise LwcError(
                    "the model has no cache to cut",
                    file=module.source.path,
                    remedy="fuse-attention and then add-kv-cache give it one",
                )
            module.remarks.emit(Remark("warning", "generate", NO_CACHE))
        if policy.budget is not None:
            check_no_windows(module)
            self._cutting = told_positions(module, self.interface)
            if policy.weighs:
                self._cutting = weighed(*self._cutting)
        self._open: tuple[Module, Decoder] | None = None
        self._tracker: Tracker | None = None
        self._weighs = False
        self._position = 0

    def start(self, longest: int, chunk: int = CHUNK) -> None:
        """Begin a sequence.

        Args:
            longest: The most tokens it may have.
            chunk: The most tokens fed at once.
        """
        budget = self._policy.budget
        cutting = budget is not None and longest > budget
        decoder = self.prepare(cutting=cutting)
        self._tracker, self._position = None, 0
        if not cutting or budget is None:
            decoder.start(longest)
            return
        decoder.start(min(longest, budget + chunk), budget=budget)
        tensors = self.interface.tensors
        self._tracker = self._policy.tracker(len(tensors) // 2, tensors[0].heads)
        self._weighs = self._policy.weighs

    @property
    def decoder(self) -> Decoder:
        """The decoder of the last sequence.

        Raises:
            LwcError: There is none yet.
        """
        if self._open is None:
            raise LwcError("no sequence was begun", file=self._module.source.path)
        return self._open[1]

    @property
    def cuts(self) -> bool:
        """Whether the policy may drop tokens."""
        return self._policy.budget is not None

    def check_positions(self) -> None:
        """Check that tokens of sequences of different lengths can be told their positions.

        Raises:
            LwcError: Positions are counted over the whole batch; the message names the node.
        """
        told_positions(self._module, self.interface)

    def kept(self, fed: int) -> int:
        """Return how many of `fed` tokens the cache keeps."""
        budget = self._policy.budget
        return 0 if not self.interface.tensors else fed if budget is None else min(fed, budget)

    def prepare(self, *, cutting: bool = False) -> Decoder:
        """Open the decoder of the model, or of its variant for a cache that is cut."""
        module, interface = self._module, self.interface
        if cutting and self._cutting is not None:
            module, interface = self._cutting
        if self._open is None or self._open[0] is not module:
            self.close()
            self._open = module, _decoder(module, interface, self._threads)
        return self._open[1]

    def feed(self, ids: Sequence[int], *, every: bool = False) -> Array:
        """Run the next tokens.

        Returns:
            The logits of the last one `[vocabulary]`, or of every one `[new, vocabulary]`.
        """
        decoder = self.decoder
        positions = np.arange(self._position, self._position + len(ids))
        with self.explaining(self._position + len(ids)):
            logits = decoder.step(np.array([ids], np.int64), positions[None], every=every)
        self._position += len(ids)
        if self._tracker is not None:
            moves = self._tracker.seen(positions, decoder.masses() if self._weighs else None)
            if moves is not None:
                decoder.cut(moves)
        return np.array(logits[0])  # the next step writes over them

    @contextlib.contextmanager
    def explaining(self, length: int) -> Iterator[None]:
        """Name the most tokens that the model takes, where running so many fails because of it.

        Raises:
            LwcError: The model failed.
        """
        try:
            yield
        except LwcError as error:
            end = None if error.node is None else self._table_end(error.node, length)
            if end is None:
                raise
            raise LwcError(
                f"a table of positions ends after {end} tokens, and there are {length}",
                file=self._module.source.path,
                node=error.node,
                remedy="give a shorter prompt, or ask for fewer new tokens",
            ) from error

    def _table_end(self, failed: str, length: int) -> int | None:
        """Return the rows of a table that the node which failed reads, if they are too few."""
        for node in self._module.nodes():
            if not node.name or not failed.endswith(f"'{node.name}'"):
                continue
            if any(value is not None and value.name == self.interface.ids for value in node.inputs):
                return None
            tensors = [constant_tensor(value) for value in node.inputs]
            rows = [t.shape.numpy()[0] for t in tensors if t is not None and len(t.shape) == 2]
            return min((each for each in rows if each < length), default=None)
        return None

    def close(self) -> None:
        """Free the decoder."""
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _decoder(module: Module, interface: CacheInterface, threads: int | None) -> Decoder:
    if not interface.tensors:
        from lwc.backends.onnxruntime.session import OnnxRuntimeBackend

        decoder = RecomputingDecoder(
            OnnxRuntimeBackend().compile(module, threads=threads), interface
        )
        ids = next(value for value in module.graph.inputs if value.name == interface.ids)
        if looks_ahead(decoder, input_role(module, ids).high + 1):
            decoder.close()
            raise LwcError(
                "what the model gives for a token depends on tokens behind it: it is an encoder",
                file=module.source.path,
                remedy="give a causal language model",
            )
        return decoder
    from lwc.backends.onnxruntime.decoding import open_decoder

    return open_decoder(module, interface, threads=threads)
