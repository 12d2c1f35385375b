"""Text to feeds: tokenizers, and windows over a text's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lwc.calibration.feeds import dim_names, make_feed
from lwc.calibration.inputs import RoleKind, fed_inputs, input_role
from lwc.core.errors import InputError, LwcError
from lwc.frontend.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

    from lwc.core.module import Module

__all__ = [
    "Tokenize",
    "id_input",
    "load_tokenizer",
    "read_text",
    "text_feeds",
    "token_feed",
    "windows",
]

Tokenize: TypeAlias = Callable[[str], Sequence[int]]
"""Turns a text into token ids, without adding special tokens, padding or truncating."""


def read_text(path: str | Path) -> str:
    """Read a text in UTF-8.

    Raises:
        InputError: There is none.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot be read: {reason}", file=path) from error


def load_tokenizer(path: str | Path) -> Tokenize:
    """Read the tokenizer of a model; see `lwc.frontend.tokenizer_files.open_tokenizer`.

    Raises:
        InputError: There is no tokenizer at `path`, or it cannot be read.
        MissingExtraError: The library that reads it is not installed.
    """
    opened = open_tokenizer(path)
    return lambda text: opened.encode(text, False)


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(start, stop, scored)` of windows over `count` positions.

    Positions `[scored, stop)` are those no earlier window covered, so that every position is
    counted once; `[start, scored)` is context.

    Raises:
        ValueError: The stride is not within `[1, window]`.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"the stride {stride} must lie between 1 and the window, {window}")
    covered = start = 0
    while covered < count:
        stop = min(start + window, count)
        yield start, stop, covered
        covered = stop
        start += stride


def id_input(module: Module) -> ir.Value:
    """Return the input that takes token ids: the integer input that indexes the largest table.

    Raises:
        LwcError: No input indexes a table.
    """
    candidates = [
        (role.high, value)
        for value in fed_inputs(module)
        if (role := input_role(module, value)).kind is RoleKind.IDS
        and value.shape is not None
        and len(value.shape) == 2
    ]
    if not candidates:
        raise LwcError(
            "the model takes no token ids: no input [batch, sequence] indexes a table",
            file=module.source.path,
            remedy="give a language model",
        )
    return max(candidates, key=lambda candidate: candidate[0])[1]


def token_feed(module: Module, ids: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Make a feed of token ids `[batch, length]`: no padding, first segment, empty past.

    Raises:
        LwcError: The ids do not fit the model's fixed dimensions, or another input is unknown.
    """
    main = id_input(module)
    extents = {"batch": ids.shape[0], "length": ids.shape[1], "past": 0}
    bindings = {name: extents[kind] for name, kind in dim_names(module).items() if kind in extents}
    for axis, dim in enumerate(main.shape or ()):
        if not isinstance(dim, int) and dim.value in bindings:
            bindings[dim.value] = ids.shape[axis]
    feed = make_feed(module, bindings)
    for value in fed_inputs(module):
        array = feed[value.name or ""]
        if value is main:
            feed[value.name or ""] = ids.astype(array.dtype)
        elif input_role(module, value).kind is RoleKind.IDS:
            feed[value.name or ""] = np.zeros_like(array)
    return feed


def text_feeds(
    module: Module,
    tokenizer: Tokenize | str | Path,
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    batch: int = 1,
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield feeds of windows over a text's tokens, `batch` windows at a time.

    Args:
        module: A model that takes token ids.
        tokenizer: A tokenizer, or the path of one (see `load_tokenizer`).
        text: The text.
        window: Tokens in a window; the last one may be shorter and comes alone.
        stride: Tokens between the starts of windows; `window` by default: no overlap.
        batch: Windows in a feed.
    """
    tokenize = tokenizer if callable(tokenizer) else load_tokenizer(tokenizer)
    ids = np.asarray(tokenize(text), np.int64)
    waiting: list[np.ndarray[Any, Any]] = []
    for start, stop, _ in windows(len(ids), window, stride or window):
        piece = ids[start:stop]
        if waiting and (len(waiting) == batch or len(piece) != len(waiting[0])):
            yield token_feed(module, np.stack(waiting))
            waiting = []
        waiting.append(piece)
    if waiting:
        yield token_feed(module, np.stack(waiting))
