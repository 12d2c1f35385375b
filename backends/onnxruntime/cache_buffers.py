"""The buffers of a cache, bound to a session where they lie: nothing is copied between steps.

Where the operators write into the buffer of the past (GroupQueryAttention), one buffer is bound as
past and present, once. Elsewhere present values become the past of the next step: ping-pong. Once
such a cache is cut to a budget, its extents no longer change: two buffers stay bound, and only the
new entries are copied from one to the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from lwc.backends.decoding import CacheTensor, Moves

__all__ = ["BoundCache", "ChainedCache", "Values"]

Array: TypeAlias = np.ndarray[Any, Any]
Values: TypeAlias = Mapping[str, ort.OrtValue]

_EVERY = -1
"""Stands for any number of new tokens: a buffer that is past and present has room for all."""


class _Binding:
    """An IOBinding that binds again only what is another value than before."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs: dict[str, ort.OrtValue] = {}
        self._outputs: dict[str, int] = {}
        self._steady: dict[str, Array] = {}

    def inputs(self, values: Iterable[tuple[str, ort.OrtValue]]) -> None:
        for name, value in values:
            if self._inputs.get(name) is not value:
                self._binding.bind_ortvalue_input(name, value)
                self._inputs[name] = value

    def output(self, name: str, value: ort.OrtValue | None = None) -> None:
        """Bind an output to a value, or to memory that ONNX Runtime makes in the next run."""
        if value is None:
            self._binding.bind_output(name)
        else:
            self._binding.bind_ortvalue_output(name, value)
        self._outputs.setdefault(name, len(self._outputs))

    def run(self, fetch: Sequence[str], steady: Collection[str] = ()) -> dict[str, Array]:
        """Run; return the outputs in `fetch`.

        Args:
            fetch: Outputs besides the bound ones.
            steady: Those of them that have the same shape in every run with them: they stay bound
                to memory of their own, which saves a tenth of a millisecond per step.
        """
        if not steady:
            self._steady = {}
        wanted = [name for name in fetch if name not in self._steady]
        for name in wanted:
            self.output(name)
        self._session.run_with_iobinding(self._binding)
        if not wanted:
            return self._steady
        made = self._binding.get_outputs_as_ortvaluevector()
        found = {name: _view(made[self._outputs[name]]) for name in wanted}
        for name in steady:
            if name in found:
                self._steady[name] = np.empty_like(found[name])
                self.output(name, _value(self._steady[name]))
        return {**self._steady, **found}


@dataclass(frozen=True)
class _Group:
    """Tensors of one shape in one array, so that all are cut at once.

    Attributes:
        array: `[tensors, batch, heads, capacity, size]`.
        layers: The layer of each.
    """

    array: Array
    layers: Array

    def take(self, source: Array, moves: Moves) -> None:
        """Put entries of `source`, of the same layout, where `moves` says."""
        tensors = np.arange(len(self.array))[:, None, None]
        heads = np.arange(self.array.shape[2])[None, :, None]
        places, entries = (
            each[self.layers] if len(each) > 1 else each for each in (moves.places, moves.entries)
        )
        self.array[tensors, 0, heads, places] = source[tensors, 0, heads, entries]


