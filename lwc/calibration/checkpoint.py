"""Results of calibrated passes in a folder, where the run that follows a killed one finds them.

A result is asked for by its key, a hash of everything that its last bit rests on. Nothing is ever
invalidated: what belongs to another weight has another key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import onnx_ir as ir

from lwc.core.errors import InputError
from lwc.core.weights import named_in, stored_bytes
from lwc.frontend.atomic import StagedFile, sync_folder, writing

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Checkpoint, Feed, PassContext

__all__ = ["CheckpointFolder", "Entry", "Trail", "feeds_digest", "module_digest", "surroundings"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Entry: TypeAlias = Mapping[str, Array]
"""A result: arrays of numbers by name; none, where the result is that there is nothing to do."""

_SUM = hashlib.sha256().digest_size


class CheckpointFolder:
    """A folder of results, each in a file that appears whole or not at all.

    A file is a SHA-256 of its key and of the rest, a line of JSON with the type and shape of every
    array, and their bytes. Runs may share a folder: each writes under a temporary name of its own,
    and what two of them rename to one name is the same.

    Args:
        folder: Where results lie; made where it is missing.
        facts: What all results rest on besides model, data and pass; see `surroundings`.

    Attributes:
        folder: As it was given.
        facts: As they were given.
        taken: Results found since the running pass began, by kind; 0 of one looked for in vain.

    Raises:
        LwcError: Nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: object = ()) -> None:
        self.folder = os.fspath(folder)
        self.facts = facts
        self.taken: Counter[str] = Counter()
        with writing(self.folder):
            os.makedirs(self.folder, exist_ok=True)
            # Better now than after the first layer.
            with StagedFile(self.folder, "trial"):
                pass

    def get(self, kind: str, key: str, warn: Callable[[str], None]) -> tuple[Entry, str] | None:
        """Return a result and the checksum of its file, or None.

        Args:
            kind: What it is, in a word.
            key: A hash of what it rests on.
            warn: Told of a file that does not hold what was written.

        Raises:
            InputError: There is a file that cannot be read.
        """
        path = self._path(kind, key)
        try:
            with open(path, "rb") as file:
                stated, head, rest = file.read(_SUM), file.readline(), np.fromfile(file, np.uint8)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", file=path) from error
        if _checksum(key, [head, rest]) != stated:
            warn(f"{path} is damaged; what it held is computed again")
            return None
        arrays, start = {}, 0
        for name, (dtype, shape) in json.loads(head).items():
            stop = start + math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = rest[start:stop].copy().view(dtype).reshape(shape)
            start = stop
        return arrays, stated.hex()

    def put(self, kind: str, key: str, entry: Entry) -> str:
        """Write a result and return the checksum of its file; for arguments see `get`.

        Raises:
            LwcError: The disk is full, or the like.
            TypeError: An array does not hold numbers.
        """
        arrays = {name: np.asarray(array) for name, array in entry.items()}
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise TypeError(f"'{name}' of a result holds {array.dtype}")
        table = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        parts = [json.dumps(table).encode() + b"\n", *map(_raw, arrays.values())]
        made, path = _checksum(key, parts), self._path(kind, key)
        with writing(path), StagedFile(self.folder, kind) as staged:
            for part in (made, *parts):
                staged.file.write(part)
            staged.commit(path)
            sync_folder(self.folder)
        return made.hex()

    def drop(self, kind: str, key: str) -> None:
        """Remove a result, if it is there, that another one takes the place of."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(kind, key))

    def _path(self, kind: str, key: str) -> str:
        return os.path.join(self.folder, f"{kind}-{key}.lwc")


class Trail:
    """The results of one pass, in steps: a key holds what the steps before it came to.

    Without a checkpoint nothing is found and nothing kept.

    Args:
        checkpoint: Where results lie, or None.
        state: A hash of what all of them rest on.
        warn: See `CheckpointFolder.get`.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, state: str, warn: Callable[[str], None]
    ) -> None:
        self._checkpoint = checkpoint
        self._state = state
        self._warn = warn
        self._step: dict[tuple[str, str], str] = {}

    @classmethod
    def begin(
        cls, ctx: PassContext, module: Module, feeds: Callable[[], Iterable[Feed]], *facts: object
    ) -> Self:
        """Return the trail of the running pass.

        Args:
            ctx: Gives the checkpoint and the options of the pass.
            module: The model as it is now.
            feeds: Gives the calibration data.
            facts: What else results rest on, such that equal things print equally.
        """
        kept = ctx.checkpoint
        if kept is None:
            return cls(None, "", ctx.warn)
        rests_on = (kept.facts, ctx.spec, module_digest(module), feeds_digest(feeds()), facts)
        return cls(kept, _hash(rests_on), ctx.warn)

    def get(self, kind: str, name: str, amount: int = 1) -> Entry | None:
        """Return a result of this step, or None.

        Args:
            kind: What it is, in a word.
            name: Tells it from others of its kind.
            amount: What it counts as in `CheckpointFolder.taken`.

        Raises:
            InputError: There is a file that cannot be read.
        """
        if self._checkpoint is None:
            return None
        found = self._checkpoint.get(kind, self._key(kind, name), self._warn)
        self._checkpoint.taken[kind] += amount if found is not None else 0
        if found is None:
            return None
        entry, self._step[kind, name] = found
        return entry

    def put(self, kind: str, name: str, entry: Entry) -> Entry:
        """Keep a result of this step, and return it; see `CheckpointFolder.put`."""
        if self._checkpoint is not None:
            key = self._key(kind, name)
            self._step[kind, name] = self._checkpoint.put(kind, key, entry)
        return entry

    def drop(self, kind: str, name: str) -> None:
        """Forget a result of this step; see `CheckpointFolder.drop`."""
        if self._checkpoint is not None:
            self._checkpoint.drop(kind, self._key(kind, name))
            self._step.pop((kind, name), None)

    def advance(self) -> None:
        """Begin the next step: its results rest on those of this one."""
        if self._checkpoint is not None:
            self._state = _hash((self._state, sorted(self._step.items())))
            self._step = {}

    def reaches(self, steps: Iterable[Iterable[tuple[str, str]]]) -> bool:
        """Tell whether all results of the coming steps are there, by kind and name."""
        if self._checkpoint is None:
            return False
        ahead = Trail(self._checkpoint, self._state, lambda _: None)
        for step in steps:
            for kind, name in step:
                found = self._checkpoint.get(kind, ahead._key(kind, name), ahead._warn)
                if found is None:
                    return False
                ahead._step[kind, name] = found[1]
            ahead.advance()
        return True

    def _key(self, kind: str, name: str) -> str:
        return _hash((self._state, kind, name))


