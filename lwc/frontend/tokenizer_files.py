"""Tokenizers in files: where they lie, and the library that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lwc.core.errors import InputError, MissingExtraError

__all__ = ["TOKENIZER_FILE", "OpenTokenizer", "open_tokenizer", "read_tokenizer_file"]

TOKENIZER_FILE = "tokenizer.json"


class OpenTokenizer(NamedTuple):
    """A tokenizer as its library reads it: without padding, without truncation.

    Attributes:
        encode: Turns a text into tokens; with True, with the special tokens that begin one.
        decode: Turns tokens into text, without special tokens.
        library: What reads it.
        reader: The library's object.
        file: A file of the library `tokenizers`, a `.gguf` file or a folder.
    """

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[Sequence[int]], str]
    library: Literal["tokenizers", "transformers"]
    reader: Any
    file: Path


def open_tokenizer(path: str | Path) -> OpenTokenizer:
    """Read the tokenizer of a model.

    Args:
        path: A `tokenizer.json`, a folder with one (or with what transformers reads), a `.gguf`
            file, or a model file beside its `tokenizer.json`.

    Raises:
        InputError: There is no tokenizer at `path`, or it cannot be read.
        MissingExtraError: The library that reads it is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file or folder", file=path)
    if path.suffix == ".gguf":
        return _through_transformers(path.parent, path, gguf_file=path.name)
    folder = path if path.is_dir() else path.parent
    file = path if path.suffix == ".json" else folder / TOKENIZER_FILE
    if file.is_file():
        return read_tokenizer_file(file)
    if path.is_dir():
        return _through_transformers(path, path)
    raise InputError(
        f"there is no {TOKENIZER_FILE} beside it", file=path, remedy="--tokenizer PATH names one"
    )


def read_tokenizer_file(file: str | Path) -> OpenTokenizer:
    """Read a file of the library `tokenizers`.

    Raises:
        InputError: It is none.
        MissingExtraError: The library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(f"reading a {TOKENIZER_FILE}", "hf") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"not a tokenizer: {error}", file=file) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return OpenTokenizer(
        encode=lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        library="tokenizers",
        reader=tokenizer,
        file=Path(file),
    )


def _through_transformers(folder: Path, file: Path, **options: Any) -> OpenTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("reading this tokenizer", "hf") from error
    from lwc.frontend.huggingface import offline

    try:
        with offline():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no tokenizer can be read: {error}", file=file) from error
    return OpenTokenizer(
        encode=lambda text, special: tokenizer.encode(
            text, add_special_tokens=special, verbose=False
        ),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        library="transformers",
        reader=tokenizer,
        file=file,
    )