class _Buffers:
    """Room for every tensor of a cache."""

    def __init__(self, tensors: Sequence[CacheTensor], capacity: int, batch: int) -> None:
        def shape(index: int) -> tuple[Any, ...]:
            tensor = tensors[index]
            return tensor.heads, tensor.size, tensor.dtype.str

        self.groups: list[_Group] = []
        self.arrays: list[Array] = [np.empty(0)] * len(tensors)
        for (heads, size, dtype), indices in groupby(sorted(range(len(tensors)), key=shape), shape):
            places = np.array(list(indices))
            array = np.zeros((len(places), batch, heads, capacity, size), dtype)
            self.groups.append(_Group(array, places // 2))
            for row, index in enumerate(places):
                self.arrays[index] = array[row]

    @property
    def nbytes(self) -> int:
        return sum(group.array.nbytes for group in self.groups)


class BoundCache:
    """Buffers that stay bound.

    Args:
        session: The session they are bound to.
        tensors: Keys and values, layer by layer.
        capacity: Entries the past has room for.
        batch: Number of sequences.
        in_place: The past is the present, too.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        tensors: Sequence[CacheTensor],
        capacity: int,
        batch: int,
        *,
        in_place: bool,
    ) -> None:
        self._session, self._tensors, self._capacity = session, tensors, capacity
        self._in_place, self._batch = in_place, batch
        self._past = _Buffers(tensors, capacity, batch)
        self._present: dict[int, _Buffers] = {}
        self._bindings: dict[int, _Binding] = {}
        self._last = self._past
        self.mode = "in place" if in_place else "fixed"

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        present = sum(buffers.nbytes for buffers in self._present.values())
        return self._past.nbytes + present

    def run(
        self,
        values: Values,
        new: int,
        fetch: Sequence[str],
        row: int | None = None,
        steady: Collection[str] = (),
    ) -> dict[str, Array]:
        """Run new tokens; return the outputs in `fetch`.

        Args:
            values: The other inputs.
            new: Number of new tokens.
            fetch: Outputs besides the cache.
            row: The one sequence to run.
            steady: Outputs in `fetch` that have the same shape in every run with `steady`.
        """
        if row is not None:
            binding = self._bound(self._past, self._past, slice(row, row + 1))
        else:
            key = _EVERY if self._in_place else new
            binding = self._bindings.get(key) or self._bind(key)
        if not self._in_place:
            self._last = self._present[new]
        binding.inputs(values.items())
        return binding.run(fetch, steady)

    def _bind(self, new: int) -> _Binding:
        present = self._past
        if new != _EVERY:
            self._present.clear()
            self._bindings.clear()
            present = _Buffers(self._tensors, self._capacity + new, self._batch)
            self._present[new] = present
        self._bindings[new] = self._bound(self._past, present, slice(None))
        return self._bindings[new]

    def _bound(self, past: _Buffers, present: _Buffers, rows: slice) -> _Binding:
        binding = _Binding(self._session)
        for tensor, old, new in zip(self._tensors, past.arrays, present.arrays, strict=True):
            value = _value(old[rows])
            binding.inputs([(tensor.past, value)])
            binding.output(tensor.present, value if new is old else _value(new[rows]))
        return binding

    def cut(self, moves: Moves) -> BoundCache:
        """Cut the entries of the last step down; return what is used from now on."""
        for group, source in zip(self._past.groups, self._last.groups, strict=True):
            group.take(source.array, moves)
        return self

    def fill(self, presents: Sequence[Array], moves: Moves) -> None:
        """Copy a cache that came another way, `[batch, heads, entries, size]` each, cut down."""
        wide = _Buffers(self._tensors, presents[0].shape[2], self._batch)
        for array, present in zip(wide.arrays, presents, strict=True):
            array[...] = present
        for group, source in zip(self._past.groups, wide.groups, strict=True):
            group.array[...] = source.array[..., : self._capacity, :]
            group.take(source.array, moves)


class ChainedCache:
    """Present values that become the past of the next step where ONNX Runtime put them.

    Args:
        session: The session that runs.
        tensors: Keys and values, layer by layer.
        batch: Number of sequences.
    """

    mode = "ping-pong"

    def __init__(
        self, session: ort.InferenceSession, tensors: Sequence[CacheTensor], batch: int
    ) -> None:
        self._session, self._tensors, self._batch = session, tensors, batch
        self._per_token = batch * sum(tensor.bytes_per_token for tensor in tensors)
        self._past = [
            _value(np.zeros((batch, t.heads, 0, t.size), t.dtype))._get_c_value() for t in tensors
        ]
        self._options = ort.RunOptions()
        self._device = ort.OrtDevice.make("cpu", 0)._get_c_device()
        self._length = 0
        self.nbytes = 0

    def run(
        self,
        values: Values,
        new: int,
        fetch: Sequence[str],
        row: int | None = None,
        steady: Collection[str] = (),
    ) -> dict[str, Array]:
        """Run new tokens of all sequences; see `BoundCache.run`. Nothing is kept bound."""
        assert row is None
        names = [*values, *(tensor.past for tensor in self._tensors)]
        outputs = [*fetch, *(tensor.present for tensor in self._tensors)]
        feeds, fetches = native.OrtValueVector(), native.OrtValueVector()
        for value in values.values():
            feeds.push_back(value._get_c_value())
        for past in self._past:
            feeds.push_back(past)
        devices = [self._device] * len(outputs)
        self._session.run_with_ortvaluevector(
            self._options, names, feeds, outputs, fetches, devices
        )
        self._past = [fetches[index] for index in range(len(fetch), len(outputs))]
        self.nbytes = max(self.nbytes, (2 * self._length + new) * self._per_token)
        self._length += new
        return {name: _view(fetches[index]) for index, name in enumerate(fetch)}

    def cut(self, moves: Moves) -> BoundCache:
        """Cut the cache down; return buffers of that extent, used from now on."""
        cache = BoundCache(self._session, self._tensors, moves.kept, self._batch, in_place=False)
        cache.fill([_view(value) for value in self._past], moves)
        return cache


def _value(array: Array) -> ort.OrtValue:
    """Return a value that lies in the memory of `array`."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def _view(value: Any) -> Array:
    """Return an array that lies in the memory of a value, and keeps it."""
    return np.from_dlpack(value)