def surroundings(backend: str, threads: int | None) -> tuple[object, ...]:
    """Return what decides about the last bits of a result, other than model, data and pass.

    Sums are added up in an order that the libraries choose, also by the number of threads and the
    kind of processor.

    Args:
        backend: What runs the model, with its version.
        threads: Its threads; None lets it choose.
    """
    import lwc

    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    limits = [os.environ.get(name) for name in names]
    affinity = getattr(os, "sched_getaffinity", None)
    processors = os.cpu_count() if affinity is None else len(affinity(0))
    machine = (platform.system(), platform.machine(), processors, _processor())
    return (lwc.__version__, np.__version__, backend, threads, limits, machine)


def _processor() -> list[str]:
    """Return what tells a kind of processor, and so which kernels libraries choose."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        found = [platform.processor()]
    return sorted(set(found))


def module_digest(module: Module) -> str:
    """Return a hash of all that a file of the module would show, and of the weights' contents."""
    weights = []
    for _, value in module.initializers():
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            weights.append((value, hashlib.sha256(stored_bytes(tensor).data).hexdigest(), 0))
    with named_in(weights):
        proto = ir.to_proto(module.model)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def feeds_digest(feeds: Iterable[Feed]) -> str:
    """Return a hash of feeds: their number and order, names, types, shapes and contents."""
    made = hashlib.sha256()
    for feed in feeds:
        arrays = [(name, np.asarray(feed[name])) for name in sorted(feed)]
        told = [
            (name, str(array.dtype), array.shape, hashlib.sha256(_raw(array)).hexdigest())
            for name, array in arrays
        ]
        made.update(_hash(told).encode())
    return made.hexdigest()


def _raw(array: Array) -> Any:
    """Return the bytes of an array; of one with strings, how they are written."""
    if array.dtype.hasobject or array.dtype.kind == "T":
        return repr(array.tolist()).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _hash(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _checksum(key: str, parts: Iterable[Any]) -> bytes:
    made = hashlib.sha256(key.encode())
    for part in parts:
        made.update(part)
    return made.digest()
