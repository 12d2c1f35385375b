"""A GGUF file's header, checked against the file's extent, and its tensors, memory-mapped.

The `gguf` package decodes blocks, but its reader trusts the counts in the header (a hostile one
makes it loop without end) and takes seconds for a large vocabulary. This one checks every
extent before it believes it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwc.core.errors import InputError, MissingExtraError

__all__ = ["GgufFile", "GgufTensor"]

_SCALARS = dict(zip((*range(8), 10, 11, 12), ("<" + code for code in "BbHhIif?Qqd"), strict=True))
"""`struct` codes of the metadata's scalar types, by GGUF type number."""

_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_RANK = 4
_MAX_NESTING = 4


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor.

    Attributes:
        name: Its name in the file, such as `blk.0.attn_q.weight`.
        kind: Name of its block format, such as `Q4_1` or `F32`.
        shape: Extents, slowest-moving first: `[rows, columns]`.
        offset: Where its bytes start in the file.
        nbytes: How many there are.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """An opened GGUF file.

    Args:
        path: The file.

    Attributes:
        metadata: The header's key-value pairs.
        tensors: The stored tensors by name.
        header: The bytes before the tensor data.

    Raises:
        InputError: The file is missing, truncated or no GGUF file of version 2 or 3.
        MissingExtraError: The `gguf` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", file=path) from error
        except ValueError as error:
            raise InputError("is empty", file=path) from error
        self._position = 0
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise self._malformed("has a damaged header") from error

    @property
    def header(self) -> bytes:
        """The bytes before the tensor data: all that configuration and tokenizer come from."""
        return self._bytes[: min((t.offset for t in self.tensors.values()), default=None)]

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`."""
        return str(self.metadata.get("general.architecture", ""))

    def blocks(self, tensor: GgufTensor) -> np.ndarray[Any, Any]:
        """Return the stored bytes as uint8 `[..., bytes per row]`, mapped, not copied."""
        rows = tensor.shape[:-1]
        flat = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(*rows, tensor.nbytes // max(math.prod(rows), 1))

    def decode(self, tensor: GgufTensor) -> np.ndarray[Any, Any]:
        """Return the content as float32 of `tensor.shape`.

        Raises:
            InputError: The `gguf` package cannot decode this block format.
        """
        import gguf

        kind = gguf.GGMLQuantizationType[tensor.kind]
        blocks = self.blocks(tensor)
        if tensor.kind == "F32":
            return blocks.view(np.float32).reshape(tensor.shape)
        try:
            values = gguf.dequantize(blocks, kind)
        except NotImplementedError as error:
            raise InputError(
                f"tensor '{tensor.name}' has the block format {tensor.kind}, "
                "which cannot be decoded",
                file=self.path,
                remedy="convert the file to Q4_0, Q4_1, Q8_0 or F16 with llama.cpp",
            ) from error
        return np.asarray(values, np.float32).reshape(tensor.shape)

    # Header

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(4) != b"GGUF":
            raise self._malformed("is not a GGUF file")
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise self._malformed(f"has GGUF version {version}; lwc reads versions 2 and 3")
        tensor_count, pair_count = self._scalar("<Q"), self._scalar("<Q")
        metadata = {}
        for _ in range(self._checked(pair_count, 12)):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        entries = [self._tensor_entry() for _ in range(self._checked(tensor_count, 24))]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment <= 0:
            raise self._malformed(f"has the alignment {alignment}")
        start = -(-self._position // alignment) * alignment
        return metadata, {entry[0]: self._place(*entry, start) for entry in entries}

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        rank = self._scalar("<I")
        if not 1 <= rank <= _MAX_RANK:
            raise self._malformed(f"tensor '{name}' has rank {rank}")
        shape = tuple(reversed([self._scalar("<Q") for _ in range(rank)]))
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int
    ) -> GgufTensor:
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise MissingExtraError("reading a GGUF file", "gguf") from error
        try:
            format_ = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise self._malformed(f"tensor '{name}' has the unknown format {kind}") from error
        elements, nbytes = gguf.GGML_QUANT_SIZES[format_]
        if shape[-1] % elements:
            raise self._malformed(f"tensor '{name}' {list(shape)} has no whole number of blocks")
        size = math.prod(shape) // elements * nbytes
        end = start + offset + size
        if end > len(self._bytes):
            raise self._malformed(
                f"is truncated: tensor '{name}' ends at byte {end}, the file at {len(self._bytes)}"
            )
        return GgufTensor(name, format_.name, shape, start + offset, size)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        if depth == _MAX_NESTING:
            raise self._malformed("has arrays nested too deep")
        inner, count = self._scalar("<I"), self._scalar("<Q")
        if inner in _SCALARS:
            code = _SCALARS[inner][1]
            count = self._checked(count, struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))
        read: Callable[[], Any] = (
            self._string if inner == _STRING else lambda: self._value(inner, depth + 1)
        )
        return [read() for _ in range(self._checked(count, 8))]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> bytes:
        start, end = self._position, self._position + count
        if end > len(self._bytes):
            raise self._malformed(f"is truncated: its header goes past byte {len(self._bytes)}")
        self._position = end
        return self._bytes[start:end]

    def _checked(self, count: int, least: int) -> int:
        """Return `count`, which must fit into the rest of the file at `least` bytes each."""
        if count * least > len(self._bytes) - self._position:
            raise self._malformed(f"is truncated: it announces {count} items that do not fit")
        return count

    def _malformed(self, message: str) -> InputError:
        return InputError(message, file=self.path, remedy="get the file anew")
