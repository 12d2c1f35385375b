"""Weights that live on disk: tensors in files, and a spill file for results.

A pass that rewrites many weights must not hold them: it reads one, hands the result to
`WeightStore.put`, and lets go of both. The store is an unlinked temporary file, so a run that is
killed leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import IO, Any, Protocol, cast

import numpy as np
import onnx_ir as ir

__all__ = [
    "DataFile",
    "FileTensor",
    "SpilledTensor",
    "WeightStore",
    "data_file",
    "named_in",
    "reading",
    "reading_once",
    "release",
    "stored_bytes",
]

_PAGE = 4096
_SMALL = 1 << 16
"""Bytes up to which a tensor is read rather than mapped: a mapping costs a file descriptor."""


class DataFile:
    """A file of weights, open for reading.

    The descriptor is held, so that the content stays what it was when the path is later removed
    or renamed over: output onto the input is safe.

    Args:
        path: The file.

    Attributes:
        path: As it was given.
        location: Where the file lay when it was opened: absolute, links resolved.
        size: Bytes.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.location = os.path.realpath(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()


class WeightStore:
    """An append-only, unlinked file that holds results until the module is saved.

    Args:
        directory: Where to make the file; the system's temporary directory by default. Choose
            the output's own folder: the file of results can then become the data file.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory = directory
        self._file, self._has_name_to_come = _unnamed_file(directory)
        self._end = 0
        self._lock = threading.Lock()

    def put(self, array: np.ndarray[Any, Any], name: str | None = None) -> ir.TensorProtocol:
        """Write `array` to the store and return a tensor that reads it back on demand.

        Sub-byte element types are given unpacked (ml_dtypes) and are stored packed.

        Raises:
            OSError: The disk is full.
        """
        tensor = ir.Tensor(array, name=name)
        return self.put_tensor(tensor)

    def put_tensor(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Write the content of `tensor` to the store; see `put`.

        Safe to call from several threads, which write at the same time.
        """
        content = stored_bytes(tensor)
        with self._lock:
            start = -(-self._end // _PAGE) * _PAGE
            self._end = start + len(content)
        written = 0
        while written < len(content):
            written += os.pwrite(self._file.fileno(), content[written:].data, start + written)
        # mypy wants the protocol's read-only members to be settable.
        spilled = SpilledTensor(self, self._file, start, tensor.dtype, tensor.shape, tensor.name)
        return cast(ir.TensorProtocol, spilled)

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._end

    def offset(self, tensor: ir.TensorProtocol) -> int | None:
        """Return where a tensor begins in the store's file, or None if it is not there."""
        kept: object = tensor
        return (
            kept._offset if isinstance(kept, SpilledTensor) and kept._store is self._file else None
        )

    def linkable(self, folder: str) -> bool:
        """Tell whether the store's file can be given a name in a folder."""
        descriptor = self.fileno()
        return (
            self._has_name_to_come
            and os.path.exists(f"/proc/self/fd/{descriptor}")
            and os.fstat(descriptor).st_dev == os.stat(folder).st_dev
        )

    def restart(self) -> None:
        """Put later results into another file; tensors keep the one that they are in."""
        with self._lock:
            self._file, self._has_name_to_come = _unnamed_file(self._directory)
            self._end = 0

    def fileno(self) -> int:
        """Return the descriptor of the file behind the store."""
        return self._file.fileno()


_DIRECT = 1 << 20
"""Bytes from which a tensor that is read once is read past the page cache."""

_DIRECT_CHUNK = 1 << 24


class _Open(Protocol):
    def fileno(self) -> int: ...


def _unnamed_file(directory: str | os.PathLike[str] | None) -> tuple[IO[bytes], bool]:
    """Open a file without a name; tell whether it can be given one later."""
    flag = getattr(os, "O_TMPFILE", 0)
    if flag:
        # tempfile opens such a file in the way that forbids a name.
        with contextlib.suppress(OSError):
            descriptor = os.open(directory or tempfile.gettempdir(), os.O_RDWR | flag, 0o600)
            return open(descriptor, "w+b", buffering=0), True
    return tempfile.TemporaryFile(dir=directory, prefix=".lwc-", buffering=0), False


class FileTensor:
    """A tensor whose bytes lie in an open file, read or mapped each time and never kept in memory.

    It satisfies `onnx_ir.TensorProtocol`.

    Args:
        store: The file, by its descriptor.
        offset: Where the tensor's bytes begin in it; any alignment.
        dtype: Element type; sub-byte elements are packed.
        shape: All extents.
        name: The tensor's name, mutable.
    """

    def __init__(
        self,
        store: _Open,
        offset: int,
        dtype: ir.DataType,
        shape: ir.Shape | Any,
        name: str | None,
    ) -> None:
        self.name = name
        self.doc_string: str | None = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self._store = store
        self._offset = offset
        self._dtype = dtype
        self._shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)

    @property
    def dtype(self) -> ir.DataType:
        """Element type."""
        return self._dtype

    @property
    def shape(self) -> ir.Shape:
        """Shape, all static."""
        return self._shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self._shape.numpy())

    @property
    def nbytes(self) -> int:
        """Number of stored bytes, elements packed."""
        return math.ceil(self.size * self._dtype.bitwidth / 8)

    @property
    def raw(self) -> FileTensor:
        """The tensor itself: there is no other backing object."""
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        """Map the bytes; the pages go when the returned array does."""
        if self.size == 0:
            return np.empty(self.shape.numpy(), dtype=self.dtype.numpy())
        if self.dtype.bitwidth < 8:
            packed = ir.PackedTensor(self._map(np.dtype(np.uint8)), self.dtype, shape=self.shape)
            return packed.numpy()
        return self._map(np.dtype(self.dtype.numpy())).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def tobytes(self) -> bytes:
        """Return the stored bytes, little endian, packed."""
        return self._map(np.dtype(np.uint8)).tobytes() if self.nbytes else b""

    def tofile(self, file: Any) -> None:
        """Copy the bytes to `file` without bringing them into this process where possible."""
        file.flush()
        done, position = 0, file.tell()
        target, total = file.fileno(), self.nbytes
        while done < total:
            try:
                copied = os.copy_file_range(
                    self._store.fileno(), target, total - done, self._offset + done, position + done
                )
            except (OSError, AttributeError) as error:
                if isinstance(error, OSError) and error.errno in _FATAL_COPY:
                    raise
                chunk = os.pread(
                    self._store.fileno(), min(total - done, 1 << 24), self._offset + done
                )
                copied = os.pwrite(target, chunk, position + done)
            if copied == 0:
                raise OSError("the file is shorter than its tensors")
            done += copied
        file.seek(position + total)

    def _map(self, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        descriptor, size = self._store.fileno(), self.nbytes
        if size <= _SMALL:
            content = os.pread(descriptor, size, self._offset)
            if len(content) != size:
                raise OSError("the file is shorter than its tensors")
            return np.frombuffer(content, dtype=dtype)
        ahead = self._offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(
            descriptor, size + ahead, access=mmap.ACCESS_READ, offset=self._offset - ahead
        )
        return np.frombuffer(mapped, dtype=dtype, count=size // dtype.itemsize, offset=ahead)


class SpilledTensor(FileTensor):
    """A tensor in the file of a `WeightStore`; arguments as of `FileTensor`.

    Attributes:
        owner: The store.
    """

    def __init__(self, owner: WeightStore, *place: Any) -> None:
        super().__init__(*place)
        self.owner = owner


_FATAL_COPY = {27, 28, 122}
"""EFBIG, ENOSPC, EDQUOT: falling back to another way of copying cannot help."""


def release(tensor: ir.TensorProtocol | None) -> None:
    """Let go of the memory-mapped pages of a tensor; the next read maps them again."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor._array = None
        tensor.raw = None


def prefetch(tensor: ir.TensorProtocol) -> None:
    """Ask the system to read a tensor's bytes into the page cache ahead of `reading_once`.

    Reading a mapping page by page reaches a fraction of a disk's rate. It is a hint: systems
    without it, and tensors that are not read through the page cache, are left as they are.
    """
    descriptor = _open_direct(tensor)
    if descriptor is not None:
        os.close(descriptor)
        return
    if not hasattr(os, "posix_fadvise"):
        return
    kept: object = tensor  # mypy takes FileTensor and TensorProtocol for exclusive
    if isinstance(kept, FileTensor):
        os.posix_fadvise(kept._store.fileno(), kept._offset, kept.nbytes, os.POSIX_FADV_WILLNEED)
    if not isinstance(tensor, ir.ExternalTensor):
        return
    with open(tensor.path, "rb") as file:
        os.posix_fadvise(
            file.fileno(),
            tensor.offset or 0,
            tensor.length or tensor.nbytes,
            os.POSIX_FADV_WILLNEED,
        )


class _Buffers(threading.local):
    """The buffer of each thread for direct reads, kept because fresh memory is slow to touch."""

    def __init__(self) -> None:
        self.spare: mmap.mmap | None = None

    @contextlib.contextmanager
    def borrow(self, size: int) -> Iterator[mmap.mmap]:
        buffer, self.spare = self.spare, None
        if buffer is None or len(buffer) < size:
            buffer = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):
                    buffer.madvise(mmap.MADV_HUGEPAGE)
        try:
            yield buffer
        finally:
            self.spare = buffer


_buffers = _Buffers()


def _open_direct(tensor: object) -> int | None:
    """Return a descriptor that reads a big tensor past the page cache, or None if nothing does."""
    if (
        not isinstance(tensor, FileTensor)
        or not isinstance(tensor._store, DataFile)
        or tensor.nbytes < _DIRECT
        or tensor.dtype.bitwidth < 8
    ):
        return None
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        # The same open file, though its path may name another by now.
        return os.open(f"/proc/self/fd/{tensor._store.fileno()}", os.O_RDONLY | flag)
    except OSError:
        return None


@contextlib.contextmanager
def reading_once(tensor: ir.TensorProtocol) -> Iterator[np.ndarray[Any, Any]]:
    """Like `reading`, for a tensor on disk that is needed now, in full, and not again soon.

    A big one is read past the page cache where the system can: that takes a tenth of the
    processor's time, and other programs keep what they have there.
    """
    kept: object = tensor  # mypy takes FileTensor and TensorProtocol for exclusive
    descriptor = _open_direct(tensor)
    if descriptor is None or not isinstance(kept, FileTensor):
        with reading(tensor) as array:
            yield array
        return
    ahead = kept._offset % _PAGE
    with _buffers.borrow(-(-(ahead + kept.nbytes) // _PAGE) * _PAGE) as buffer:
        try:
            _read_pages(descriptor, buffer, kept._offset - ahead, ahead + kept.nbytes)
        finally:
            os.close(descriptor)
        dtype = np.dtype(kept.dtype.numpy())
        yield np.frombuffer(buffer, dtype, kept.size, ahead).reshape(kept.shape.numpy())


def _read_pages(descriptor: int, buffer: mmap.mmap, position: int, size: int) -> None:
    """Read whole pages into `buffer` until it holds `size` bytes."""
    done, end = 0, -(-size // _PAGE) * _PAGE
    with memoryview(buffer) as view:
        while done < size:
            with view[done : min(done + _DIRECT_CHUNK, end)] as part:
                count = os.preadv(descriptor, [part], position + done)
            if count == 0:
                raise OSError("the file is shorter than its tensors")
            done += count


@contextlib.contextmanager
def reading(tensor: ir.TensorProtocol) -> Iterator[np.ndarray[Any, Any]]:
    """Give the tensor's content as an array that must not outlive the block."""
    try:
        yield tensor.numpy()
    finally:
        release(tensor)


@contextlib.contextmanager
def named_in(places: Iterable[tuple[ir.Value, str, int]]) -> Iterator[None]:
    """Let initializers be references into files while the block serializes their graph.

    Args:
        places: An initializer with a tensor, the file that is to hold it, and its offset in bytes.
    """
    held: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for value, file, offset in places:
            tensor = value.const_value
            assert tensor is not None
            held.append((value, tensor))
            value.const_value = ir.ExternalTensor(
                file,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),  # type: ignore[arg-type]
                name=value.name or "",
                doc_string=tensor.doc_string,
            )
        yield
    finally:
        for value, tensor in held:
            value.const_value = tensor


def data_file(tensor: ir.TensorProtocol) -> tuple[DataFile, int] | None:
    """Return the data file that holds a tensor's bytes as they are, and their offset in it."""
    kept: object = tensor  # mypy takes FileTensor and TensorProtocol for exclusive
    if isinstance(kept, FileTensor) and isinstance(kept._store, DataFile):
        return kept._store, kept._offset
    return None


def stored_bytes(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes as they are stored, sub-byte elements packed, as uint8 `[nbytes]`.

    Tensors on disk are mapped, not read; those in memory are viewed, not copied, unless their
    elements must be packed first.
    """
    kept: object = tensor  # mypy takes FileTensor and TensorProtocol for exclusive
    if isinstance(kept, FileTensor) and kept.size:
        return kept._map(np.dtype(np.uint8))
    if isinstance(tensor, ir.ExternalTensor) and tensor.size:
        return np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
    if tensor.dtype.bitwidth >= 8 and tensor.dtype != ir.DataType.STRING:
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return np.frombuffer(tensor.tobytes(), np.uint8)
