"""Calibration data: feeds from files, to be gone through as often as a pass needs them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from lwc.calibration.feeds import ReadFeed, load_feeds
from lwc.calibration.text import (
    Tokenize,
    load_tokenizer,
    read_text,
    text_feeds,
    token_feed,
)
from lwc.core.errors import InputError, LwcError, UsageError

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = ["Calibration", "CalibrationFile", "as_calibration"]

Array = np.ndarray[Any, Any]

_MODELS = (".onnx", ".onnxtxt", ".gguf", ".safetensors")
_LINE = "a line is a list of token ids, or an object with an array per input"
_KINDS = "give an .npz file or a folder of them, a .jsonl file, or a text"


@runtime_checkable
class Calibration(Protocol):
    """Where feeds come from."""

    def feeds(self, module: Module) -> Iterable[Mapping[str, Array]]:
        """Yield the feeds of `module`; may be called again and again."""


@dataclass(frozen=True)
class _Given:
    """Feeds that are in memory."""

    arrays: Sequence[Mapping[str, Array]]

    def feeds(self, module: Module) -> Iterable[Mapping[str, Array]]:
        return self.arrays


def as_calibration(
    given: str | Path | Calibration | Iterable[Mapping[str, Array]],
) -> Calibration:
    """Return what `lwc.optimize` takes as calibration data: a path, feeds, or what gives feeds.

    Raises:
        UsageError: It is none of them.
    """
    if isinstance(given, str | Path):
        return CalibrationFile(given)
    if isinstance(given, Calibration):
        return given
    if not isinstance(given, Mapping):
        with contextlib.suppress(TypeError):
            arrays = tuple(given)
            if all(isinstance(feed, Mapping) for feed in arrays):
                return _Given(arrays)
    raise UsageError(
        f"a {type(given).__name__} is no calibration data",
        remedy="give a path, a list of feeds, or a CalibrationFile",
    )


@dataclass(frozen=True)
class CalibrationFile:
    """Feeds for a model, read anew each time they are gone through.

    Attributes:
        path: An `.npz` file or a folder of them, one feed each; a `.jsonl` file, each line of which
            is a list of token ids or an object with an array for each input; or a text.
        tokenizer: Turns a text into tokens: a path (see `lwc.calibration.text.load_tokenizer`) or
            a function. By default what lies beside the model.
        samples: Feeds to use at most; all of them where None.
        window: Tokens of a text in one feed. A shorter piece at its end is left out, unless it is
            all there is.
    """

    path: str | Path
    tokenizer: Tokenize | str | Path | None = None
    samples: int | None = None
    window: int = 512

    def __post_init__(self) -> None:
        for name, number in (("samples", self.samples), ("window", self.window)):
            if number is not None and number < 1:
                raise UsageError(f"{name} is a number above 0, not {number}")
        if Path(self.path).suffix.lower() in _MODELS:
            raise UsageError(f"'{self.path}' is a model, not calibration data", remedy=_KINDS)

    def feeds(self, module: Module) -> Iterator[dict[str, Array]]:
        """Yield the feeds of `module`.

        Raises:
            InputError: There is no such file, or it does not hold what its name says.
            LwcError: The model takes no token ids, or no tokenizer is found.
        """
        path = Path(self.path)
        if not path.exists():
            raise InputError("no such file or folder with calibration data", file=path)
        if path.is_dir() or path.suffix == ".npz":
            found = load_feeds(path)
        elif path.suffix == ".jsonl":
            found = _lines(path, module)
        else:
            found = self._text(path, module)
        return itertools.islice(found, self.samples)

    def _text(self, path: Path, module: Module) -> Iterator[dict[str, Array]]:
        place = self.tokenizer or module.source.path
        if place is None:
            raise UsageError(
                f"'{path}' is a text, and there is no tokenizer", remedy="name one for it"
            )
        tokenize = place if callable(place) else load_tokenizer(place)
        ids = tokenize(read_text(path))
        if not len(ids):
            raise InputError("the text has no tokens", file=path)
        whole = len(ids) - len(ids) % self.window or len(ids)
        return text_feeds(module, lambda _: ids[:whole], "", window=self.window)


def _lines(path: Path, module: Module) -> Iterator[dict[str, Array]]:
    number, found = 0, False
    with path.open("rb") as lines:
        for number, content in enumerate(lines, 1):
            try:
                line = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError("cannot be read: it is not UTF-8 text", file=path) from error
            if not line.strip():
                continue
            try:
                feed = ReadFeed(_feed(json.loads(line), module), path, number)
            except LwcError as error:
                raise InputError(
                    f"line {number} is no feed of the model: {error.message}",
                    file=path,
                    remedy=error.remedy,
                ) from error
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                raise InputError(
                    f"line {number} is no feed: {error}",
                    file=path,
                    remedy=_LINE,
                ) from error
            found = True
            yield feed
    if not found:
        raise InputError(f"none of its {number} lines is a feed", file=path, remedy=_LINE)


def _feed(content: Any, module: Module) -> dict[str, Array]:
    if isinstance(content, list):
        ids = np.asarray(content)
        if ids.ndim != 1 or ids.dtype.kind != "i" or not ids.size:
            raise ValueError("it is no list of integers")
        return token_feed(module, ids[None])
    if not isinstance(content, dict):
        raise TypeError("it is neither a list nor an object")
    types = {value.name: value.dtype for value in module.graph.inputs}
    unknown = [name for name in content if name not in types]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no input of the model")
    made = {}
    for name, numbers in content.items():
        given, dtype = np.asarray(numbers), types[name]
        if dtype is not None and not _fits(given.dtype.kind, dtype):
            raise ValueError(f"'{name}' takes {dtype.name.lower()}, not {given.dtype}")
        # From the numbers, not from `given`: numpy refuses integers that do not fit.
        made[name] = given if dtype is None else np.asarray(numbers, dtype.numpy())
    return made


def _fits(kind: str, dtype: ir.DataType) -> bool:
    """Tell whether numbers of one of numpy's kinds may be given for an element type."""
    if kind == "f":
        return dtype.is_floating_point()
    if kind == "b":
        return dtype == ir.DataType.BOOL
    return (kind == "U") == (dtype == ir.DataType.STRING)
