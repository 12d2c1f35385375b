"""What ONNX's parser of texts says, for people."""

from __future__ import annotations

import re

__all__ = ["parse_reason"]

_SAID = re.compile(
    r"\[ParseError at position \(line: (\d+) column: (\d+)\)\]\nError context: (.*)\n(.*)"
)
_SHOWN = 200
"""Characters that are shown of a line, around the place."""


def parse_reason(error: Exception) -> str:
    """Return in one line where a text cannot be parsed, and why.

    Args:
        error: What `onnx.parser` raised; a `ParseError` holds bytes.
    """
    if isinstance(error, IndexError):  # of C++'s std::out_of_range, the name of a function is left
        return "a number is out of range"
    said = error.args[0] if error.args else ""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(error)
    found = _SAID.fullmatch(text)
    if found is None:
        return " ".join(text.split())[:_SHOWN]
    line, column, context, reason = found.groups()
    start = max(0, int(column) - _SHOWN // 2)
    shown = " ".join(context[start : start + _SHOWN].split())
    return f"line {line}, column {column}: {reason.strip().rstrip('.')}, in '{shown}'"
