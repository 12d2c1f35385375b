"""Decoders with a cache on ONNX Runtime: a session, and the buffers of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import onnxruntime as ort

from lwc.backends.decoding import CacheInterface, Moves
from lwc.backends.onnxruntime.cache_buffers import BoundCache, ChainedCache
from lwc.backends.onnxruntime.session import (
    ORT_ERRORS,
    OnnxRuntimeBackend,
    OnnxRuntimeExecutable,
    translated,
)
from lwc.core.errors import LwcError

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["OnnxRuntimeDecoder", "open_decoder"]

Array: TypeAlias = np.ndarray[Any, Any]


def open_decoder(
    module: Module, interface: CacheInterface, *, threads: int | None = None
) -> OnnxRuntimeDecoder:
    """Compile a module with a cache.

    Args:
        module: The module; it is not changed.
        interface: Its inputs and outputs.
        threads: Threads of one operator; one per core by default.

    Raises:
        LwcError: ONNX Runtime refuses the module; the message names the node.
    """
    executable = OnnxRuntimeBackend().compile(module, threads=threads)
    return OnnxRuntimeDecoder(executable, interface, module.source.path)


class OnnxRuntimeDecoder:
    """A session and a cache; made by `open_decoder`, described by `lwc.backends.decoding.Decoder`.

    Args:
        executable: The compiled module; it is closed with the decoder.
        interface: Its inputs and outputs.
        file: Where it came from, for errors.
    """

    def __init__(
        self, executable: OnnxRuntimeExecutable, interface: CacheInterface, file: str | None
    ) -> None:
        self._executable, self._interface, self._file = executable, interface, file
        self._fetch = [interface.logits]
        if interface.masses is not None:
            self._fetch.append(interface.masses)
        self._keep = {every: _value(np.array(int(not every), np.int64)) for every in (False, True)}
        self._masses: Array | None = None
        self._capacity = self._bytes = 0
        self._cached: list[int] = []
        self._cache: BoundCache | ChainedCache | None = None

    @property
    def cached(self) -> Sequence[int]:
        """Tokens in the cache, by sequence."""
        return list(self._cached)

    @property
    def cache_bytes(self) -> int:
        """The most bytes that the buffers of the cache took since `start`."""
        return max(self._bytes, self._cache.nbytes if self._cache is not None else 0)

    @property
    def cache_mode(self) -> str:
        """How the cache is kept: `in place`, `ping-pong` or `fixed`."""
        return self._cache.mode if self._cache is not None else "none"

    def start(self, capacity: int, *, batch: int = 1, budget: int | None = None) -> None:
        """Empty the cache; see `Decoder.start`."""
        session, tensors = self._executable.opened(), self._interface.tensors
        self._cache = None  # frees the buffers before others are made
        if self._interface.in_place:
            self._cache = BoundCache(session, tensors, capacity, batch, in_place=True)
        else:
            self._cache = ChainedCache(session, tensors, batch)
        self._capacity, self._bytes = capacity, 0
        self._cached = [0] * batch
        self._ones = np.ones((batch, capacity), np.int64)
        self._ids, self._positions = np.zeros((2, batch, 1), np.int64)
        self._one = {self._interface.ids: _value(self._ids)}
        if self._interface.positions is not None:
            self._one[self._interface.positions] = _value(self._positions)

    def step(
        self, ids: Array, positions: Array, *, every: bool = False, row: int | None = None
    ) -> Array:
        """Run new tokens, and add them to the cache; see `Decoder.step`."""
        new, rows = ids.shape[1], slice(None) if row is None else slice(row, row + 1)
        lengths = [each + new for each in self._cached[rows]]
        if self._cache is None or max(lengths) > self._capacity:
            raise LwcError(
                f"the cache has room for {self._capacity} tokens, and there are "
                f"{max(lengths, default=new)}",
                file=self._file,
                remedy="start with a greater capacity",
            )
        single = new == 1 and row is None
        if single:
            self._ids[...], self._positions[...] = ids, positions
            values = dict(self._one)
        else:
            values = {self._interface.ids: _value(np.ascontiguousarray(ids))}
            if self._interface.positions is not None:
                values[self._interface.positions] = _value(np.ascontiguousarray(positions))
        if self._interface.mask is not None:
            values[self._interface.mask] = _value(self._mask(lengths))
        if self._interface.keep is not None:
            values[self._interface.keep] = self._keep[every]
        try:
            steady = (self._interface.logits,) if single else ()
            found = self._cache.run(values, new, self._fetch, row, steady)
        except ORT_ERRORS as error:
            raise translated(error, self._file) from error
        self._cached[rows] = lengths
        if self._interface.masses is not None:
            self._masses = found[self._interface.masses]
        return self._rows(found[self._interface.logits], new, every)

    def _mask(self, lengths: Sequence[int]) -> Array:
        """Return ones for the tokens of each sequence, and zeros behind the shorter ones."""
        total = max(lengths)
        if len(lengths) == 1:
            return self._ones[:1, :total]
        return (np.arange(total) < np.array(lengths)[:, None]).astype(np.int64)

    def _rows(self, logits: Array, new: int, every: bool) -> Array:
        if not every:
            return logits[:, -1]
        if logits.shape[1] != new:
            raise LwcError(
                f"the model gives the logits of {logits.shape[1]} of {new} tokens",
                file=self._file,
                remedy="run the tokens one by one, or leave last-logits out",
            )
        return logits

    def masses(self) -> Array:
        """Return the attention that entries got in the last step, `[layers, heads, cached]`."""
        if self._masses is None:
            raise LwcError("the decoder gives no attention masses", file=self._file)
        return self._masses

    def cut(self, moves: Moves) -> None:
        """Cut the cache down; of one sequence only."""
        assert self._cache is not None
        self._bytes = self.cache_bytes
        self._cache = self._cache.cut(moves)
        self._cached = [moves.kept] * len(self._cached)

    def close(self) -> None:
        """Free the session and the cache."""
        self._cache = None
        self._executable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _value(array: Array) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)
