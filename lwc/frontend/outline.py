"""Leave big inline weights in the file: read the rest of a model without copying them.

A model file is a protobuf message, and a big initializer is one contiguous run of bytes in it.
Parsing would copy every weight into memory, and each later read would copy it again. Here the
message is walked once, the big runs are noted by position, and a copy without them is handed to
the parser; the weights are then mapped from the file itself.

Field numbers are those of onnx.proto: ModelProto.graph 7, GraphProto.initializer 5,
TensorProto.raw_data 9 and data_location 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Outline", "outline"]

_GRAPH, _INITIALIZER, _RAW_DATA, _DATA_LOCATION = 7, 5, 9, 14
_LENGTH_DELIMITED = 2
_MINIMUM = 1 << 16


class _MalformedError(Exception):
    pass


@dataclass
class Outline:
    """A model message without its big weights.

    Attributes:
        message: The bytes to parse.
        weights: Offset and length in the file of each initializer's bytes that were left out,
            by the initializer's position in the graph.
    """

    message: bytes | memoryview
    weights: dict[int, tuple[int, int]] = field(default_factory=dict)


def outline(data: memoryview) -> Outline:
    """Leave the raw bytes of initializers of 64 KiB and more out of a serialised model.

    A message that does not look as expected is returned whole: the parser will judge it.
    """
    weights: dict[int, tuple[int, int]] = {}
    chunks: list[bytes | memoryview] = []
    try:
        graphs = 0
        for number, start, body, end in _fields(data, 0, len(data)):
            if number != _GRAPH or body < 0:
                chunks.append(data[start:end])
                continue
            graphs += 1
            inner = _without_weights(data, body, end, weights)
            chunks.append(_header(_GRAPH, sum(map(len, inner))))
            chunks.extend(inner)
    except _MalformedError:
        return Outline(data)
    if graphs != 1 or not weights:
        return Outline(data)
    return Outline(b"".join(chunks), weights)


def _without_weights(
    data: memoryview, start: int, end: int, weights: dict[int, tuple[int, int]]
) -> list[bytes | memoryview]:
    chunks: list[bytes | memoryview] = []
    position, copied = 0, start
    for number, first, body, last in _fields(data, start, end):
        if number != _INITIALIZER or body < 0:
            continue
        if last - body >= _MINIMUM:
            raw = _raw_data(data, body, last)
            if raw is not None:
                field_start, raw_start, raw_end = raw
                weights[position] = (raw_start, raw_end - raw_start)
                chunks.append(data[copied:first])
                chunks.append(_header(_INITIALIZER, (field_start - body) + (last - raw_end)))
                chunks.append(data[body:field_start])
                chunks.append(data[raw_end:last])
                copied = last
        position += 1
    chunks.append(data[copied:end])
    return chunks


def _raw_data(data: memoryview, start: int, end: int) -> tuple[int, int, int] | None:
    found = None
    for number, first, body, last in _fields(data, start, end):
        if number == _DATA_LOCATION or (number == _RAW_DATA and (found or body < 0)):
            return None
        if number == _RAW_DATA:
            found = (first, body, last)
    return found if found is not None and found[2] - found[1] >= _MINIMUM else None


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, start, start of the content (-1 if not length-delimited) and end of fields."""
    while position < end:
        start = position
        tag, position = _varint(data, position, end)
        kind = tag & 7
        body = -1
        if kind == _LENGTH_DELIMITED:
            length, body = _varint(data, position, end)
            position = body + length
        elif kind == 0:
            _, position = _varint(data, position, end)
        elif kind == 1:
            position += 8
        elif kind == 5:
            position += 4
        else:
            raise _MalformedError
        if position > end:
            raise _MalformedError
        yield tag >> 3, start, body, position


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise _MalformedError


def _header(number: int, length: int) -> bytes:
    out = bytearray([number << 3 | _LENGTH_DELIMITED])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)
