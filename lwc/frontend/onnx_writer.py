"""Write modules as ONNX: big weights streamed to a data file, everything atomically.

The order makes a run that is killed at any point leave a whole model, the old or the new one:
the data file gets a name made of its content, so it never overwrites the one the old model uses;
the model is renamed into place after it; the old data file goes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import onnx
import onnx.helper
import onnx.parser
import onnx.printer
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from lwc.core.errors import LwcError, UsageError
from lwc.core.module import Module
from lwc.core.weights import SpilledTensor, WeightStore, named_in, release
from lwc.frontend.atomic import StagedFile, link_into_place, sync_folder, writing
from lwc.frontend.parse_error import parse_reason

__all__ = ["EXTERNAL_THRESHOLD", "SaveResult", "save", "save_folder"]

EXTERNAL_THRESHOLD = 64 << 20
"""Bytes of weights from which they go to a data file by default."""

_SMALLEST_EXTERNAL = 1024
_TEXT_LIMIT = 16 << 20
_PAGE = 4096
_CACHE_LINE = 64
_BIG = 64 << 10
_CHUNK = 1 << 20
_ADOPTED = 16 << 20
"""Bytes of spilled weights from which their file becomes the data file instead of being copied."""

_PROTOBUF_LIMIT = 2**31 - 1
_TYPE_IR_VERSION = {
    ir.DataType.INT4: 10,
    ir.DataType.UINT4: 10,
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.INT2: 13,
    ir.DataType.UINT2: 13,
}


@dataclass(frozen=True)
class SaveResult:
    """What was written.

    Attributes:
        path: The model file.
        data_path: The file of its weights, or None when they are inside the model.
        nbytes: Size of both together.
    """

    path: str
    data_path: str | None
    nbytes: int


def save(
    module: Module,
    path: str | os.PathLike[str],
    *,
    external_threshold: int = EXTERNAL_THRESHOLD,
) -> SaveResult:
    """Write a module to a `.onnx` file, or as text to a `.onnxtxt` file, atomically.

    From `external_threshold` bytes of weights on, those of 1 KiB and more are streamed to
    `NAME.<content hash>.data` beside the model. The file that the module was read from may be
    the target.

    Args:
        module: The module; it is not changed.
        path: The file to write.
        external_threshold: Bytes of weights from which they leave the model file; 0 for always.

    Raises:
        UsageError: The suffix names no format that lwc writes.
        LwcError: The disk is full, the folder is missing, or the format cannot hold the model.
    """
    target = os.fspath(path)
    suffix = os.path.splitext(target)[1].lower()
    if suffix not in (".onnx", ".onnxtxt"):
        raise UsageError(
            f"cannot write '{target}': its suffix names no format that lwc writes",
            remedy="end the name in .onnx or .onnxtxt",
        )
    if os.path.isdir(target):
        raise UsageError(f"cannot write '{target}': it is a folder", remedy="name a file")
    with writing(target):
        if suffix == ".onnxtxt":
            return _save_text(module, target)
        weights = _movable_weights(module)
        if sum(tensor.nbytes for tensor in weights) < external_threshold:
            weights = []
        return _save_binary(module, target, weights)


def save_folder(module: Module, directory: str | os.PathLike[str]) -> SaveResult:
    """Write `model.onnx` to a folder, with the files that belong beside it.

    Raises:
        LwcError: See `save`.
    """
    folder = os.fspath(directory)
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        for name, origin in sorted(module.source.companions.items()):
            place = os.path.join(folder, os.path.basename(name))
            if os.path.exists(place) and os.path.samefile(origin, place):
                continue
            with (
                open(origin, "rb") as source,
                StagedFile(folder, os.path.basename(place)) as staged,
            ):
                shutil.copyfileobj(source, staged.file)
                staged.commit(place)
    return save(module, os.path.join(folder, "model.onnx"))


def _movable_weights(module: Module) -> list[ir.TensorProtocol]:
    """Return the tensors that may leave the model file, each once, in the order of the graph."""
    found: dict[int, ir.TensorProtocol] = {}
    for _, value in module.initializers():
        tensor = value.const_value
        if (
            tensor is not None
            and tensor.dtype != ir.DataType.STRING
            and tensor.nbytes >= _SMALLEST_EXTERNAL
        ):
            found.setdefault(id(tensor), tensor)
    return list(found.values())


def _save_binary(module: Module, target: str, weights: Sequence[ir.TensorProtocol]) -> SaveResult:
    folder, name = os.path.split(os.path.abspath(target))
    # The model names its data file, and protobuf holds text in UTF-8 only.
    stem = os.fsencode(os.path.splitext(name)[0]).decode(errors="replace")
    present = _data_files(folder, stem)
    old_data = _referenced(folder, name, present)
    data: str | None = None
    places: dict[int, tuple[int, int]] = {}
    try:
        if weights:
            store = _adoptable(folder, weights)
            if store is None:
                data, places = _write_data(folder, stem, weights)
            else:
                data, places = _adopt(folder, stem, weights, store)
        message = _serialize(module, data, places, target)
        with StagedFile(folder, name) as staged:
            staged.file.write(message)
            staged.commit(os.path.join(folder, name))
    except BaseException:
        # An interrupt may come just after a rename: what counts is which model is in place.
        new = _data_files(folder, stem) - present
        for entry in new - _referenced(folder, name, new):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, entry))
        raise
    sync_folder(folder)
    for old in old_data - _in_use(folder, old_data):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, old))
    if data is None:
        return SaveResult(target, None, len(message))
    size = len(message) + os.path.getsize(os.path.join(folder, data))
    return SaveResult(target, os.path.join(os.path.dirname(target), data), size)


def _write_data(
    folder: str, stem: str, weights: Sequence[ir.TensorProtocol]
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Stream tensors to a data file named by its content.

    The name is a hash of the CRC-32 of every mebibyte. It must differ only from the name of the
    file that the old model at this place uses, where their contents differ: two given contents
    get the same name with a probability of 2^-32 at most. Unlike a cryptographic hash of all the
    bytes it costs little beside the copy, which mostly happens inside the kernel.

    Returns:
        Name of the file, and offset and length of each tensor by its id.
    """
    places: dict[int, tuple[int, int]] = {}
    digest = hashlib.blake2b(digest_size=8)
    with StagedFile(folder, f"{stem}.data") as staged:
        file = staged.file
        for tensor in weights:
            alignment = _PAGE if tensor.nbytes >= _BIG else _CACHE_LINE
            start = -(-file.tell() // alignment) * alignment
            file.seek(start)
            tensor.tofile(file)  # type: ignore[attr-defined]
            file.flush()
            release(tensor)
            if file.tell() != start + tensor.nbytes:
                raise LwcError(f"weight '{tensor.name}' has not the size that its shape says")
            places[id(tensor)] = (start, tensor.nbytes)
            for checksum in _checksums(file.fileno(), start, file.tell()):
                digest.update(checksum)
            _start_writing(file.fileno(), start, tensor.nbytes)
        name = f"{stem}.{digest.hexdigest()}.data"
        staged.commit(os.path.join(folder, name))
    return name, places


def _checksums(descriptor: int, position: int, end: int) -> Iterator[bytes]:
    while position < end:
        chunk = os.pread(descriptor, min(_CHUNK, end - position), position)
        if not chunk:
            raise OSError("the data file lost its end while it was written")
        yield zlib.crc32(chunk).to_bytes(4, "little")
        position += len(chunk)


def _adoptable(folder: str, weights: Sequence[ir.TensorProtocol]) -> WeightStore | None:
    """Return the store whose file can become the data file: big, and hardly anything in it lost."""
    stored = [kept for kept in cast(Sequence[object], weights) if isinstance(kept, SpilledTensor)]
    for store in dict.fromkeys(tensor.owner for tensor in stored):
        kept = sum(tensor.nbytes for tensor in weights if store.offset(tensor) is not None)
        if kept >= max(_ADOPTED, 0.99 * store.nbytes) and store.linkable(folder):
            return store
    return None


def _adopt(
    folder: str, stem: str, weights: Sequence[ir.TensorProtocol], store: WeightStore
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Make the file of spilled weights the data file, adding those that are elsewhere.

    Nothing is copied that is there already. See `_write_data`; the places, which depend on the
    history of the store, are part of what the name is made of.
    """
    _start_writing(store.fileno(), 0, store.nbytes)
    places: dict[int, tuple[int, int]] = {}
    digest = hashlib.blake2b(digest_size=8)
    for tensor in weights:
        start = store.offset(tensor)
        if start is None:
            start = store.offset(store.put_tensor(tensor))
            release(tensor)
        assert start is not None
        places[id(tensor)] = (start, tensor.nbytes)
        digest.update(start.to_bytes(8, "little"))
        for checksum in _checksums(store.fileno(), start, start + tensor.nbytes):
            digest.update(checksum)
    name = f"{stem}.{digest.hexdigest()}.data"
    try:
        link_into_place(store.fileno(), os.path.join(folder, name))
    finally:
        store.restart()  # A file is given a name only once, even if that name is removed.
    return name, places


def _start_writing(descriptor: int, start: int, length: int) -> None:
    """Have the disk write what is complete while the rest is copied; a hint."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _data_files(folder: str, stem: str) -> set[str]:
    """Return the names that have the form of a data file of lwc's for a model of this name."""
    pattern = re.compile(re.escape(stem) + r"\.[0-9a-f]{16}\.data")
    return {entry for entry in os.listdir(folder) if pattern.fullmatch(entry)}


def _referenced(folder: str, name: str, data_files: set[str]) -> set[str]:
    """Return those data files that a model refers to; none where there is no model."""
    path = os.path.join(folder, name)
    if not data_files or not os.path.isfile(path) or os.path.getsize(path) == 0:
        return set()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as model:
        return {entry for entry in data_files if model.find(entry.encode()) >= 0}


def _in_use(folder: str, data_files: set[str]) -> set[str]:
    """Return those data files that any model in the folder refers to, such as a copy of the old."""
    models = [entry for entry in os.listdir(folder) if entry.lower().endswith(".onnx")]
    try:
        return set().union(*(_referenced(folder, name, data_files) for name in models))
    except OSError:  # What cannot be read may refer to all of them.
        return data_files


def _serialize(
    module: Module, data: str | None, places: dict[int, tuple[int, int]], target: str
) -> bytes:
    proto = _model_proto(module, data, places)
    try:
        message: bytes = proto.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise _too_big(target) from error
    if len(message) > _PROTOBUF_LIMIT:
        raise _too_big(target)
    return message


def _too_big(target: str) -> LwcError:
    return LwcError(
        "holds more than 2 GiB inside the model file, which protobuf cannot",
        file=target,
        remedy="lower external_threshold, and make big Constant nodes initializers",
    )


def _model_proto(
    module: Module, data: str | None = None, places: dict[int, tuple[int, int]] | None = None
) -> onnx.ModelProto:
    """Serialise a module; the tensors in `places` are referred to, not contained."""
    with named_in(
        (value, data or "", places[id(value.const_value)][0])
        for _, value in (module.initializers() if places else ())
        if places is not None and id(value.const_value) in places
    ):
        try:
            proto = ir.serde.serialize_model(module.model)
        except ir.serde.SerdeError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise LwcError(f"the model cannot be expressed in ONNX: {cause}") from error
    _declare_domains(proto)
    proto.ir_version = max(proto.ir_version, _least_ir_version(module, proto))
    return proto


def _declare_domains(proto: onnx.ModelProto) -> None:
    """Import every operator domain that nodes use, in the model and in each function."""
    declared = {entry.domain: entry.version for entry in proto.opset_import}
    scopes = [(proto.opset_import, list(proto.graph.node))]
    scopes += [(function.opset_import, list(function.node)) for function in proto.functions]
    for imports, nodes in scopes:
        have = {entry.domain for entry in imports}
        missing = {node.domain for node in _all_nodes(nodes)} - have
        if imports is proto.opset_import:
            missing |= {function.domain for function in proto.functions} - have
        for domain in sorted(missing):
            imports.add(domain=domain, version=declared.get(domain, 1))


def _all_nodes(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(list(attribute.g.node))
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _all_nodes(list(graph.node))


def _least_ir_version(module: Module, proto: onnx.ModelProto) -> int:
    least = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    if proto.functions:
        least = max(least, 10 if any(f.overload for f in proto.functions) else 8)
    for _, value in module.initializers():
        if value.const_value is not None:
            least = max(least, _TYPE_IR_VERSION.get(value.const_value.dtype, 0))
    return least


def _save_text(module: Module, target: str) -> SaveResult:
    weights = sum(tensor.nbytes for tensor in _movable_weights(module))
    if weights > _TEXT_LIMIT:
        raise LwcError(
            f"has {weights >> 20} MiB of weights, too much for text",
            file=target,
            remedy="write a .onnx file",
        )
    text = onnx.printer.to_text(_model_proto(module))
    try:
        onnx.parser.parse_model(text)
    except onnx.parser.ParseError as error:
        raise LwcError(
            f"ONNX's textual syntax cannot express this model: {parse_reason(error)}",
            file=target,
            remedy="write a .onnx file",
        ) from error
    folder, name = os.path.split(os.path.abspath(target))
    with StagedFile(folder, name) as staged:
        staged.file.write(text.encode())
        staged.commit(os.path.join(folder, name))
    sync_folder(folder)
    return SaveResult(target, None, len(text.encode()))
